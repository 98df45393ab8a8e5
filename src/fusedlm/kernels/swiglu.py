"""SwiGLU (Shazeer 2020): y = silu(g) * u = g * sigmoid(g) * u, of two tensors or of the two halves of one.

Backward, s = sigmoid(g):  dg = dy * u * s * (1 + g * (1 - s)),  du = dy * g * s
Numerics: loads are widened to fp32, one rounding at each store.
Traffic, in elements of y: forward 3 (g, u, y), backward 5 (dy, g, u, dg, du).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedlm.kernels._backend import use_triton
from fusedlm.kernels._launch import elementwise_config, launch, lines, rows
from fusedlm.kernels._operator import operator
from fusedlm.kernels._triton import tl, triton


def swiglu_ref(gate: Tensor, up: Tensor | None = None) -> Tensor:
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return F.silu(gate) * up


@triton.jit
def _exp_minus(x):
    # exp2 is what the hardware has. Kept finite, so that e * s below never becomes infinity times zero.
    return tl.exp2(tl.minimum(x * -1.4426950408889634, 126.0))


@triton.jit
def swiglu_of(g, u):
    """SwiGLU of fp32 g and u."""
    return g / (1.0 + _exp_minus(g)) * u


@triton.jit
def swiglu_gradients(dy, g, u):
    """(dg, du, SwiGLU itself), all fp32."""
    e = _exp_minus(g)
    s = 1.0 / (1.0 + e)
    silu = g * s
    dg = dy * u * s * (1.0 + g * (e * s))  # e * s is 1 - s, without the digits that loses
    return dg, dy * silu, silu * u


@triton.jit
def _fwd_kernel(g_ptr, u_ptr, y_ptr, g_stride, u_stride, N, BLOCK_N: tl.constexpr):
    blocks = tl.cdiv(N, BLOCK_N)
    row = tl.cast(tl.program_id(0) // blocks, tl.int64)
    cols = tl.cast(tl.program_id(0) % blocks, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < N
    g = tl.load(g_ptr + row * g_stride + cols, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + row * u_stride + cols, mask=mask, other=0.0).to(tl.float32)
    y = swiglu_of(g, u)
    tl.store(y_ptr + row * N + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd_kernel(
    dy_ptr, g_ptr, u_ptr, dg_ptr, du_ptr, dy_stride, g_stride, u_stride, out_stride, N, BLOCK_N: tl.constexpr
):
    blocks = tl.cdiv(N, BLOCK_N)
    row = tl.cast(tl.program_id(0) // blocks, tl.int64)
    cols = tl.cast(tl.program_id(0) % blocks, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < N
    dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + row * g_stride + cols, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + row * u_stride + cols, mask=mask, other=0.0).to(tl.float32)
    dg, du, _ = swiglu_gradients(dy, g, u)
    tl.store(dg_ptr + row * out_stride + cols, dg.to(dg_ptr.dtype.element_ty), mask=mask)
    tl.store(du_ptr + row * out_stride + cols, du.to(du_ptr.dtype.element_ty), mask=mask)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    x2 = rows(x)
    N = x2.shape[1] // 2
    return x2[:, :N], x2[:, N:]


@operator(fake=lambda g, u: g.new_empty(g.shape if u is not None else (*g.shape[:-1], g.shape[-1] // 2)))
def _swiglu(g: Tensor, u: Tensor | None) -> Tensor:
    if u is not None:
        g2, u2 = lines(g, u)
        y = torch.empty_like(g, memory_format=torch.contiguous_format)
    else:
        g2, u2 = _halves(g)
        y = torch.empty((*g.shape[:-1], g2.shape[1]), dtype=g.dtype, device=g.device)
    M, N = g2.shape
    if M and N:
        config, grid = elementwise_config(M, N)
        launch(_fwd_kernel, grid, g.dtype, (g2, u2, y), (g2.stride(0), u2.stride(0), N), config)
    return y


@operator(fake=lambda dy, g, u: (g.new_empty(g.shape), g.new_empty(0 if u is None else u.shape)))
def swiglu_backward(dy: Tensor, g: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of g and u; of g alone (and an empty tensor) where g holds both halves."""
    dg = torch.empty_like(g, memory_format=torch.contiguous_format)
    if u is not None:
        dy2, g2, u2 = lines(dy, g, u)
        du = torch.empty_like(dg)
        out_g, out_u = dg, du
        out_stride = g2.shape[1]
    else:
        dy2, (g2, u2) = rows(dy), _halves(g)
        out_g, out_u = _halves(dg)
        du = torch.empty(0, dtype=g.dtype, device=g.device)
        out_stride = g.shape[-1]
    M, N = g2.shape
    if M and N:
        config, grid = elementwise_config(M, N)
        scalars = (dy2.stride(0), g2.stride(0), u2.stride(0), out_stride, N)
        launch(_bwd_kernel, grid, g.dtype, (dy2, g2, u2, out_g, out_u), scalars, config)
    return dg, du


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor | None) -> Tensor:
        ctx.save_for_backward(g, u)
        return _swiglu(g, u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        g, u = ctx.saved_tensors
        dg, du = swiglu_backward(dy, g, u)
        return dg, None if u is None else du


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up, of one shape and dtype, any strides; without up, gate's last dimension holds gate and then up.

    One tensor for both (what a fused projection gives) gets one gradient, with no copy to put two together.
    Raises ValueError where the shapes or dtypes differ, or there are no two halves.
    """
    if up is None and (gate.ndim == 0 or gate.shape[-1] % 2):
        raise ValueError(f"gate has shape {tuple(gate.shape)}; without up, its last dimension holds two halves")
    if up is not None and (gate.shape != up.shape or gate.dtype != up.dtype):
        raise ValueError(
            f"gate is {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype}; expected the same"
        )
    if not use_triton(gate):
        return swiglu_ref(gate, up)
    if torch.is_grad_enabled() and (gate.requires_grad or (up is not None and up.requires_grad)):
        return _SwiGLU.apply(gate, up)
    return _swiglu(gate, up)
