"""Softmax over the last dimension: y = exp(x - m) / sum(exp(x - m)), m = max(x).

Backward: dx = y * (dy - sum(dy * y)).
Rows that fit a program's registers are read once. Longer ones are gone through in blocks, twice: once for the maximum
and the sum together (Milakov and Gimelshein 2018), once for the result; the second reading finds in the L2 cache what
still is in it.
Numerics: loads are widened to fp32, every sum is fp32, one rounding at the store.
Traffic: forward 2*M*N elements, backward 3*M*N.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedlm.kernels._backend import interpreting, use_triton
from fusedlm.kernels._launch import capability, launch, rows
from fusedlm.kernels._operator import operator
from fusedlm.kernels._triton import tl, triton


def softmax_ref(x: Tensor) -> Tensor:
    return x.softmax(-1)


@triton.jit
def _widened(x):
    """x, of 16 bits, in fp32. bf16 by its bits: Triton 3.8 and 3.9 take more registers to convert a row."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


# What waits in 16 bits is widened anew, with a zero that the compiler must not know: it would keep in fp32, in twice
# the registers, what was widened before. zero: int32.
@triton.jit
def _other(x, zero):
    """x, of 16 bits."""
    return (x.to(tl.int16, bitcast=True) ^ zero.to(tl.int16)).to(x.dtype, bitcast=True)


@triton.jit
def _widened_otherwise(x, zero):
    """x, of 16 bits, in fp32. bf16 by a product in place of the shift of `_widened`."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.int32) * (65536 + zero)).to(tl.float32, bitcast=True)
    return _other(x, zero).to(tl.float32)


@triton.jit
def _fwd_kernel(x_ptr, y_ptr, x_stride, N, BLOCK_N: tl.constexpr, NARROW: tl.constexpr):
    row = tl.cast(tl.program_id(0), tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < N
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=float("-inf"))
    if NARROW:  # x waits for the maximum and for the sum in 16 bits, in half the registers
        top = tl.max(x, 0).to(tl.float32)
        total = tl.sum(tl.exp(_widened(x) - top), 0)
        y = tl.exp(_other(x, N >> 31).to(tl.float32) - top) / total
    else:
        wide = x.to(tl.float32)
        e = tl.exp(wide - tl.max(wide, 0))
        y = e / tl.sum(e, 0)
    tl.store(y_ptr + row * N + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _long_fwd_kernel(x_ptr, y_ptr, x_stride, N, BLOCK_N: tl.constexpr):
    row = tl.cast(tl.program_id(0), tl.int64)
    cols = tl.arange(0, BLOCK_N)
    x_ptr += row * x_stride
    y_ptr += row * N
    top = float("-inf")
    totals = tl.zeros((BLOCK_N,), tl.float32)
    # Three stages: two blocks are on their way to shared memory while one is worked on.
    for start in tl.range(0, N, BLOCK_N, num_stages=3):
        x = tl.load(x_ptr + start + cols, mask=start + cols < N, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(top, tl.max(x, 0))
        # While there was nothing but -inf the sum is 0, and -inf - -inf must not make it NaN.
        known = tl.where(larger == float("-inf"), 0.0, larger)
        totals = totals * tl.exp(top - known) + tl.exp(x - known)
        top = larger
    total = tl.sum(totals, 0)
    last = (tl.cdiv(N, BLOCK_N) - 1) * BLOCK_N
    for before_last in tl.range(0, N, BLOCK_N, num_stages=3):  # backwards: what was read last is in the cache still
        start = last - before_last
        mask = start + cols < N
        x = tl.load(x_ptr + start + cols, mask=mask, other=float("-inf")).to(tl.float32)
        y = tl.exp(x - top) / total
        tl.store(y_ptr + start + cols, y.to(y_ptr.dtype.element_ty), mask=mask, cache_modifier=".cs")


@triton.jit
def _bwd_kernel(dy_ptr, y_ptr, dx_ptr, dy_stride, y_stride, N, BLOCK_N: tl.constexpr, NARROW: tl.constexpr):
    row = tl.cast(tl.program_id(0), tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < N
    # Both loads before anything is done with either: a hundredth faster.
    dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0)
    y = tl.load(y_ptr + row * y_stride + cols, mask=mask, other=0.0)
    if NARROW:  # both wait for the sum in 16 bits
        dot = tl.sum(_widened(dy) * _widened(y), 0)
        # Why in these ways: "How they are widened" in docs/kernels/softmax.md.
        dx = _widened_otherwise(y, N >> 31) * (_widened(_other(dy, N >> 31)) - dot)
    else:
        dot = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 0)
        dx = y.to(tl.float32) * (dy.to(tl.float32) - dot)
    tl.store(dx_ptr + row * N + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _long_bwd_kernel(dy_ptr, y_ptr, dx_ptr, dy_stride, y_stride, N, BLOCK_N: tl.constexpr, REVERSED: tl.constexpr):
    row = tl.cast(tl.program_id(0), tl.int64)
    cols = tl.arange(0, BLOCK_N)
    dy_ptr += row * dy_stride
    y_ptr += row * y_stride
    dx_ptr += row * N
    # The last block stays in registers; those before it, which are full, are read twice. Where the rows in work do not
    # fit the L2 cache, the second time backwards: what was read last is in it still.
    last = (tl.cdiv(N, BLOCK_N) - 1) * BLOCK_N
    mask = last + cols < N
    dots = tl.zeros((BLOCK_N,), tl.float32)
    if not REVERSED:
        last_dy = tl.load(dy_ptr + last + cols, mask=mask, other=0.0)
        last_y = tl.load(y_ptr + last + cols, mask=mask, other=0.0)
    for start in range(0, last, BLOCK_N):
        dy = tl.load(dy_ptr + start + cols)
        y = tl.load(y_ptr + start + cols)
        dots += dy.to(tl.float32) * y.to(tl.float32)
    if REVERSED:
        last_dy = tl.load(dy_ptr + last + cols, mask=mask, other=0.0)
        last_y = tl.load(y_ptr + last + cols, mask=mask, other=0.0)
    dots += last_dy.to(tl.float32) * last_y.to(tl.float32)
    dot = tl.sum(dots, 0)
    last_dx = last_y.to(tl.float32) * (last_dy.to(tl.float32) - dot)
    tl.store(dx_ptr + last + cols, last_dx.to(dx_ptr.dtype.element_ty), mask=mask)
    for done in range(0, last, BLOCK_N):
        start = last - BLOCK_N - done if REVERSED else done
        dy = tl.load(dy_ptr + start + cols)
        y = tl.load(y_ptr + start + cols)
        dx = y.to(tl.float32) * (dy.to(tl.float32) - dot)
        tl.store(dx_ptr + start + cols, dx.to(dx_ptr.dtype.element_ty))


@functools.cache
def _forward_config(N: int, dtype: torch.dtype) -> tuple[bool, dict[str, int]]:
    """Whether a row of N numbers is long, and the constants."""
    block = triton.next_power_of_2(N)
    if block > (128 if interpreting() else 32768):
        return True, {"BLOCK_N": 64 if interpreting() else 8192, "num_warps": 16}
    # In bf16 32 registers a thread do, so that a multiprocessor holds two programs of 32 warps; in fp16 they don't.
    narrow = dtype == torch.float16 if interpreting() else dtype == torch.bfloat16 and block >= 16384
    # One warp waits for no other; else 16 numbers a thread, or 32, where that is not too many warps.
    warps = 1 if block <= 1024 else block // 1024 if narrow else min(block // 512, 32)
    return False, {"BLOCK_N": block, "NARROW": narrow, "num_warps": warps}


@functools.cache
def _backward_config(N: int, dtype: torch.dtype, arch: int) -> tuple[bool, dict[str, int]]:
    """Whether a row of N numbers is long, and the constants. arch: see `capability`."""
    block = triton.next_power_of_2(N)
    wide = dtype.itemsize > 2
    longest, long_block, fits = 16384 if wide else 32768, 8192 if wide or arch < 90 else 16384, 65536
    if interpreting():
        longest, long_block, fits = 128, 64, 256
    if block > longest:  # its blocks leave half of the registers for another program
        return True, {"BLOCK_N": long_block, "REVERSED": block > fits, "num_warps": max(long_block // 512, 1)}
    narrow = not wide and (block >= 16384 or interpreting())
    # 16 numbers a thread, where that is not too many warps; 8 in rows of 2048 and 4096, a hundredth faster.
    most = 32 if narrow and dtype == torch.float16 else 16
    warps = block // 256 if block in (2048, 4096) else min(max(block // 512, 1), most)
    return False, {"BLOCK_N": block, "NARROW": narrow, "num_warps": warps}


@operator(fake=lambda x: x.new_empty(x.shape))
def _softmax(x: Tensor) -> Tensor:
    x2 = rows(x)
    M, N = x2.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if M and N:
        long, config = _forward_config(N, x.dtype)
        launch(_long_fwd_kernel if long else _fwd_kernel, (M, 1, 1), x.dtype, (x2, y), (x2.stride(0), N), config)
    return y


@operator(fake=lambda dy, y: y.new_empty(y.shape))
def _softmax_backward(dy: Tensor, y: Tensor) -> Tensor:
    dy2, y2 = rows(dy), rows(y)
    M, N = y2.shape
    dx = torch.empty_like(y, memory_format=torch.contiguous_format)
    if M and N:
        long, config = _backward_config(N, y.dtype, capability(y.device))
        kernel = _long_bwd_kernel if long else _bwd_kernel
        launch(kernel, (M, 1, 1), y.dtype, (dy2, y2, dx), (dy2.stride(0), y2.stride(0), N), config)
    return dx


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = _softmax(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _softmax_backward(dy, *ctx.saved_tensors)


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """Softmax over the last dimension, of any length. x: (..., N), any strides. Returns x's shape and dtype.

    A row of nothing but -inf is NaN, as torch's. Raises ValueError for another dimension.
    """
    if x.ndim == 0 or dim not in (-1, x.ndim - 1):
        raise ValueError(f"softmax over dimension {dim} of shape {tuple(x.shape)}; only the last one is supported")
    if not use_triton(x):
        return softmax_ref(x)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Softmax.apply(x)
    return _softmax(x)
