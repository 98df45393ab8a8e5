"""Cross-entropy of a linear layer's output, x @ w^T, whose logits are never all in memory.

The equations are cross_entropy's. Rows are taken in chunks: a product gives a chunk's logits, one kernel turns them
into losses and, in place, into the gradient of their sum, and two products turn that into the chunk's dx and its share
of dw, which is summed in fp32. So forward does backward's work, and backward multiplies by dloss (over the count).
Logits are rounded to x's dtype, as a linear layer's are. Work: 6*M*V*C operations in three products, which are the
vendor library's; memory beside inputs and gradients: a chunk of logits, and dw in fp32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedlm.kernels._autocast import autocast, autocasts
from fusedlm.kernels._backend import interpreting, use_triton
from fusedlm.kernels._index_errors import raise_index_errors
from fusedlm.kernels._launch import elementwise_config, launch
from fusedlm.kernels._operator import operator
from fusedlm.kernels._tied import TiedGradient
from fusedlm.kernels._triton import tl, triton
from fusedlm.kernels.cross_entropy import Reduction, check_loss, cross_entropy_ref, reduce_losses
from fusedlm.kernels.linear_cross_entropy.launches import losses_in_place


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


def _chunk_rows(V: int, dtype: torch.dtype) -> int:
    """Rows a chunk: 4,096 keep the products at full speed; fewer where their logits would take more than 1 GiB."""
    return 5 if interpreting() else max(1024, min(2**30 // (V * dtype.itemsize), 4096) // 1024 * 1024)


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
        x.new_empty((), dtype=torch.float32),
        x.new_empty(x.shape if need_dx else (0,)),
        w.new_empty(w.shape if need_dw else (0,), dtype=torch.float32),
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, rows that count, dx, dw), the gradients of the sum of losses, empty where not needed; dw is fp32.

    Of the sum and not of the mean, so that narrow dtypes keep its digits. x: (M, C), w: (V, C).
    """
    dx = torch.empty(x.shape if need_dx else (0,), dtype=x.dtype, device=x.device)
    return _in_chunks(x, w, target, dx, ignore_index, mean, label_smoothing, z_loss, need_dx, need_dw)


def _in_chunks(
    x: Tensor,
    w: Tensor,
    target: Tensor,
    dx: Tensor,
    ignore_index: int,
    mean: bool,
    label_smoothing: float,
    z_loss: float,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx: where it goes, which may be x's own memory: a chunk of x is read for the last time before it is written."""
    (M, C), V = x.shape, w.shape[0]
    target = target.contiguous()
    device = x.device
    dw = (torch.empty if M else torch.zeros)((V, C) if need_dw else (0,), dtype=torch.float32, device=device)
    losses = torch.empty(M, dtype=torch.float32, device=device)
    raise_index_errors()
    chunk = _chunk_rows(V, x.dtype)
    buffer = torch.empty((min(chunk, M), V), dtype=x.dtype, device=device)
    for start in range(0, M, chunk):
        part = x[start : start + chunk]
        logits = buffer[: part.shape[0]]
        torch.mm(part, w.t(), out=logits)
        rows = (logits, target[start : start + chunk], losses[start : start + chunk])
        losses_in_place(*rows, ignore_index, label_smoothing, z_loss, gradient=need_dx or need_dw)
        if need_dw:
            _product_into(dw, logits.t(), part, add=start > 0)
        if need_dx:
            torch.mm(logits, w, out=dx[start : start + chunk])
    loss, count = reduce_losses(losses, target, ignore_index, mean=mean)
    return loss, count, dx, dw


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, target: Tensor, tied: TiedGradient | None, reuse_input: bool, *options: Any
    ) -> Tensor:
        ctx.tied = tied
        need = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        if reuse_input and need[0] and x.is_contiguous():
            dx = x.data  # as a tensor that autograd has not seen
            loss, count, dx, dw = _in_chunks(dx, w, target, dx, *options, *need)  # type: ignore[call-arg]
        else:
            loss, count, dx, dw = _linear_cross_entropy(x, w, target, *options, *need)
        ctx.save_for_backward(dx, dw, count)
        ctx.mean = options[1]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> Any:
        dx, dw, count = ctx.saved_tensors
        scale = dloss / count.clamp(min=1) if ctx.mean else dloss
        need_dx, need_dw, *_ = ctx.needs_input_grad
        dx, dw = (_scaled(t, scale, dx.dtype) if need else None for t, need in ((dx, need_dx), (dw, need_dw)))
        if ctx.tied is not None and dw is not None:
            ctx.tied.leave(dw)
            dw = None
        return dx, dw, *[None] * 7


@triton.jit
def _scale_kernel(t_ptr, factor_ptr, y_ptr, N, BLOCK_N: tl.constexpr):
    cols = tl.cast(tl.program_id(0), tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.load(t_ptr + cols, mask=cols < N, other=0.0).to(tl.float32) * tl.load(factor_ptr)
    tl.store(y_ptr + cols, t.to(y_ptr.dtype.element_ty), mask=cols < N)


@operator(fake=lambda t, factor, dtype: t.new_empty(t.shape, dtype=dtype))
def _scaled(t: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """t * factor, an fp32 scalar on the device, rounded once to dtype; torch's takes thrice as long."""
    y = torch.empty_like(t, dtype=dtype)
    if t.numel():
        config, grid = elementwise_config(1, t.numel())
        launch(_scale_kernel, grid, (t.dtype, dtype), (t, factor, y), (t.numel(),), config)
    return y


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    *,
    tied: TiedGradient | None = None,
    reuse_input: bool = False,
) -> Tensor:
    """cross_entropy(linear(input, weight), target, ...) without the logits in memory.

    input: (..., C). weight: (V, C), of input's dtype. target: (...) int64. reduction: "mean" or "sum". Other arguments
    and the returned fp32 scalar as for cross_entropy. The gradients are computed with the loss, so calling it with
    gradients enabled costs what a forward and a backward pass do.
    tied: where weight is the table that `embedding` has, and input depends on what that gave; see `TiedGradient`.
    reuse_input: input's memory may take its gradient, where nobody else needs its values after this.
    Raises ValueError for what does not fit.
    """
    if autocasts(input):
        input, weight = autocast(input, weight)
        tied = None  # what the embedding has is the weight in its own dtype
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
        if torch.compiler.is_compiling():
            tied, reuse_input = None, False
        return _LinearCrossEntropy.apply(x, weight, t, tied, reuse_input, *options)
    return _linear_cross_entropy(x, weight, t, *options, False, False)[0]
