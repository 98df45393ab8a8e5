"""LayerNorm (Ba et al. 2016) and RMSNorm (Zhang and Sennrich 2019) over the last dimension, alone or behind a sum.

    LayerNorm  y = (x - mean(x)) * rstd * w + b,  rstd = 1 / sqrt(var(x) + eps)
    RMSNorm    y = x * rstd * w,                  rstd = 1 / sqrt(mean(x^2) + eps)
Backward, xh the normalised x and g = dy * w:
    dx = rstd * (g - mean(g) - xh * mean(g * xh))   (RMSNorm: without mean(g)),  dw = sum(dy * xh),  db = sum(dy)
Behind a sum, x = drop(a) + r: both x and y are given, and the gradient of x joins dx. Without r, x = a is handed on.
Where there are biases backward sums dx over rows in passing, for the bias of the product that made x.
Numerics: loads are widened to fp32, every sum is fp32, one rounding at each store (where x is stored, y is that of the
rounded x). Traffic: forward 2*M*N elements, backward 3*M*N; behind a sum 4*M*N and 4*M*N, with dropout 4*M*N and 5*M*N.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedlm.kernels._autocast import one_dtype
from fusedlm.kernels._backend import use_triton
from fusedlm.kernels._columns import remember_sums, sum_partials
from fusedlm.kernels._launch import launch, num_programs, rows
from fusedlm.kernels._operator import operator
from fusedlm.kernels._philox import drop_threshold, dropout_seed, dropped_ref, keep_mask_ref
from fusedlm.kernels._triton import triton
from fusedlm.kernels.norm.kernels import bwd_kernel, fwd_kernel

MAX_N = 65536  # a row is one program's
SUMS_N = 4096  # up to which the backward pass has registers for sums of dx


def layer_norm_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    # Of several dtypes torch takes some on some devices.
    wide = functools.reduce(torch.promote_types, (t.dtype for t in (x, weight, bias) if t is not None))
    bias = None if bias is None else bias.to(wide)
    return F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias, eps).to(x.dtype)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def _sum_ref(x: Tensor, residual: Tensor | None, p: float, seed: Tensor | None, stream: int) -> Tensor:
    if residual is None:
        return x
    if seed is not None:
        threshold, scale = drop_threshold(p)
        keep = keep_mask_ref(seed, stream, x[..., 0].numel(), x.shape[-1], threshold).view(x.shape)
        x = dropped_ref(x, keep, scale)
    return x + residual


def add_layer_norm_ref(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    total = _sum_ref(x, residual, dropout_p, seed, stream)
    return layer_norm_ref(total, weight, bias, eps), total


def add_rms_norm_ref(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    total = _sum_ref(x, residual, dropout_p, seed, stream)
    return rms_norm_ref(total, weight, eps), total


@functools.cache
def _fwd_config(N: int, has_mean: bool, has_sum: bool) -> dict[str, Any]:
    block = max(triton.next_power_of_2(N), 8)
    # Short rows alone get one warp, which waits for no other; behind a sum there is more for two to do meanwhile.
    warps = 1 if block <= 1024 and not has_sum else min(max(block // 512, 1), 32)
    return {"N": N, "HAS_MEAN": has_mean, "HAS_SUM": has_sum, "BLOCK_N": block, "num_warps": warps}


@functools.cache
def _bwd_config(N: int, has_mean: bool, has_sum: bool, sums: bool) -> tuple[int, dict[str, Any]]:
    """Programs a multiprocessor, as many as their registers let be resident at once, and the constants.

    Measured, see docs/kernels/norm.md: behind a sum 32 numbers a thread, or 16 where dx is summed too; alone 16, or 8
    where a row is short.
    """
    block = max(triton.next_power_of_2(N), 8)
    if sums or (has_sum and N % 16):  # narrow accesses need registers for their addresses
        each, warps_per_multiprocessor = 16, 12
    else:
        each, warps_per_multiprocessor = (32, 8) if has_sum else (8, 24) if block <= 1024 else (16, 16)
    warps = min(max(block // (32 * each), 1), 32)
    programs = min(max(warps_per_multiprocessor // warps, 1), 16)
    return programs, {"N": N, "HAS_MEAN": has_mean, "BLOCK_N": block, "num_warps": warps}


def _forward(
    x: Tensor,
    r: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    mean: bool,
    stats: bool,
    p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, drop(x) + r where r is given, statistics where asked for: see `_statistics_size`)."""
    x2 = rows(x)
    M, N = x2.shape
    r2 = rows(r) if r is not None else None
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(y) if r2 is not None else None
    both = torch.empty(_statistics_size(M, mean), dtype=torch.float32, device=x.device) if stats else None
    rstd, means = (None, None) if both is None else (both[0], both[1] if mean else None)
    if M:
        key = (x.dtype, weight.dtype, None if bias is None else bias.dtype, stats, seed is None)
        scalars = (x2.stride(0), 0 if r2 is None else r2.stride(0), eps, stream, *drop_threshold(p))
        tensors = (x2, r2, weight, bias, y, total, means, rstd, seed)
        launch(fwd_kernel, (M, 1, 1), key, tensors, scalars, _fwd_config(N, mean, r2 is not None))
    return y, total, both


def _statistics_size(M: int, mean: bool) -> tuple[int, int]:
    """A line of rstd, and one of means; as long as leaves both aligned, for else a launch takes Triton's slow way."""
    return 2 if mean else 1, -(-M // 4) * 4


def _fake_statistics(x: Tensor, mean: bool) -> Tensor:
    return x.new_empty(_statistics_size(x.numel() // max(x.shape[-1], 1), mean), dtype=torch.float32)


@operator(fake=lambda x, w, b, eps, mean: (x.new_empty(x.shape), _fake_statistics(x, mean)))
def _norm_forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, mean: bool) -> tuple[Tensor, Tensor]:
    """(y, statistics)."""
    y, _, stats = _forward(x, None, weight, bias, eps, mean=mean, stats=True)
    assert stats is not None
    return y, stats


@operator(
    fake=lambda x, r, w, b, eps, mean, *_: (x.new_empty(x.shape), x.new_empty(x.shape), _fake_statistics(x, mean))
)
def _add_norm_forward(
    x: Tensor,
    r: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    mean: bool,
    p: float,
    seed: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, drop(x) + r, statistics)."""
    y, total, stats = _forward(x, r, weight, bias, eps, mean=mean, stats=True, p=p, seed=seed, stream=stream)
    assert total is not None
    assert stats is not None
    return y, total, stats


def _fake_gradients(
    dy: Any, ds: Any, x: Tensor, weight: Tensor, stats: Any, bias: bool, p: Any, seed: Any, _: Any, sums: bool
):
    dropped = [x.new_empty(x.shape)] if seed is not None else []
    return [x.new_empty(x.shape), *dropped, weight.new_empty((1 + bias + sums, *weight.shape))]


@operator(fake=_fake_gradients)
def _norm_backward(
    dy: Tensor,
    ds: Tensor | None,
    x: Tensor,
    weight: Tensor,
    stats: Tensor,
    bias: bool,
    p: float,
    seed: Tensor | None,
    stream: int,
    sums: bool,
) -> list[Tensor]:
    """[dx, drop(dx) where there is a seed, (n, N): dweight, dbias and, if asked for, sums over rows] of a norm of x.

    ds is the gradient of x itself where it was given out too. sums: of drop(dx), or of dx.
    """
    x2, dy2, ds2 = rows(x), rows(dy), rows(ds) if ds is not None else None
    M, N = x2.shape
    resident, constants = _bwd_config(N, stats.shape[0] == 2, ds is not None, sums)
    programs = min(M, num_programs(x.device, resident))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dropped = torch.empty_like(dx) if seed is not None else None
    partial = torch.empty((1 + bias + sums, programs, N), dtype=torch.float32, device=x.device)
    if not M:
        dweight = torch.zeros((partial.shape[0], N), dtype=weight.dtype, device=x.device)
    else:
        rstd, means = stats[0], stats[1] if stats.shape[0] == 2 else None
        key = (x.dtype, dy.dtype, weight.dtype, ds2 is None, bias, seed is None, sums)
        strides = (dy2.stride(0), 0 if ds2 is None else ds2.stride(0), x2.stride(0))
        parts = (partial[0], partial[1] if bias else None, partial[-1] if sums else None)
        tensors = (dy2, ds2, x2, weight, means, rstd, dx, dropped, *parts, seed)
        scalars = (*strides, M, stream, *drop_threshold(p))
        launch(bwd_kernel, (programs, 1, 1), key, tensors, scalars, constants)
        dweight = sum_partials(partial, weight.dtype)
    return [dx, dweight] if dropped is None else [dx, dropped, dweight]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, mean: bool) -> Tensor:
        y, stats = _norm_forward(x, weight, bias, eps, mean)
        ctx.save_for_backward(x, weight, stats)
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        dx, dw = _norm_backward(dy, None, *ctx.saved_tensors, ctx.has_bias, 0.0, None, 0, False)
        return dx, dw[0], dw[1] if ctx.has_bias else None, None, None


def _sums_too(x: Tensor, weight: Tensor, has_bias: bool) -> bool:
    """Whether the backward pass sums dx over rows: where norms have biases, so has the product that made x."""
    return has_bias and x.dtype == weight.dtype and x.shape[-1] <= SUMS_N and not torch.compiler.is_compiling()


class _AddNorm(torch.autograd.Function):
    """A norm that gives what it is the norm of too, so that both gradients of that are summed in the norm's pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, r: Tensor | None, weight: Tensor, bias: Tensor | None, *options: Any) -> Any:
        eps, mean, ctx.p, seed, ctx.stream = options
        if r is None:
            total, (y, stats) = x, _norm_forward(x, weight, bias, eps, mean)
        else:
            y, total, stats = _add_norm_forward(x, r, weight, bias, *options)
        ctx.has_sum = r is not None
        ctx.save_for_backward(total, weight, stats, seed)
        ctx.has_bias = bias is not None
        ctx.set_materialize_grads(False)  # the last norm's sum has no gradient: there is nothing to read
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> Any:
        dy = torch.zeros_like(ds) if dy is None and ds is not None else dy
        total, weight, stats, seed = ctx.saved_tensors
        sums = _sums_too(total, weight, ctx.has_bias)
        dr, *dropped, dw = _norm_backward(dy, ds, total, weight, stats, ctx.has_bias, ctx.p, seed, ctx.stream, sums)
        dx = dropped[0] if dropped else dr
        if sums:
            remember_sums(dx, dw[2])
        dbias = dw[1] if ctx.has_bias else None
        return dx, dr if ctx.has_sum else None, dw[0], dbias, None, None, None, None, None


def _check(x: Tensor, r: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    N = x.shape[-1]  # comparing numbers takes half the time that comparing shapes does
    if weight.ndim != 1 or weight.numel() != N or (bias is not None and (bias.ndim != 1 or bias.numel() != N)):
        given = f"weight has shape {tuple(weight.shape)}" + ("" if bias is None else f", bias {tuple(bias.shape)}")
        raise ValueError(f"{given}; expected {(N,)}")
    if r is not None and (r.shape != x.shape or r.dtype != x.dtype):
        raise ValueError(f"residual is {tuple(r.shape)} {r.dtype}; expected x's {tuple(x.shape)} {x.dtype}")


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, mean: bool) -> Tensor:
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    if _needs_grad(x, weight, bias):
        return _Norm.apply(x, weight, bias, eps, mean)
    if torch.compiler.is_compiling():
        return _norm_forward(x, weight, bias, eps, mean)[0]
    return _forward(x, None, weight, bias, eps, mean=mean, stats=False)[0]


def _add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    p: float,
    seed: Tensor | None,
    stream: int,
    *,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    if _needs_grad(x, residual, weight, bias):
        return _AddNorm.apply(x, residual, weight, bias, eps, mean, p, seed, stream)
    if residual is None:
        return _norm(x, weight, bias, eps, mean=mean), x
    if torch.compiler.is_compiling():
        return _add_norm_forward(x, residual, weight, bias, eps, mean, p, seed, stream)[:2]
    y, total, _ = _forward(x, residual, weight, bias, eps, mean=mean, stats=False, p=p, seed=seed, stream=stream)
    assert total is not None
    return y, total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Layer norm over the last dimension. x: (..., N), any strides; weight, bias: (N,). Returns x's shape and dtype.

    Raises ValueError where weight or bias does not have x's last dimension.
    """
    _check(x, None, weight, bias)
    if not use_triton(x) or x.shape[-1] > MAX_N:
        return layer_norm_ref(x, weight, bias, eps)
    return _norm(x, weight, bias, eps, mean=True)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Root-mean-square norm over the last dimension. x: (..., N), any strides; weight: (N,). Returns x's shape, dtype.

    Raises ValueError where weight does not have x's last dimension.
    """
    _check(x, None, weight, None)
    if not use_triton(x) or x.shape[-1] > MAX_N:
        return rms_norm_ref(x, weight, eps)
    return _norm(x, weight, None, eps, mean=False)


def _check_sum(x: Tensor, residual: Tensor | None, dropout_p: float) -> None:
    if residual is None and dropout_p:
        raise ValueError(f"dropout_p is {dropout_p} and residual is None; expected 0, for there is no sum")


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    training: bool = True,
    *,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    """(layer_norm(s), s) in one pass, s = dropout(x) + residual.

    residual: of x's shape and dtype, any strides; None where x is the sum already: then s is x, and the gradients of
    both are summed in the norm's backward pass. dropout_p, training, seed, stream: as for `dropout`.
    Raises ValueError where the shapes do not fit, or for dropout without a residual.
    """
    if residual is not None:
        x, residual = one_dtype(x, residual)
    _check(x, residual, weight, bias)
    _check_sum(x, residual, dropout_p)
    seed = dropout_seed(seed, dropout_p, training, x.device)
    if not use_triton(x) or x.shape[-1] > MAX_N:
        return add_layer_norm_ref(x, residual, weight, bias, eps, dropout_p, seed, stream)
    return _add_norm(x, residual, weight, bias, eps, dropout_p, seed, stream, mean=True)


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    training: bool = True,
    *,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) in one pass, s = dropout(x) + residual. As add_layer_norm, without a bias."""
    if residual is not None:
        x, residual = one_dtype(x, residual)
    _check(x, residual, weight, None)
    _check_sum(x, residual, dropout_p)
    seed = dropout_seed(seed, dropout_p, training, x.device)
    if not use_triton(x) or x.shape[-1] > MAX_N:
        return add_rms_norm_ref(x, residual, weight, eps, dropout_p, seed, stream)
    return _add_norm(x, residual, weight, None, eps, dropout_p, seed, stream, mean=False)
