"""Sum of parts: y = scale * (x_0 + x_1 + ... + x_{R-1}), where R ranks' gradients of the same weights come together.

Numerics: loads are widened to fp32, added in the order of the parts, one rounding at the store. So 16-bit gradients are
rounded once however many there are, and every rank that sums the same parts gets the same bits.
Traffic, in elements of y: R + 1 (each part, y).
"""

import torch
from torch import Tensor

from fusedlm.kernels._backend import use_triton
from fusedlm.kernels._launch import elementwise_config, launch
from fusedlm.kernels._operator import operator
from fusedlm.kernels._triton import tl, triton


def sum_parts_ref(x: Tensor, scale: float = 1.0) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.sum(0, dtype=wide) * scale).to(x.dtype)


@triton.jit
def _fwd_kernel(x_ptr, y_ptr, x_stride, scale, N, PARTS: tl.constexpr, BLOCK_N: tl.constexpr):
    cols = tl.cast(tl.program_id(0), tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < N
    total = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        at = part * tl.cast(x_stride, tl.int64) + cols
        total += tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + cols, (total * scale).to(y_ptr.dtype.element_ty), mask=mask)


def _launched(x: Tensor, scale: float, out: Tensor) -> Tensor:
    flat = x.reshape(x.shape[0], -1)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    R, N = flat.shape
    if N:
        config, grid = elementwise_config(1, N)
        launch(_fwd_kernel, grid, x.dtype, (flat, out), (flat.stride(0), scale, N), {"PARTS": R, **config})
    return out


@operator(fake=lambda x, scale: x.new_empty(x.shape[1:]))
def _sum_parts(x: Tensor, scale: float) -> Tensor:
    return _launched(x, scale, torch.empty(x.shape[1:], dtype=x.dtype, device=x.device))


def sum_parts(x: Tensor, scale: float = 1.0, *, out: Tensor | None = None) -> Tensor:
    """The sum of x, (R, *), over its first dimension, times scale: (*), in x's dtype, which is floating-point.

    Added in fp32 (float64 in float64), in the order of the parts. x: any strides. out: contiguous, where to
    write it, in x's dtype; nothing that x shares memory with. Has no gradient. Raises ValueError where x asks for one,
    has no parts, or out does not fit.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("x requires a gradient, and sum_parts has none; expected a tensor that is not differentiated")
    if x.ndim == 0 or not x.shape[0] or not x.is_floating_point():
        raise ValueError(f"x is {tuple(x.shape)} {x.dtype}; expected floating-point parts, (R, *) with R of 1 or more")
    if out is not None and (
        out.shape != x.shape[1:] or out.dtype != x.dtype or out.device != x.device or not out.is_contiguous()
    ):
        what = f"{tuple(out.shape)} {out.dtype} on {out.device} with strides {out.stride()}"
        raise ValueError(f"out is {what}; expected a contiguous {tuple(x.shape[1:])} {x.dtype} on {x.device}")
    if out is not None and use_triton(x) and not torch.compiler.is_compiling():
        return _launched(x, scale, out)
    y = _sum_parts(x, scale) if use_triton(x) else sum_parts_ref(x, scale)
    return y if out is None else out.copy_(y)
