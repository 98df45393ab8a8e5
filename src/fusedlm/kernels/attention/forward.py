"""The forward pass: a program a block of queries, going over the keys it sees (Dao 2023, algorithm 1)."""

from fusedlm.kernels._philox import keep_tile, tile_key
from fusedlm.kernels._triton import tl, triton
from fusedlm.kernels.attention.tiles import key_blocks, keys_seen, load_rows, program_place, store_lse, store_rows


@triton.jit(do_not_specialize=["offset", "stream", "threshold"])
def fwd_kernel(
    q_ptr,  # (B, H, T, D)
    k_ptr,  # (B, G, S, D)
    v_ptr,
    o_ptr,  # (B, H, T, D)
    lse_ptr,  # (B, H, T) fp32: log2 of the sum of exp(scores); see store_lse
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
    RAGGED: tl.constexpr,  # S is not a multiple of BLOCK_N
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # The last queries see the most: their programs come first, so that the short ones fill the gaps at the end.
    block, b, h = program_place(T, H, BLOCK_M, True)
    start = block * BLOCK_M
    m = start + tl.arange(0, BLOCK_M)
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + b).to(tl.int32)
    lo, hi = keys_seen(m, offset, starts_ptr, ends_ptr, T, S, IS_CAUSAL)
    q = load_rows(q_ptr + b * q_stride_b + h * q_stride_h, start, q_stride_t, T, D, BLOCK_M, BLOCK_D, True)
    k_ptr += b * k_stride_b + h // group * k_stride_g
    v_ptr += b * v_stride_b + h // group * v_stride_g
    DROPS: tl.constexpr = seed_ptr is not None
    if DROPS:
        drop_key = tile_key(tl.load(seed_ptr), stream, b * H + h)
    scale *= 1.4426950408889634  # in units of log 2
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    first, whole_first, whole_last, last = key_blocks(
        lo, hi, start, offset, T, S, starts_ptr is not None, IS_CAUSAL, BLOCK_M, BLOCK_N
    )
    for begin in range(first, last, BLOCK_N):
        k = load_rows(k_ptr, begin, k_stride_s, S, D, BLOCK_N, BLOCK_D, RAGGED)
        v = load_rows(v_ptr, begin, v_stride_s, S, D, BLOCK_N, BLOCK_D, RAGGED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        if (begin < whole_first) | (begin >= whole_last):
            n = begin + tl.arange(0, BLOCK_N)
            s = tl.where((n[None, :] >= lo[:, None]) & (n[None, :] < hi[:, None]), s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1) * scale)
        known = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: -inf - -inf is not to become NaN
        p = tl.exp2(s * scale - known[:, None])  # one instruction and the exponential
        shrink = tl.exp2(top - known)
        total = total * shrink + tl.sum(p, 1)
        if DROPS:
            p = tl.where(keep_tile(drop_key, start, begin, threshold, BLOCK_M, BLOCK_N), p, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = higher
    o = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # a query that sees no key: 0
    if DROPS:
        o *= keep_scale
    store_rows(o_ptr + b * o_stride_b + h * o_stride_h, start, o_stride_t, T, o, D, BLOCK_M, BLOCK_D)
    if lse_ptr is not None:
        store_lse(lse_ptr, (b * H + h) * T + m, top, total, m < T, q_ptr.dtype.element_ty == tl.float32)
