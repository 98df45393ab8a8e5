"""Cross-entropy of a linear layer's output, x @ w^T, whose logits are never all in memory.

The equations are cross_entropy's. Rows are taken in chunks: a product gives a chunk's logits, one kernel turns them
into losses and, in place, into their own gradient for a loss gradient of 1, and two products turn that into the chunk's
dx and its share of dw, which is summed in fp32. So forward does backward's work, and backward multiplies by dloss.
Logits are rounded to x's dtype, as a linear layer's are. Work: 6*M*V*C operations in three products, which are the
vendor library's; memory beside inputs and gradients: a chunk of logits, and dw in fp32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedlm.kernels._backend import interpreting, use_triton
from fusedlm.kernels._index_errors import flag_index, index_flag, raise_index_errors
from fusedlm.kernels._launch import launch
from fusedlm.kernels._operator import operator
from fusedlm.kernels._triton import tl, triton
from fusedlm.kernels.cross_entropy import (
    Reduction,
    check_loss,
    cross_entropy_ref,
    reduce_losses,
    row_gradient,
    row_loss,
    row_statistics,
    statistics_config,
)


def linear_cross_entropy_ref(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    return cross_entropy_ref(F.linear(input, weight), target, ignore_index, reduction, label_smoothing, z_loss)


@triton.jit
def _count_kernel(t_ptr, count_ptr, M, ignore, BLOCK_M: tl.constexpr):
    at = tl.arange(0, BLOCK_M)
    count = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, M, BLOCK_M):
        count += (tl.load(t_ptr + start + at, mask=start + at < M, other=ignore) != ignore).to(tl.float32)
    tl.store(count_ptr, tl.sum(count, 0))


@triton.jit
def _loss_kernel(
    x_ptr,
    t_ptr,
    loss_ptr,
    count_ptr,
    flag_ptr,
    V,
    ignore,
    smoothing,
    z,
    SUM: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A row's loss; its logits become their own gradient. The second reading finds the row in the L2 cache."""
    row = tl.cast(tl.program_id(0), tl.int64)
    t = tl.load(t_ptr + row)
    x_ptr += row * V
    lse, plain = row_statistics(x_ptr, V, SUM, BLOCK_K, BLOCK_V)
    valid = t != ignore
    flag_index(flag_ptr, valid & ((t < 0) | (t >= V)), t, V)
    tl.store(loss_ptr + row, row_loss(x_ptr, t, lse, plain, valid, V, smoothing, z))
    if GRADIENT:
        g = tl.where((t >= 0) & (t < V), 1.0, float("nan"))
        if count_ptr is not None:
            g /= tl.load(count_ptr)
        for start in range(0, V, BLOCK_K * BLOCK_V):
            cols = start + tl.arange(0, BLOCK_K * BLOCK_V)
            mask = cols < V
            x = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            dx = tl.where(valid, row_gradient(x, cols, t, lse, g, V, smoothing, z), 0.0)
            tl.store(x_ptr + cols, dx.to(x_ptr.dtype.element_ty), mask=mask)


def _chunk_rows(V: int, dtype: torch.dtype) -> int:
    """Rows a chunk: products need 2,048 or more to run at full speed; more only where they take little memory."""
    return 5 if interpreting() else max(2048, min(2**28 // (V * dtype.itemsize), 8192) // 256 * 256)


def _product_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """out = a @ b, or out += a @ b. out is fp32; a and b may be narrower, and their products are summed in fp32."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=int(add), out=out)
    elif out.is_cuda:
        if add:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # the interpreter's
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=int(add), out=out)


@operator(
    fake=lambda x, w, target, ignore_index, mean, label_smoothing, z_loss, need_dx, need_dw: (
        x.new_empty((), dtype=torch.float32),
        x.new_empty(x.shape if need_dx else (0,)),
        w.new_empty(w.shape if need_dw else (0,)),
    )
)
def _linear_cross_entropy(
    x: Tensor,
    w: Tensor,
    target: Tensor,
    ignore_index: int,
    mean: bool,
    label_smoothing: float,
    z_loss: float,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dx, dw), the gradients for a loss gradient of 1, empty where not needed. x: (M, C), w: (V, C)."""
    (M, C), V = x.shape, w.shape[0]
    target = target.contiguous()
    device = x.device
    dx = torch.empty((M, C) if need_dx else (0,), dtype=x.dtype, device=device)
    dw = (torch.empty if M else torch.zeros)((V, C) if need_dw else (0,), dtype=torch.float32, device=device)
    losses = torch.empty(M, dtype=torch.float32, device=device)
    count = torch.empty((), dtype=torch.float32, device=device)
    block = 64 if interpreting() else 4096
    raise_index_errors()
    if mean:
        launch(_count_kernel, (1, 1, 1), None, (target, count), (M, ignore_index), {"BLOCK_M": block, "num_warps": 8})
    chunk = min(_chunk_rows(V, x.dtype), M)
    buffer = torch.empty((chunk, V), dtype=x.dtype, device=device)
    constants = {"SUM": label_smoothing != 0, "GRADIENT": need_dx or need_dw, **statistics_config()}
    for start in range(0, M, max(chunk, 1)):
        end = min(start + chunk, M)
        part, logits = x[start:end], buffer[: end - start]
        torch.mm(part, w.t(), out=logits)
        tensors = (logits, target[start:end], losses[start:end], count if mean else None, index_flag(device))
        scalars = (V, ignore_index, label_smoothing, z_loss)
        launch(_loss_kernel, (end - start, 1, 1), (x.dtype, mean), tensors, scalars, constants)
        if need_dx:
            torch.mm(logits, w, out=dx[start:end])
        if need_dw:
            _product_into(dw, logits.t(), part, add=start > 0)
    loss, _ = reduce_losses(losses, target, ignore_index, mean=mean)
    return loss, dx, dw.to(w.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, target: Tensor, *options: Any) -> Tensor:
        need = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        loss, dx, dw = _linear_cross_entropy(x, w, target, *options, *need)
        ctx.save_for_backward(dx, dw)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> Any:
        dx, dw = ctx.saved_tensors
        gradients = [g * dloss if needed else None for g, needed in zip((dx, dw), ctx.needs_input_grad, strict=False)]
        return *gradients, None, None, None, None, None


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """cross_entropy(linear(input, weight), target, ...) without the logits in memory.

    input: (..., C). weight: (V, C), of input's dtype. target: (...) int64. reduction: "mean" or "sum". Other arguments
    and the returned fp32 scalar as for cross_entropy. The gradients are computed with the loss, so calling it with
    gradients enabled costs what a forward and a backward pass do. Raises ValueError for what does not fit.
    """
    if weight.ndim != 2 or weight.shape[1] != input.shape[-1] or weight.dtype != input.dtype:
        raise ValueError(
            f"weight is {tuple(weight.shape)} {weight.dtype}; expected (V, {input.shape[-1]}) {input.dtype}"
        )
    if reduction == "none":
        raise ValueError("reduction is 'none'; expected 'mean' or 'sum', for the gradients are summed over rows")
    check_loss(input, target, weight.shape[0], ignore_index, reduction, label_smoothing, z_loss)
    if not use_triton(input):
        return linear_cross_entropy_ref(input, weight, target, ignore_index, reduction, label_smoothing, z_loss)
    x, t = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    options = (ignore_index, reduction == "mean", label_smoothing, z_loss)
    if torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(x, weight, t, *options)
    return _linear_cross_entropy(x, weight, t, *options, False, False)[0]
