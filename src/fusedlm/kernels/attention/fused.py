"""What comes before and after `hopper_bwd`, in plain Triton: reads and writes everything once, at the speed of memory.

Before it delta = rowsum(dO * O), and zeros where dQ is summed up, in fp32; after it dQ = scale * sum, rounded once.
"""

from fusedlm.kernels._triton import tl, triton
from fusedlm.kernels.attention.tiles import load_rows, store_rows


@triton.jit
def _place(T, H, BLOCK: tl.constexpr):
    """(sequence, head, first row) of a program. Heads come first, for in memory they often lie side by side."""
    h = tl.cast(tl.program_id(0) % H, tl.int64)
    blocks = tl.cdiv(T, BLOCK)
    outer = tl.program_id(0) // H
    return tl.cast(outer // blocks, tl.int64), h, outer % blocks * BLOCK


@triton.jit
def delta_kernel(
    o_ptr,  # (B, H, T, D)
    do_ptr,
    delta_ptr,  # (B, H, T) fp32
    sum_ptr,  # (B, H, T, D) fp32, contiguous: zeros are written
    o_stride_b,
    o_stride_h,
    o_stride_t,
    do_stride_b,
    do_stride_h,
    do_stride_t,
    H,
    T,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    b, h, start = _place(T, H, BLOCK_M)
    o = load_rows(o_ptr + b * o_stride_b + h * o_stride_h, start, o_stride_t, T, D, BLOCK_M, BLOCK_D, True)
    do = load_rows(do_ptr + b * do_stride_b + h * do_stride_h, start, do_stride_t, T, D, BLOCK_M, BLOCK_D, True)
    m = start + tl.arange(0, BLOCK_M)
    row = (b * H + h) * T
    tl.store(delta_ptr + row + m, tl.sum(o.to(tl.float32) * do.to(tl.float32), 1), mask=m < T)
    store_rows(sum_ptr + row * D, start, D, T, tl.zeros((BLOCK_M, BLOCK_D), tl.float32), D, BLOCK_M, BLOCK_D)


@triton.jit
def narrow_kernel(
    sum_ptr,  # (B, H, T, D) fp32, contiguous
    dq_ptr,  # (B, H, T, D)
    dq_stride_b,
    dq_stride_h,
    dq_stride_t,
    H,
    T,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    b, h, start = _place(T, H, BLOCK_M)
    x = load_rows(sum_ptr + (b * H + h) * T * D, start, D, T, D, BLOCK_M, BLOCK_D, True)
    store_rows(dq_ptr + b * dq_stride_b + h * dq_stride_h, start, dq_stride_t, T, x * scale, D, BLOCK_M, BLOCK_D)
