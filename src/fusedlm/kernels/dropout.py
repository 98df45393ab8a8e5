"""Dropout (Srivastava et al. 2014): y = x * keep / (1 - p), keep = 0 with probability p.

Backward: dx = dy * keep / (1 - p), by the same kernel: the mask is computed anew from a seed (see _philox.py).
p is rounded to a multiple of 1/65,536, and the factor is that of the rounded p, so the mean is kept exactly.
Traffic: forward and backward 2 elements each; no mask is stored.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedlm.kernels._backend import interpreting, use_triton
from fusedlm.kernels._launch import launch
from fusedlm.kernels._operator import operator
from fusedlm.kernels._philox import drop_threshold, dropout_seed, dropped_ref, keep_mask, keep_mask_ref
from fusedlm.kernels._triton import tl, triton


def dropout_ref(x: Tensor, p: float, seed: Tensor, stream: int = 0) -> Tensor:
    threshold, scale = drop_threshold(p)
    return dropped_ref(x, keep_mask_ref(seed, stream, 1, x.numel(), threshold).view(x.shape), scale)


@triton.jit(do_not_specialize=["stream", "threshold"])
def _kernel(x_ptr, y_ptr, seed_ptr, N, stream, threshold, scale, BLOCK_N: tl.constexpr):
    start = tl.cast(tl.program_id(0), tl.int64) * BLOCK_N
    cols = start + tl.arange(0, BLOCK_N)
    mask = cols < N
    x = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    keep = keep_mask(tl.load(seed_ptr), stream, tl.cast(0, tl.int64), start // 8, threshold, BLOCK_N)
    tl.store(y_ptr + cols, tl.where(keep, x * scale, 0.0).to(y_ptr.dtype.element_ty), mask=mask)


@operator(fake=lambda x, p, seed, stream: x.new_empty(x.shape))
def _dropout(x: Tensor, p: float, seed: Tensor, stream: int) -> Tensor:
    x = x.contiguous()  # the mask goes by the logical index
    y = torch.empty_like(x)
    N = x.numel()
    if N:
        block = 64 if interpreting() else 2048
        scalars = (N, stream, *drop_threshold(p))
        launch(
            _kernel, (triton.cdiv(N, block), 1, 1), x.dtype, (x, y, seed), scalars, {"BLOCK_N": block, "num_warps": 4}
        )
    return y


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: Tensor, stream: int) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.p, ctx.stream = p, stream
        return _dropout(x, p, seed, stream)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        (seed,) = ctx.saved_tensors
        return _dropout(dy, ctx.p, seed, ctx.stream), None, None, None


def dropout(x: Tensor, p: float = 0.5, training: bool = True, *, seed: Tensor | None = None, stream: int = 0) -> Tensor:
    """Zero elements of x with probability p and multiply the others by 1 / (1 - p); x itself where not training.

    x: any shape and strides. seed: one int64 on x's device, (1,); by default a new one from torch's generator of that
    device, so that every call has a mask of its own. With one seed for many calls (a training step's), give each call
    its own stream, a whole number from 0 to 2^31 - 1. The mask is a function of seed, stream and index, on
    every device.
    Raises ValueError for another p or seed.
    """
    seed = dropout_seed(seed, p, training, x.device)
    if seed is None:
        return x
    if not use_triton(x):
        return dropout_ref(x, p, seed, stream)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Dropout.apply(x, p, seed, stream)
    return _dropout(x, p, seed, stream)
