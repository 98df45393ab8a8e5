"""LayerNorm (Ba et al. 2016) and RMSNorm (Zhang and Sennrich 2019) over the last dimension, alone or behind a sum.

    LayerNorm  y = (x - mean(x)) * rstd * w + b,  rstd = 1 / sqrt(var(x) + eps)
    RMSNorm    y = x * rstd * w,                  rstd = 1 / sqrt(mean(x^2) + eps)
Backward, xh the normalised x and g = dy * w:
    dx = rstd * (g - mean(g) - xh * mean(g * xh))   (RMSNorm: without mean(g)),  dw = sum(dy * xh),  db = sum(dy)
Behind a sum, x = a + r: both x and y are given, and the gradient of x joins dx.
Numerics: loads are widened to fp32, every sum is fp32, one rounding at each store (where x is stored, y is that of the
rounded x). Traffic: forward 2*M*N elements, backward 3*M*N; behind a sum 4*M*N and 4*M*N.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedlm.kernels._backend import use_triton
from fusedlm.kernels._launch import launch, num_programs, rows
from fusedlm.kernels._triton import tl, triton

MAX_N = 65536  # a row is one program's


def layer_norm_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def add_layer_norm_ref(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return layer_norm_ref(total, weight, bias, eps), total


def add_rms_norm_ref(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm_ref(total, weight, eps), total


@triton.jit
def _fwd_kernel(
    x_ptr,
    r_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    x_stride,
    r_stride,
    M,
    eps,
    N: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_SUM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.cast(tl.program_id(0), tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < N
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
    if HAS_SUM:
        r = tl.load(r_ptr + row * r_stride + cols, mask=mask, other=0.0)
        x = (x.to(tl.float32) + r.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * N + cols, x, mask=mask)
    x = x.to(tl.float32)
    w = tl.load(w_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_MEAN:
        mean = tl.sum(x, 0) / N
        x = tl.where(mask, x - mean, 0.0)
        if mean_ptr is not None:
            tl.store(mean_ptr + row, mean)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / N + eps)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd)
    y = x * rstd * w
    if b_ptr is not None:
        y += tl.load(b_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * N + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd_kernel(
    dy_ptr,
    ds_ptr,
    x_ptr,
    w_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dw_ptr,
    db_ptr,
    dy_stride,
    ds_stride,
    x_stride,
    M,
    N: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < N
    w = tl.load(w_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK_N,), tl.float32)
    if db_ptr is not None:
        db = tl.zeros((BLOCK_N,), tl.float32)
    for i in range(pid, M, tl.num_programs(0)):
        row = tl.cast(i, tl.int64)
        dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        if HAS_MEAN:
            x = tl.where(mask, x - tl.load(mean_ptr + row), 0.0)
        xh = x * rstd
        g = dy * w
        dx = g - xh * (tl.sum(g * xh, 0) / N)
        if HAS_MEAN:
            dx -= tl.sum(g, 0) / N
        dx *= rstd
        if ds_ptr is not None:
            dx += tl.load(ds_ptr + row * ds_stride + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * N + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dw += dy * xh
        if db_ptr is not None:
            db += dy
    # A row of partial sums a program, added up in a fixed order by a second kernel: no atomics.
    partial = tl.cast(pid, tl.int64) * N
    tl.store(dw_ptr + partial + cols, dw, mask=mask)
    if db_ptr is not None:
        tl.store(db_ptr + partial + cols, db, mask=mask)


@triton.jit
def _sum_rows_kernel(p_ptr, out_ptr, P, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    # Program (i, j) adds up BLOCK_N columns of the j-th (P, N) table.
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < N
    p_ptr += tl.cast(tl.program_id(1), tl.int64) * P * N
    out_ptr += tl.program_id(1) * N
    total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, P, BLOCK_P):
        lines = start + tl.arange(0, BLOCK_P)
        at = lines[:, None].to(tl.int64) * N + cols[None, :]
        total += tl.load(p_ptr + at, mask=(lines < P)[:, None] & mask[None, :], other=0.0)
    tl.store(out_ptr + cols, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=mask)


@functools.cache
def _fwd_config(N: int, has_mean: bool, has_sum: bool) -> dict[str, Any]:
    block = triton.next_power_of_2(N)
    warps = min(max(block // 512, 1), 32)
    return {"N": N, "HAS_MEAN": has_mean, "HAS_SUM": has_sum, "BLOCK_N": block, "num_warps": warps}


@functools.cache
def _bwd_config(N: int, has_mean: bool) -> dict[str, Any]:
    block = triton.next_power_of_2(N)
    warps = min(max(block // 512, 1), 16 if block <= 8192 else 32)
    return {"N": N, "HAS_MEAN": has_mean, "BLOCK_N": block, "num_warps": warps}


def _bwd_programs(M: int, N: int, device: torch.device) -> int:
    """As many as are resident at once: more rows of partial sums would cost traffic, fewer leave the memory idle."""
    per_sm = min(max(8192 // triton.next_power_of_2(N), 1), 8)
    return min(M, num_programs(device, per_sm))


def _sum_config(P: int) -> dict[str, int]:
    """Tiles of 1,024 numbers: at full size 64 rows of 64 bytes, so that there are many programs."""
    block = min(triton.next_power_of_2(P), 64)
    return {"BLOCK_P": block, "BLOCK_N": 1024 // block, "num_warps": 4}


def _forward(
    x: Tensor, r: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, *, mean: bool, stats: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(y, the normalised input, mean, rstd): the input is x, or x + r where r is given; stats None unless asked for."""
    x2 = rows(x)
    M, N = x2.shape
    r2 = rows(r) if r is not None else None
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty((M, N), dtype=x.dtype, device=x.device) if r2 is not None else None
    means = torch.empty(M, dtype=torch.float32, device=x.device) if mean and stats else None
    rstd = torch.empty(M, dtype=torch.float32, device=x.device) if stats else None
    if M:
        key = (x.dtype, weight.dtype, None if bias is None else bias.dtype, stats)
        scalars = (x2.stride(0), 0 if r2 is None else r2.stride(0), M, eps)
        tensors = (x2, r2, weight, bias, y, total, means, rstd)
        launch(_fwd_kernel, (M, 1, 1), key, tensors, scalars, _fwd_config(N, mean, r2 is not None))
    return y, x2 if total is None else total, means, rstd


def _backward(
    dy: Tensor, ds: Tensor | None, x2: Tensor, weight: Tensor, means: Tensor | None, rstd: Tensor, *, bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dx, dweight, dbias) of a norm of x2, (M, N); ds is the gradient of x2 itself where it was given out too."""
    M, N = x2.shape
    dy2, ds2 = rows(dy), rows(ds) if ds is not None else None
    programs = _bwd_programs(M, N, x2.device)
    dx = torch.empty((M, N), dtype=x2.dtype, device=x2.device)
    partial = torch.empty((2 if bias else 1, programs, N), dtype=torch.float32, device=x2.device)
    sums = torch.zeros if not M else torch.empty
    dweight = sums((partial.shape[0], N), dtype=weight.dtype, device=x2.device)
    if M:
        key = (x2.dtype, dy.dtype, weight.dtype, ds2 is None, bias)
        strides = (dy2.stride(0), 0 if ds2 is None else ds2.stride(0), x2.stride(0))
        tensors = (dy2, ds2, x2, weight, means, rstd, dx, partial[0], partial[1] if bias else None)
        launch(_bwd_kernel, (programs, 1, 1), key, tensors, (*strides, M), _bwd_config(N, means is not None))
        config = {"N": N, **_sum_config(programs)}
        grid = (triton.cdiv(N, config["BLOCK_N"]), partial.shape[0], 1)
        launch(_sum_rows_kernel, grid, weight.dtype, (partial, dweight), (programs,), config)
    return dx.view(dy.shape), dweight[0], dweight[1] if bias else None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, mean: bool) -> Tensor:
        weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
        y, x2, means, rstd = _forward(x, None, weight, bias, eps, mean=mean, stats=True)
        ctx.save_for_backward(x2, weight, means, rstd)
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x2, weight, means, rstd = ctx.saved_tensors
        return *_backward(dy, None, x2, weight, means, rstd, bias=ctx.has_bias), None, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, r: Tensor, weight: Tensor, bias: Tensor | None, eps: float, mean: bool) -> Any:
        weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
        y, total, means, rstd = _forward(x, r, weight, bias, eps, mean=mean, stats=True)
        ctx.save_for_backward(total, weight, means, rstd)
        ctx.has_bias = bias is not None
        return y, total.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, ds: Tensor) -> Any:
        total, weight, means, rstd = ctx.saved_tensors
        dx, dw, db = _backward(dy, ds, total, weight, means, rstd, bias=ctx.has_bias)
        return dx, dx, dw, db, None, None


# Under torch.compile the norm is one opaque operator with a backward of its own: no graph breaks, and the compiler need
# not find out by itself what a Triton kernel writes.
@torch.library.custom_op("fusedlm::norm", mutates_args=())
def _norm_op(
    x: Tensor, r: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, mean: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, x + r, mean, rstd; x + r and mean are empty where there is no r and no mean."""
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    y, total, means, rstd = _forward(x, r, weight, bias, eps, mean=mean, stats=True)
    assert rstd is not None
    return y, x.new_empty(0) if r is None else total.view(x.shape), rstd.new_empty(0) if means is None else means, rstd


@_norm_op.register_fake
def _(x: Tensor, r: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, mean: bool) -> Any:
    M = x.numel() // max(x.shape[-1], 1)
    stats = x.new_empty(M, dtype=torch.float32)
    total = x.new_empty(0) if r is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), total, torch.empty_like(stats) if mean else stats.new_empty(0), stats


@torch.library.custom_op("fusedlm::norm_backward", mutates_args=())
def _norm_backward_op(
    dy: Tensor, ds: Tensor | None, x: Tensor, weight: Tensor, means: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias; dbias is empty where there is no bias."""
    mean = means if means.numel() else None
    dx, dw, db = _backward(dy, ds, rows(x), weight.contiguous(), mean, rstd, bias=has_bias)
    return dx, dw.clone(), weight.new_empty(0) if db is None else db.clone()


@_norm_backward_op.register_fake
def _(dy: Tensor, ds: Tensor | None, x: Tensor, weight: Tensor, means: Any, rstd: Any, has_bias: bool) -> Any:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape if has_bias else 0)


def _norm_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, r, weight, bias, _, _ = inputs
    _, total, means, rstd = output
    ctx.save_for_backward(x if r is None else total, weight, means, rstd)
    ctx.has_residual, ctx.has_bias = r is not None, bias is not None


def _norm_backward(ctx: Any, dy: Tensor, ds: Tensor, *_: Any) -> Any:
    x, weight, means, rstd = ctx.saved_tensors
    ds_or_none = ds if ctx.has_residual else None
    dx, dw, db = torch.ops.fusedlm.norm_backward(dy, ds_or_none, x, weight, means, rstd, ctx.has_bias)
    return dx, dx.clone() if ctx.has_residual else None, dw, db if ctx.has_bias else None, None, None


_norm_op.register_autograd(_norm_backward, setup_context=_norm_setup)


def _check(x: Tensor, r: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and p.shape != x.shape[-1:]:
            raise ValueError(f"{name} has shape {tuple(p.shape)}, expected {tuple(x.shape[-1:])}")
    if r is not None and (r.shape != x.shape or r.dtype != x.dtype):
        raise ValueError(f"residual is {tuple(r.shape)} {r.dtype}; expected x's {tuple(x.shape)} {x.dtype}")


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, mean: bool) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.ops.fusedlm.norm(x, None, weight, bias, eps, mean)[0]
    if _needs_grad(x, weight, bias):
        return _Norm.apply(x, weight, bias, eps, mean)
    return _forward(x, None, weight, bias, eps, mean=mean, stats=False)[0]


def _add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, mean: bool
) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        return torch.ops.fusedlm.norm(x, residual, weight, bias, eps, mean)[:2]
    if _needs_grad(x, residual, weight, bias):
        return _AddNorm.apply(x, residual, weight, bias, eps, mean)
    y, total, _, _ = _forward(x, residual, weight, bias, eps, mean=mean, stats=False)
    return y, total.view(x.shape)


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


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual) in one pass. residual: of x's shape and dtype, any strides.

    Raises ValueError where the shapes do not fit.
    """
    _check(x, residual, weight, bias)
    if not use_triton(x) or x.shape[-1] > MAX_N:
        return add_layer_norm_ref(x, residual, weight, bias, eps)
    return _add_norm(x, residual, weight, bias, eps, mean=True)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual) in one pass. residual: of x's shape and dtype, any strides.

    Raises ValueError where the shapes do not fit.
    """
    _check(x, residual, weight, None)
    if not use_triton(x) or x.shape[-1] > MAX_N:
        return add_rms_norm_ref(x, residual, weight, eps)
    return _add_norm(x, residual, weight, None, eps, mean=False)
