"""Rotary position embedding (Su et al. 2021), in the half-split layout of Llama checkpoints.

With x1, x2 the halves of the last dimension and an angle a for each position and frequency:
    y1 = x1 * cos(a) - x2 * sin(a),  y2 = x2 * cos(a) + x1 * sin(a)
Backward: the rotation by -a. A frequency is theta^(-2i/D), stretched for longer contexts as Llama 3.1 does.
Numerics: loads are widened to fp32, one rounding at the store. Angles are computed in float64.
Traffic: forward and backward 2 elements each; the tables of cosines and sines are shared by all heads.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedlm.kernels._backend import interpreting, use_triton
from fusedlm.kernels._launch import launch
from fusedlm.kernels._operator import operator
from fusedlm.kernels._triton import tl, triton


def rope_ref(x: Tensor, cos: Tensor, sin: Tensor, heads: int | None = None) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    x1, x2 = x[:, :heads].to(wide).chunk(2, dim=-1)
    y = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)
    return y if y.shape == x.shape else torch.cat((y, x[:, heads:]), dim=1)


@triton.jit
def _kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    x_stride_b,
    x_stride_h,
    x_stride_t,
    y_stride_b,
    y_stride_h,
    y_stride_t,
    table_stride_b,
    table_stride_t,
    H,
    T,
    heads,  # how many are rotated; the others are copied
    HALF: tl.constexpr,  # D / 2
    INVERSE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Programs go over heads, then tokens, then sequences, as memory does in (B, T, H, D).
    pid = tl.program_id(0)
    h_blocks, t_blocks = tl.cdiv(H, BLOCK_H), tl.cdiv(T, BLOCK_T)
    h = (pid % h_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :, None]
    t = (pid // h_blocks % t_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    b = tl.cast(pid // (h_blocks * t_blocks), tl.int64)
    d = tl.arange(0, BLOCK_D)[None, None, :]
    t64 = t.to(tl.int64)
    table = b * table_stride_b + t64 * table_stride_t + d  # (BLOCK_T, 1, BLOCK_D)
    inside = (t < T) & (d < HALF)
    cos = tl.load(cos_ptr + table, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + table, mask=inside, other=0.0)
    if INVERSE:
        sin = -sin
    at = b * x_stride_b + h.to(tl.int64) * x_stride_h + t64 * x_stride_t + d  # (BLOCK_T, BLOCK_H, BLOCK_D)
    mask = inside & (h < H)
    x1 = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + at + HALF, mask=mask, other=0.0).to(tl.float32)
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    rotated = h < heads
    y1, y2 = tl.where(rotated, y1, x1), tl.where(rotated, y2, x2)
    out = b * y_stride_b + h.to(tl.int64) * y_stride_h + t64 * y_stride_t + d
    tl.store(y_ptr + out, y1.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + out + HALF, y2.to(y_ptr.dtype.element_ty), mask=mask)


@functools.cache
def _config(H: int, half: int) -> dict[str, int]:
    """16 numbers of each half a thread; as many heads at once as divide H, since they share their angles."""
    block_d = triton.next_power_of_2(half)
    block_h = min(H & -H, 8)
    tile = 64 if interpreting() else 2048
    block_t = max(tile // (block_h * block_d), 1)
    return {"BLOCK_H": block_h, "BLOCK_T": block_t, "BLOCK_D": block_d, "num_warps": 4}


def _empty(x: Tensor) -> Tensor:
    """(B, H, T, D) in the order of memory that x has: heads or tokens outermost."""
    B, H, T, D = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty((B, T, H, D)).transpose(1, 2)
    return x.new_empty((B, H, T, D))


@operator(fake=lambda x, *_: _empty(x))
def _rope(x: Tensor, cos: Tensor, sin: Tensor, heads: int, inverse: bool) -> Tensor:
    y = _empty(x)
    if x.stride(-1) != 1:
        x = x.contiguous()
    B, H, T, D = x.shape
    if x.numel():
        # (B, T, D/2), a stride of 0 where sequences share a table
        tables = [t.reshape(-1, T, D // 2).expand(B, T, D // 2) for t in (cos, sin)]
        if any(t.stride(2) != 1 or t.stride() != tables[0].stride() for t in tables):
            tables = [t.contiguous() for t in tables]
        config = _config(H, D // 2)
        grid = (B * triton.cdiv(T, config["BLOCK_T"]) * triton.cdiv(H, config["BLOCK_H"]), 1, 1)
        scalars = (*x.stride()[:3], *y.stride()[:3], *tables[0].stride()[:2], H, T, heads)
        constants = {"HALF": D // 2, "INVERSE": inverse, **config}
        launch(_kernel, grid, (x.dtype, cos.dtype), (x, *tables, y), scalars, constants)
    return y


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads
        return _rope(x, cos, sin, heads, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _rope(dy, *ctx.saved_tensors, ctx.heads, True), None, None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor, heads: int | None = None) -> Tensor:
    """Rotate the two halves of x's last dimension against each other.

    x: (B, H, T, D), any strides, D even. cos, sin: (T, D/2), or (B, 1, T, D/2) where sequences have positions of their
    own; fp32 (fp64 for fp64 x), see `rotary_tables`. Not differentiated with respect to the tables. heads: so many of
    the H are rotated, the first ones, and the others copied: of queries, keys and values side by side, the values.
    Returns x's shape and dtype. Raises ValueError for other shapes.
    """
    B, _, T, D = x.shape if x.ndim == 4 else (0, 0, 0, 1)
    if D % 2 or cos.shape != sin.shape or cos.shape not in ((T, D // 2), (B, 1, T, D // 2), (1, 1, T, D // 2)):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, cos {tuple(cos.shape)} and sin {tuple(sin.shape)}; expected (B, H, T, D) "
            "with an even D, and tables of (T, D/2) or (B, 1, T, D/2)"
        )
    heads = x.shape[1] if heads is None else heads
    if not use_triton(x):
        return rope_ref(x, cos, sin, heads)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rope.apply(x, cos, sin, heads)
    return _rope(x, cos, sin, heads, False)


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretching of the rotary frequencies to longer contexts (`"rope_type": "llama3"`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_length: int

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and 0 < self.low_freq_factor < self.high_freq_factor):
            raise ValueError(
                f"rope scaling has factor {self.factor}, low_freq_factor {self.low_freq_factor}, high_freq_factor "
                f"{self.high_freq_factor}; expected factor >= 1 and 0 < low < high"
            )
        if self.original_context_length < 1:
            raise ValueError(f"original_context_length is {self.original_context_length}; expected 1 or more")


def rotary_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Angle a position, (D/2,) float64: theta^(-2i/D), stretched as Llama 3.1 does where scaling is given.

    Wavelengths shorter than original_context_length / high_freq_factor stay, those longer than
    original_context_length / low_freq_factor are stretched by factor, and those between are blended linearly.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    frequencies = theta**-exponent
    if scaling is None:
        return frequencies
    turns = scaling.original_context_length * frequencies / (2 * math.pi)  # over the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def rotary_tables(positions: Tensor, frequencies: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """cos and sin for `rope`, each (T, D/2) or (B, 1, T, D/2), in dtype; angles are computed in float64.

    positions: (T,) or (B, T); torch.arange(offset, offset + T) for T tokens from an offset on. frequencies: (D/2,)
    float64, of `rotary_frequencies`, on the same device.
    """
    angles = positions.to(torch.float64).unsqueeze(-1) * frequencies
    if positions.ndim == 2:
        angles = angles.unsqueeze(1)  # (B, 1, T, D/2), broadcast over heads
    return angles.cos().to(dtype), angles.sin().to(dtype)
