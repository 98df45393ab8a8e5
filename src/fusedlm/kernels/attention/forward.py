"""The forward pass: a program a block of queries, going over the keys it sees (Dao 2023, algorithm 1)."""

from fusedlm.kernels._philox import keep_mask_2d
from fusedlm.kernels._triton import tl, triton


@triton.jit
def key_bounds(m, offset, starts_ptr, ends_ptr, T, S, IS_CAUSAL: tl.constexpr):
    """[lo, hi) of the keys that each query of m sees, (BLOCK_M,) int32 each; none for queries past the end."""
    valid = m < T
    if starts_ptr is not None:
        lo = tl.load(starts_ptr + m, mask=valid, other=0)
        hi = tl.load(ends_ptr + m, mask=valid, other=0)
        if IS_CAUSAL:
            hi = tl.minimum(hi, m + 1)
    else:
        lo = m * 0
        hi = tl.minimum(m + 1 + offset, S) if IS_CAUSAL else lo + S
    return lo, tl.where(valid, tl.maximum(hi, lo), lo)


@triton.jit
def _blocks(
    acc,
    total,
    top,
    q,
    k_ptr,
    v_ptr,
    k_stride_s,
    v_stride_s,
    begin,
    end,
    lo,
    hi,
    row,
    S,
    scale,
    seed,
    stream,
    threshold,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    DROPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys from begin to end, multiples of BLOCK_N, joined to the running sum, its weights' sum and their maximum."""
    d = tl.arange(0, BLOCK_D)
    i = tl.arange(0, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        n = start + i
        # 64 bits to the tile, 32 within it: a register an address, not two.
        k_tile = k_ptr + tl.cast(start, tl.int64) * k_stride_s + (i[:, None] * k_stride_s + d[None, :])
        v_tile = v_ptr + tl.cast(start, tl.int64) * v_stride_s + (i[:, None] * v_stride_s + d[None, :])
        if MASKED or D != BLOCK_D:
            inside = (n < S)[:, None] & (d < D)[None, :]
            k = tl.load(k_tile, mask=inside, other=0.0)
            v = tl.load(v_tile, mask=inside, other=0.0)
        else:
            k = tl.load(k_tile)
            v = tl.load(v_tile)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # (BLOCK_M, BLOCK_N), in units of log 2
        if MASKED:
            s = tl.where((n[None, :] >= lo[:, None]) & (n[None, :] < hi[:, None]), s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        known = higher
        if MASKED:  # a query that has seen nothing yet: -inf - -inf is not to become NaN
            known = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - known[:, None])
        shrink = tl.exp2(top - known)
        total = total * shrink + tl.sum(p, 1)
        if DROPS:
            p = tl.where(keep_mask_2d(seed, stream, row, start // 8, threshold, BLOCK_N), p, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = higher
    return acc, total, top


@triton.jit(do_not_specialize=["offset", "stream", "threshold"])
def fwd_kernel(
    q_ptr,  # (B, H, T, D)
    k_ptr,  # (B, G, S, D)
    v_ptr,
    o_ptr,  # (B, H, T, D)
    lse_ptr,  # (B, H, T) fp32: log2 of the sum of exp(scores)
    offset_ptr,  # (B,) int64
    starts_ptr,  # (T,) int32: of packed sequences, the first key that a query may see
    ends_ptr,  # and the one behind the last
    seed_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_t,
    k_stride_b,
    k_stride_g,
    k_stride_s,
    v_stride_b,
    v_stride_g,
    v_stride_s,
    o_stride_b,
    o_stride_h,
    o_stride_t,
    H,
    group,  # H / G
    T,
    S,
    offset,
    scale,
    stream,
    threshold,
    keep_scale,
    D: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # The last queries see the most: their programs come first, so that the short ones fill the gaps at the end.
    blocks = tl.cdiv(T, BLOCK_M)
    block = blocks - 1 - tl.program_id(0) % blocks
    bh = tl.program_id(0) // blocks
    b = tl.cast(bh // H, tl.int64)
    h = tl.cast(bh % H, tl.int64)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + b).to(tl.int32)
    lo, hi = key_bounds(m, offset, starts_ptr, ends_ptr, T, S, IS_CAUSAL)
    q_ptr += b * q_stride_b + h * q_stride_h
    k_ptr += b * k_stride_b + h // group * k_stride_g
    v_ptr += b * v_stride_b + h // group * v_stride_g
    inside = (m < T)[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + m[:, None].to(tl.int64) * q_stride_t + d[None, :], mask=inside, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    DROPS: tl.constexpr = seed_ptr is not None
    seed = tl.load(seed_ptr) if DROPS else 0
    row = tl.cast(bh, tl.int64) * T + m
    scale *= 1.4426950408889634
    # Blocks that every query of this program sees whole need no mask; those before and behind do.
    valid = m < T
    first = tl.min(tl.where(valid, lo, S), 0) // BLOCK_N * BLOCK_N
    last = tl.max(hi, 0)
    whole_first = tl.cdiv(tl.max(lo, 0), BLOCK_N) * BLOCK_N
    whole_last = tl.min(tl.where(valid, hi, S), 0) // BLOCK_N * BLOCK_N
    if starts_ptr is not None:
        whole_first = tl.minimum(whole_first, tl.cdiv(last, BLOCK_N) * BLOCK_N)
        acc, total, top = _blocks(
            acc, total, top, q, k_ptr, v_ptr, k_stride_s, v_stride_s, first, whole_first, lo, hi, row, S, scale,
            seed, stream, threshold, D, BLOCK_D, BLOCK_N, True, DROPS, PRECISION,
        )  # fmt: skip
    acc, total, top = _blocks(
        acc, total, top, q, k_ptr, v_ptr, k_stride_s, v_stride_s, whole_first, whole_last, lo, hi, row, S, scale,
        seed, stream, threshold, D, BLOCK_D, BLOCK_N, False, DROPS, PRECISION,
    )  # fmt: skip
    acc, total, top = _blocks(
        acc, total, top, q, k_ptr, v_ptr, k_stride_s, v_stride_s, tl.maximum(whole_first, whole_last), last, lo, hi,
        row, S, scale, seed, stream, threshold, D, BLOCK_D, BLOCK_N, True, DROPS, PRECISION,
    )  # fmt: skip
    lse = top + tl.log2(total)
    total = tl.where(total == 0.0, 1.0, total)  # a query that sees no key: 0
    o = acc / total[:, None]
    if DROPS:
        o *= keep_scale
    o_ptr += b * o_stride_b + h * o_stride_h
    tl.store(o_ptr + m[:, None].to(tl.int64) * o_stride_t + d[None, :], o.to(o_ptr.dtype.element_ty), mask=inside)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, lse, mask=valid)
