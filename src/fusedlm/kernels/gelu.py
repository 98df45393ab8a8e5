"""GELU (Hendrycks and Gimpel 2016): y = x * Phi(x), or GPT-2's approximation of it.

    exact  Phi(x) = (1 + erf(x / sqrt(2))) / 2,          dy/dx = Phi(x) + x * exp(-x^2 / 2) / sqrt(2 pi)
    tanh   Phi(x) ~ (1 + tanh(u)) / 2 = sigmoid(2u),     u = sqrt(2 / pi) * (x + 0.044715 x^3),
           with s = sigmoid(2u):                         dy/dx = s + x * s * (1 - s) * 2 du/dx
With a bias, x + bias takes x's place: so the gradient of a linear layer's bias is summed where that of x is computed.
Numerics: loads are widened to fp32, one rounding at the store. For narrower dtypes exact is Phi to a relative 4e-5.
Traffic, in elements: forward 2 per element (x, y), backward 3 (x, dy, dx).
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedlm.kernels._backend import use_triton
from fusedlm.kernels._columns import column_config, sum_partials
from fusedlm.kernels._launch import elementwise_config, launch, lines, rows
from fusedlm.kernels._operator import operator
from fusedlm.kernels._triton import tl, triton


def gelu_ref(x: Tensor, approximate: Literal["none", "tanh"] = "none", bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate=approximate).to(x.dtype)


@triton.jit
def _exp_minus(x):
    # exp2 is what the hardware has. Kept finite, so that e * s * s below never becomes infinity times zero.
    return tl.exp2(tl.minimum(x * -1.4426950408889634, 126.0))


@triton.jit
def _normal_tail(x):
    """(Phi(-|x|), exp(-x^2 / 2)), the first to a relative error of 3e-5, for x to 13; what fp16 and bf16 can tell.

    Phi(-|x|) = exp(-x^2 / 2) * t * P(t), t = 1 / (1 + c |x|): the form of Abramowitz and Stegun 7.1.26 with P and c
    fitted to the relative error. tl.erf takes several times its arithmetic, more than the memory leaves time for. And t
    is an inverse root: three instructions with the square, where a division is ten.
    """
    e = tl.exp2(-0.7213475204444817 * x * x)
    d = 1.0 + 0.3765343 * tl.abs(x)
    t = tl.rsqrt(d * d)
    tail = t * (0.149700845 + t * (0.158003935 + t * (0.085344235 + t * (0.19789331 - 0.09095657 * t))))
    return tail * e, e


@triton.jit
def gelu_of(x, TANH: tl.constexpr, WIDE: tl.constexpr):
    """GELU of x, fp32. WIDE: to fp32's precision, and not to that of 16 bits."""
    if TANH:
        y = x / (1.0 + _exp_minus(1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif WIDE:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tail, _ = _normal_tail(x)
        y = x * tl.where(x < 0.0, tail, 1.0 - tail)
    return y


@triton.jit
def _fwd_kernel(x_ptr, b_ptr, y_ptr, x_stride, N, TANH: tl.constexpr, BLOCK_N: tl.constexpr):
    blocks = tl.cdiv(N, BLOCK_N)
    row = tl.cast(tl.program_id(0) // blocks, tl.int64)
    cols = tl.cast(tl.program_id(0) % blocks, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < N
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    if b_ptr is not None:
        x += tl.load(b_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    y = gelu_of(x, TANH, x_ptr.dtype.element_ty == tl.float32)
    tl.store(y_ptr + row * N + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gelu_and_slope(x, TANH: tl.constexpr, WIDE: tl.constexpr):
    """(GELU of x, its derivative there), fp32. WIDE: as of `gelu_of`."""
    if TANH:
        x2 = x * x
        e = _exp_minus(1.5957691216057308 * (x + 0.044715 * x * x2))
        s = 1.0 / (1.0 + e)
        slope = s + x * (e * s * s) * (
            1.5957691216057308 + 0.21406444881780076 * x2
        )  # 1 - s, without the digits it loses
    elif WIDE:
        s = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = s + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        tail, e = _normal_tail(x)
        s = tl.where(x < 0.0, tail, 1.0 - tail)
        slope = s + x * 0.3989422804014327 * e
    return x * s, slope


@triton.jit
def _bwd_kernel(dy_ptr, x_ptr, dx_ptr, dy_stride, x_stride, N, TANH: tl.constexpr, BLOCK_N: tl.constexpr):
    blocks = tl.cdiv(N, BLOCK_N)
    row = tl.cast(tl.program_id(0) // blocks, tl.int64)
    cols = tl.cast(tl.program_id(0) % blocks, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < N
    dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    _, slope = gelu_and_slope(x, TANH, x_ptr.dtype.element_ty == tl.float32)
    tl.store(dx_ptr + row * N + cols, (dy * slope).to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd_bias_kernel(
    dy_ptr, x_ptr, b_ptr, dx_ptr, sums_ptr, dy_stride, x_stride, M, N, rows,
    TANH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Down a block of columns, so that their sums stay in registers: one row of partial sums a part of the rows.
    blocks = tl.cdiv(N, BLOCK_N)
    part = tl.program_id(0) // blocks
    cols = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    bias = tl.zeros((BLOCK_N,), tl.float32)
    if b_ptr is not None:
        bias += tl.load(b_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(part * rows, tl.minimum((part + 1) * rows, M), BLOCK_M):
        lines = start + tl.arange(0, BLOCK_M)
        row = lines[:, None].to(tl.int64)
        mask = (lines < M)[:, None] & (cols < N)[None, :]
        dy = tl.load(dy_ptr + row * dy_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32) + bias[None, :]
        _, slope = gelu_and_slope(x, TANH, x_ptr.dtype.element_ty == tl.float32)
        dx = dy * slope
        tl.store(dx_ptr + row * N + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        total += dx
    tl.store(sums_ptr + tl.cast(part, tl.int64) * N + cols, tl.sum(total, 0), mask=cols < N)


@operator(fake=lambda x, bias, tanh: x.new_empty(x.shape))
def _gelu(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    x2 = lines(x) if bias is None else rows(x)
    M, N = x2.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if M and N:
        config, grid = elementwise_config(M, N)
        key = (x.dtype, None if bias is None else bias.dtype)
        launch(_fwd_kernel, grid, key, (x2, bias, y), (x2.stride(0), N), {"TANH": tanh, **config})
    return y


@operator(fake=lambda dy, x, tanh: x.new_empty(x.shape))
def _gelu_backward(dy: Tensor, x: Tensor, tanh: bool) -> Tensor:
    dy2, x2 = lines(dy, x)
    M, N = x2.shape
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if M and N:
        config, grid = elementwise_config(M, N)
        scalars = (dy2.stride(0), x2.stride(0), N)
        launch(_bwd_kernel, grid, x.dtype, (dy2, x2, dx), scalars, {"TANH": tanh, **config})
    return dx


@operator(fake=lambda dy, x, bias, tanh: (x.new_empty(x.shape), x.new_empty(x.shape[-1])))
def gelu_backward_and_sums(dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    """(dx, its sums over rows), of GELU at x + bias. The sums have the dtype of bias, x's without one."""
    dy2, x2 = rows(dy), rows(x)
    M, N = x2.shape
    dtype = x.dtype if bias is None else bias.dtype
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not M or not N:
        return dx, torch.zeros(N, dtype=dtype, device=x.device)
    config, blocks, parts, each = column_config(M, N, x.device)
    partial = torch.empty((1, parts, N), dtype=torch.float32, device=x.device)
    scalars = (dy2.stride(0), x2.stride(0), M, N, each)
    key = (x.dtype, None if bias is None else bias.dtype)
    launch(
        _bwd_bias_kernel, (blocks * parts, 1, 1), key, (dy2, x2, bias, dx, partial), scalars, {"TANH": tanh, **config}
    )
    return dx, sum_partials(partial, dtype)[0]


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.tanh = tanh
        return _gelu(x, bias, tanh)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, bias = ctx.saved_tensors
        if bias is None:
            return _gelu_backward(dy, x, ctx.tanh), None, None
        return *gelu_backward_and_sums(dy, x, bias, ctx.tanh), None


def gelu(x: Tensor, approximate: Literal["none", "tanh"] = "none", bias: Tensor | None = None) -> Tensor:
    """GELU of each element, exact ("none") or by the tanh approximation. Any shape and strides. Returns x's dtype.

    bias: (N,), added to x, (..., N), first.
    Raises ValueError for another approximation, or a bias of another shape.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate is {approximate!r}; expected 'none' or 'tanh'")
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected {tuple(x.shape[-1:])}, x's last dimension")
    if not use_triton(x):
        return gelu_ref(x, approximate, bias)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _GELU.apply(x, bias, approximate == "tanh")
    return _gelu(x, bias, approximate == "tanh")
