"""Cross-entropy of logits x, (M, V), and targets t, with label smoothing e and a z-loss z (Chowdhery et al. 2022).

    l = logsumexp(x),  loss = l - (1 - e) * x[t] - e * mean(x) + z * l^2
Backward, p = exp(x - l):  dx = dloss * (p * (1 + 2 * z * l) - (1 - e) * [j = t] - e / V)
Forward reads each row once, its maximum and sum together (Milakov and Gimelshein 2018), and keeps l for backward.
Numerics: loads are widened to fp32, the loss is fp32. Traffic: forward M*V elements, backward 2*M*V.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedlm.kernels._backend import interpreting, use_triton
from fusedlm.kernels._index_errors import check_indices, flag_index, index_flag, raise_index_errors
from fusedlm.kernels._launch import launch, rows
from fusedlm.kernels._operator import operator
from fusedlm.kernels._triton import tl, triton

Reduction = Literal["mean", "sum", "none"]


def cross_entropy_ref(
    input: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    x = input.reshape(-1, input.shape[-1]).to(torch.promote_types(input.dtype, torch.float32))
    t = target.reshape(-1)
    loss = F.cross_entropy(x, t, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
    kept = t != ignore_index
    if z_loss:
        loss = loss + z_loss * torch.where(kept, x.logsumexp(-1).square(), 0.0)
    if reduction == "none":
        return loss.view(target.shape)
    return loss.sum() / kept.sum() if reduction == "mean" else loss.sum()


@triton.jit
def add_block(x, m, total):
    """The maximum and sum of exponentials of each lane, with a block (BLOCK_K, BLOCK_V) of numbers added."""
    larger = tl.maximum(m, tl.max(x, 0))
    # A lane that has seen nothing but -inf: its sum is 0, and -inf - -inf must not make it NaN.
    known = tl.where(larger == float("-inf"), 0.0, larger) * 1.4426950408889634
    total = total * tl.exp2(m * 1.4426950408889634 - known)
    return larger, total + tl.sum(tl.exp2(x * 1.4426950408889634 - known[None, :]), 0)


@triton.jit
def reduce_lanes(m, total):
    """The maximum and sum of exponentials of all lanes together."""
    top = tl.max(m, 0)
    known = tl.where(top == float("-inf"), 0.0, top)
    return top, tl.sum(total * tl.exp2((m - known) * 1.4426950408889634), 0)


@triton.jit
def row_statistics(x_ptr, V, SUM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """(logsumexp of a row, its sum where SUM). A maximum and a sum for each lane, which has BLOCK_K numbers at a time,
    so that rescaling costs one exponential for so many numbers; lanes are put together at the end."""
    cols = tl.arange(0, BLOCK_K)[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    m = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    plain = tl.zeros((BLOCK_V,), tl.float32)
    whole = V // (BLOCK_K * BLOCK_V) * (BLOCK_K * BLOCK_V)
    for start in range(0, whole, BLOCK_K * BLOCK_V):  # no masks here: they cost as much as the arithmetic
        x = tl.load(x_ptr + start + cols).to(tl.float32)
        if SUM:
            plain += tl.sum(x, 0)
        m, total = add_block(x, m, total)
    if whole < V:
        inside = whole + cols < V
        x = tl.load(x_ptr + whole + cols, mask=inside, other=float("-inf")).to(tl.float32)
        if SUM:
            plain += tl.sum(tl.where(inside, x, 0.0), 0)
        m, total = add_block(x, m, total)
    top, total = reduce_lanes(m, total)
    return top + tl.log2(total) * 0.6931471805599453, tl.sum(plain, 0)


@triton.jit
def target_logit(x_ptr, t, V):
    """The logit of a row's target; where that is out of range, another."""
    return tl.load(x_ptr + tl.where((t >= 0) & (t < V), t, 0)).to(tl.float32)


@triton.jit
def row_loss(x_t, t, lse, plain, valid, V, smoothing, z):
    """The loss of a row; 0 where it is ignored, NaN where its target is out of range."""
    loss = lse - (1.0 - smoothing) * x_t - smoothing * (plain / V) + z * lse * lse
    loss = tl.where((t >= 0) & (t < V), loss, float("nan"))
    return tl.where(valid, loss, 0.0)


@triton.jit
def gradient_factors(t, lse, g, V, smoothing, z):
    """(a, b, c): dx = a * p - b, less c at the target. g is the gradient of the row's loss."""
    return g * (1.0 + 2.0 * z * lse), g * smoothing / V, tl.where((t >= 0) & (t < V), g * (1.0 - smoothing), 0.0)


@triton.jit
def probabilities(x, lse):
    return tl.exp2((x - lse) * 1.4426950408889634)


@triton.jit
def _fwd_kernel(
    x_ptr,
    t_ptr,
    loss_ptr,
    lse_ptr,
    flag_ptr,
    x_stride,
    V,
    ignore,
    smoothing,
    z,
    SUM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.cast(tl.program_id(0), tl.int64)
    t = tl.load(t_ptr + row)
    x_ptr += row * x_stride
    lse, plain = row_statistics(x_ptr, V, SUM, BLOCK_K, BLOCK_V)
    valid = t != ignore
    flag_index(flag_ptr, valid & ((t < 0) | (t >= V)), t, V)
    tl.store(lse_ptr + row, lse)
    tl.store(loss_ptr + row, row_loss(target_logit(x_ptr, t, V), t, lse, plain, valid, V, smoothing, z))


@triton.jit
def _bwd_kernel(
    dloss_ptr,
    count_ptr,
    x_ptr,
    t_ptr,
    lse_ptr,
    dx_ptr,
    dloss_stride,
    x_stride,
    V,
    ignore,
    smoothing,
    z,
    BLOCK_V: tl.constexpr,
):
    blocks = tl.cdiv(V, BLOCK_V)
    row = tl.cast(tl.program_id(0) // blocks, tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = cols < V
    t = tl.load(t_ptr + row)
    g = tl.load(dloss_ptr + row * dloss_stride).to(tl.float32)
    if count_ptr is not None:
        g /= tl.load(count_ptr)
    g = tl.where(t == ignore, 0.0, tl.where((t >= 0) & (t < V), g, float("nan")))
    lse = tl.load(lse_ptr + row)
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    a, b, c = gradient_factors(t, lse, g, V, smoothing, z)
    dx = a * probabilities(x, lse) - b - tl.where(cols == t, c, 0.0)
    tl.store(dx_ptr + row * V + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _reduce_kernel(loss_ptr, t_ptr, out_ptr, count_ptr, M, ignore, MEAN: tl.constexpr, BLOCK_M: tl.constexpr):
    """The sum of all losses, or their mean over the rows that count, by one program: the same order every time."""
    at = tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M,), tl.float32)
    count = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, M, BLOCK_M):
        mask = start + at < M
        total += tl.load(loss_ptr + start + at, mask=mask, other=0.0)
        count += (tl.load(t_ptr + start + at, mask=mask, other=ignore) != ignore).to(tl.float32)
    kept = tl.sum(count, 0)
    tl.store(count_ptr, kept)
    if MEAN:
        tl.store(out_ptr, tl.sum(total, 0) / kept)
    else:
        tl.store(out_ptr, tl.sum(total, 0))


def statistics_config() -> dict[str, int]:
    """Of kernels that go through a row of the vocabulary: 8 lanes a thread, 4 numbers a lane."""
    if interpreting():
        return {"BLOCK_K": 2, "BLOCK_V": 32, "num_warps": 4}
    return {"BLOCK_K": 4, "BLOCK_V": 1024, "num_warps": 4}


def reduce_losses(losses: Tensor, target: Tensor, ignore_index: int, *, mean: bool) -> tuple[Tensor, Tensor]:
    """(sum or mean, how many rows count), both fp32 scalars on the device. losses: (M,) fp32, target: (M,) int64."""
    out, count = (torch.empty((), dtype=torch.float32, device=losses.device) for _ in range(2))
    constants = {"MEAN": mean, "BLOCK_M": 64 if interpreting() else 4096, "num_warps": 8}
    scalars = (losses.numel(), ignore_index)
    launch(_reduce_kernel, (1, 1, 1), None, (losses, target, out, count), scalars, constants)
    return out, count


def _empty_losses(x: Tensor, target: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    M = target.numel()
    losses = torch.empty(M if reduction == "none" else (), dtype=torch.float32, device=x.device)
    return losses, torch.empty(M, dtype=torch.float32, device=x.device), losses.new_empty(())


@operator(fake=lambda x, target, ignore_index, reduction, label_smoothing, z_loss: _empty_losses(x, target, reduction))
def _cross_entropy(
    x: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, logsumexp of each row, how many rows count). x: (M, V), target: (M,)."""
    x = rows(x)
    M, V = x.shape
    losses, lse = (torch.empty(M, dtype=torch.float32, device=x.device) for _ in range(2))
    target = target.contiguous()
    raise_index_errors()
    if M:
        scalars = (x.stride(0), V, ignore_index, label_smoothing, z_loss)
        constants = {"SUM": label_smoothing != 0, **statistics_config()}
        launch(_fwd_kernel, (M, 1, 1), x.dtype, (x, target, losses, lse, index_flag(x.device)), scalars, constants)
    if reduction == "none":
        return losses, lse, torch.empty((), dtype=torch.float32, device=x.device)
    out, count = reduce_losses(losses, target, ignore_index, mean=reduction == "mean")
    return out, lse, count


@operator(fake=lambda dloss, count, x, *_: torch.empty_like(x, memory_format=torch.contiguous_format))
def _cross_entropy_backward(
    dloss: Tensor,
    count: Tensor | None,
    x: Tensor,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """dx. dloss: (M,) or (). count: what a mean was divided by."""
    x2 = rows(x)
    M, V = x2.shape
    dx = torch.empty((M, V), dtype=x.dtype, device=x.device)
    if M:
        block = 64 if interpreting() else 2048
        stride = dloss.stride(0) if dloss.ndim else 0
        scalars = (stride, x2.stride(0), V, ignore_index, label_smoothing, z_loss)
        tensors = (dloss, count, x2, target.contiguous(), lse, dx)
        key = (x.dtype, count is None)
        grid = (M * triton.cdiv(V, block), 1, 1)
        launch(_bwd_kernel, grid, key, tensors, scalars, {"BLOCK_V": block, "num_warps": 4})
    return dx


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, *options: Any) -> Tensor:
        loss, lse, count = _cross_entropy(x, target, *options)
        ctx.save_for_backward(x, target, lse, count)
        ctx.ignore_index, ctx.reduction, ctx.label_smoothing, ctx.z_loss = options
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> Any:
        x, target, lse, count = ctx.saved_tensors
        divide = count if ctx.reduction == "mean" else None
        options = (ctx.ignore_index, ctx.label_smoothing, ctx.z_loss)
        return _cross_entropy_backward(dloss, divide, x, target, lse, *options), None, None, None, None, None


def check_loss(
    input: Tensor, target: Tensor, V: int, ignore_index: int, reduction: str, label_smoothing: float, z_loss: float
) -> None:
    """Raises ValueError for what a cross-entropy cannot take."""
    if target.shape != input.shape[:-1] or target.dtype != torch.int64:
        raise ValueError(
            f"target is {tuple(target.shape)} {target.dtype}; expected int64 of shape {tuple(input.shape[:-1])}"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; expected 'mean', 'sum' or 'none'")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected 0 to 1")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss is {z_loss}; expected 0 or more")
    check_indices("targets", target, V, ignore_index)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Cross-entropy of logits over the last dimension.

    input: (..., V), any strides. target: (...) int64, each in [0, V) or ignore_index, whose rows count for nothing.
    label_smoothing: the share of probability spread over all classes (Szegedy et al. 2016). z_loss: the factor of the
    squared logsumexp. Returns fp32 (fp64 for fp64): a scalar, or (...) where reduction is "none". The mean of
    no rows is NaN. Raises ValueError for what does not fit; targets out of range raise on a CPU at once, on a GPU they
    give NaN and raise at a later call (`raise_index_errors`).
    """
    check_loss(input, target, input.shape[-1], ignore_index, reduction, label_smoothing, z_loss)
    options = (ignore_index, reduction, label_smoothing, z_loss)
    if not use_triton(input):
        return cross_entropy_ref(input, target, *options)
    x, t = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    needs_grad = torch.is_grad_enabled() and input.requires_grad
    loss = _CrossEntropy.apply(x, t, *options) if needs_grad else _cross_entropy(x, t, *options)[0]
    return loss.view(target.shape) if reduction == "none" else loss
