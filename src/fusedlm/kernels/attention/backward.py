"""The backward pass in two kernels, each of which owns what it writes, so that nothing is summed by atomics.

With P the weights, dP = dO V^T and delta = rowsum(dO * O):
    dS = P * (dP - delta),  dQ = dS K,  dK = dS^T Q,  dV = P^T dO
P is computed anew from Q, K and the logarithm of its row's sum, once in each kernel: seven products where five would do
if dQ were summed by atomics, in an order that changes from call to call.
"""

from fusedlm.kernels._philox import keep_tile, tile_key
from fusedlm.kernels._triton import tl, triton
from fusedlm.kernels.attention.tiles import (
    key_blocks,
    keys_seen,
    load_lse,
    load_rows,
    program_place,
    queries_seeing,
    query_blocks,
    store_rows,
)


@triton.jit(do_not_specialize=["offset", "stream", "threshold"])
def dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,  # written here, for the other kernel too
    dq_ptr,
    offset_ptr,
    starts_ptr,
    ends_ptr,
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
    do_stride_b,
    do_stride_h,
    do_stride_t,
    dq_stride_b,
    dq_stride_h,
    dq_stride_t,
    H,
    group,
    T,
    S,
    offset,
    scale,
    stream,
    threshold,
    keep_scale,
    D: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    RAGGED: tl.constexpr,  # what the loop goes over is not whole blocks
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # A program a block of queries, as in the forward pass.
    block, b, h = program_place(T, H, BLOCK_M, True)
    start = block * BLOCK_M
    m = start + tl.arange(0, BLOCK_M)
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + b).to(tl.int32)
    lo, hi = keys_seen(m, offset, starts_ptr, ends_ptr, T, S, IS_CAUSAL)
    valid = m < T
    row = (b * H + h) * T + m
    q = load_rows(q_ptr + b * q_stride_b + h * q_stride_h, start, q_stride_t, T, D, BLOCK_M, BLOCK_D, True)
    do = load_rows(do_ptr + b * do_stride_b + h * do_stride_h, start, do_stride_t, T, D, BLOCK_M, BLOCK_D, True)
    WIDE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    lse, rest = load_lse(lse_ptr, row, valid, WIDE)
    o = load_rows(o_ptr + b * o_stride_b + h * o_stride_h, start, o_stride_t, T, D, BLOCK_M, BLOCK_D, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + row, delta, mask=valid)
    k_ptr += b * k_stride_b + h // group * k_stride_g
    v_ptr += b * v_stride_b + h // group * v_stride_g
    DROPS: tl.constexpr = seed_ptr is not None
    if DROPS:
        drop_key = tile_key(tl.load(seed_ptr), stream, b * H + h)
    scale2 = scale * 1.4426950408889634
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    first, whole_first, whole_last, last = key_blocks(
        lo, hi, start, offset, T, S, starts_ptr is not None, IS_CAUSAL, BLOCK_M, BLOCK_N
    )
    for begin in range(first, last, BLOCK_N):
        k = load_rows(k_ptr, begin, k_stride_s, S, D, BLOCK_N, BLOCK_D, RAGGED)
        v = load_rows(v_ptr, begin, v_stride_s, S, D, BLOCK_N, BLOCK_D, RAGGED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        x = s * scale2 - lse[:, None]
        p = tl.exp2(x - rest[:, None] if WIDE else x)
        if (begin < whole_first) | (begin >= whole_last):
            n = begin + tl.arange(0, BLOCK_N)
            p = tl.where((n[None, :] >= lo[:, None]) & (n[None, :] < hi[:, None]), p, 0.0)
        if DROPS:
            dp = tl.where(keep_tile(drop_key, start, begin, threshold, BLOCK_M, BLOCK_N), dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    store_rows(dq_ptr + b * dq_stride_b + h * dq_stride_h, start, dq_stride_t, T, dq * scale, D, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=["offset", "stream", "threshold"])
def dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    offset_ptr,
    starts_ptr,
    ends_ptr,
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
    do_stride_b,
    do_stride_h,
    do_stride_t,
    dk_stride_b,
    dk_stride_g,
    dk_stride_s,
    dv_stride_b,
    dv_stride_g,
    dv_stride_s,
    H,
    group,
    T,
    S,
    offset,
    scale,
    stream,
    threshold,
    keep_scale,
    D: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    RAGGED: tl.constexpr,  # what the loop goes over is not whole blocks
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # A program a block of keys of one key/value head, for all heads that share it. The first keys are seen by the most.
    block, b, g = program_place(S, H // group, BLOCK_N, False)
    start = block * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr + b * k_stride_b + g * k_stride_g, start, k_stride_s, S, D, BLOCK_N, BLOCK_D, True)
    v = load_rows(v_ptr + b * v_stride_b + g * v_stride_g, start, v_stride_s, S, D, BLOCK_N, BLOCK_D, True)
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + b).to(tl.int32)
    lo, hi = queries_seeing(n, offset, starts_ptr, ends_ptr, T, S, IS_CAUSAL)
    first, whole_first, whole_last, last = query_blocks(
        lo, hi, start, offset, T, S, starts_ptr is not None, IS_CAUSAL, BLOCK_M, BLOCK_N
    )
    DROPS: tl.constexpr = seed_ptr is not None
    if DROPS:
        seed = tl.load(seed_ptr)
    WIDE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    scale2 = scale * 1.4426950408889634
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for i in range(group):
        h = g * group + i
        base = (b * H + h) * T
        q_head, do_head = q_ptr + b * q_stride_b + h * q_stride_h, do_ptr + b * do_stride_b + h * do_stride_h
        if DROPS:
            drop_key = tile_key(seed, stream, b * H + h)
        # Tiles lie on their side, (BLOCK_N, BLOCK_M): so what one product gives is the left operand of the next.
        for begin in range(first, last, BLOCK_M):
            m = begin + tl.arange(0, BLOCK_M)
            q = load_rows(q_head, begin, q_stride_t, T, D, BLOCK_M, BLOCK_D, RAGGED)
            do = load_rows(do_head, begin, do_stride_t, T, D, BLOCK_M, BLOCK_D, RAGGED)
            lse, rest = load_lse(lse_ptr, base + m, m < T, WIDE)
            delta = tl.load(delta_ptr + base + m, mask=m < T, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            x = s * scale2 - lse[None, :]
            p = tl.exp2(x - rest[None, :] if WIDE else x)
            if (begin < whole_first) | (begin >= whole_last):
                p = tl.where((m[None, :] >= lo[:, None]) & (m[None, :] < hi[:, None]), p, 0.0)
            dropped = p
            if DROPS:
                keep = tl.trans(keep_tile(drop_key, begin, start, threshold, BLOCK_M, BLOCK_N))
                dropped = tl.where(keep, p, 0.0)
                dp = tl.where(keep, dp * keep_scale, 0.0)
            dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    if DROPS:
        dv *= keep_scale
    store_rows(dk_ptr + b * dk_stride_b + g * dk_stride_g, start, dk_stride_s, S, dk * scale, D, BLOCK_N, BLOCK_D)
    store_rows(dv_ptr + b * dv_stride_b + g * dv_stride_g, start, dv_stride_s, S, dv, D, BLOCK_N, BLOCK_D)
