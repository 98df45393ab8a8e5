"""The backward pass in two kernels, each of which owns what it writes, so that nothing is summed by atomics.

With P the weights, dP = dO V^T and delta = rowsum(dO * O):
    dS = P * (dP - delta),  dQ = dS K,  dK = dS^T Q,  dV = P^T dO
P is computed anew from Q, K and the logarithm of its row's sum, once in each kernel: seven products where five would do
if dQ were summed by atomics, in an order that changes from call to call.
"""

from fusedlm.kernels._philox import keep_mask_2d
from fusedlm.kernels._triton import tl, triton
from fusedlm.kernels.attention.forward import key_bounds


@triton.jit
def delta_kernel(
    o_ptr, do_ptr, delta_ptr, o_stride_b, o_stride_h, o_stride_t, do_stride_b, do_stride_h, do_stride_t, H, T,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BLOCK_M)
    bh = tl.program_id(0) // blocks
    b = tl.cast(bh // H, tl.int64)
    h = tl.cast(bh % H, tl.int64)
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    inside = (m < T)[:, None] & (d < D)[None, :]
    at = m[:, None].to(tl.int64)
    o = tl.load(o_ptr + b * o_stride_b + h * o_stride_h + at * o_stride_t + d[None, :], mask=inside, other=0.0)
    do = tl.load(do_ptr + b * do_stride_b + h * do_stride_h + at * do_stride_t + d[None, :], mask=inside, other=0.0)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + tl.cast(bh, tl.int64) * T + m, delta, mask=m < T)


@triton.jit
def _dq_blocks(
    dq,
    q,
    do,
    lse,
    delta,
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
    keep_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    DROPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
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
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        p = tl.exp2(s - lse[:, None])
        if MASKED:
            p = tl.where((n[None, :] >= lo[:, None]) & (n[None, :] < hi[:, None]), p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if DROPS:
            dp = tl.where(keep_mask_2d(seed, stream, row, start // 8, threshold, BLOCK_N), dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["offset", "stream", "threshold"])
def dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
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
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # A program a block of queries, as in the forward pass.
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
    k_ptr += b * k_stride_b + h // group * k_stride_g
    v_ptr += b * v_stride_b + h // group * v_stride_g
    valid = m < T
    inside = valid[:, None] & (d < D)[None, :]
    at = m[:, None].to(tl.int64)
    q = tl.load(q_ptr + b * q_stride_b + h * q_stride_h + at * q_stride_t + d[None, :], mask=inside, other=0.0)
    do = tl.load(do_ptr + b * do_stride_b + h * do_stride_h + at * do_stride_t + d[None, :], mask=inside, other=0.0)
    row = tl.cast(bh, tl.int64) * T + m
    lse = tl.load(lse_ptr + row, mask=valid, other=float("inf"))  # so past the end every weight is 0
    delta = tl.load(delta_ptr + row, mask=valid, other=0.0)
    DROPS: tl.constexpr = seed_ptr is not None
    seed = tl.load(seed_ptr) if DROPS else 0
    scale2 = scale * 1.4426950408889634
    first = tl.min(tl.where(valid, lo, S), 0) // BLOCK_N * BLOCK_N
    last = tl.max(hi, 0)
    whole_first = tl.cdiv(tl.max(lo, 0), BLOCK_N) * BLOCK_N
    whole_last = tl.min(tl.where(valid, hi, S), 0) // BLOCK_N * BLOCK_N
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if starts_ptr is not None:
        whole_first = tl.minimum(whole_first, tl.cdiv(last, BLOCK_N) * BLOCK_N)
        dq = _dq_blocks(
            dq, q, do, lse, delta, k_ptr, v_ptr, k_stride_s, v_stride_s, first, whole_first, lo, hi, row, S, scale2,
            seed, stream, threshold, keep_scale, D, BLOCK_D, BLOCK_N, True, DROPS, PRECISION,
        )  # fmt: skip
    dq = _dq_blocks(
        dq, q, do, lse, delta, k_ptr, v_ptr, k_stride_s, v_stride_s, whole_first, whole_last, lo, hi, row, S, scale2,
        seed, stream, threshold, keep_scale, D, BLOCK_D, BLOCK_N, False, DROPS, PRECISION,
    )  # fmt: skip
    dq = _dq_blocks(
        dq, q, do, lse, delta, k_ptr, v_ptr, k_stride_s, v_stride_s, tl.maximum(whole_first, whole_last), last, lo, hi,
        row, S, scale2, seed, stream, threshold, keep_scale, D, BLOCK_D, BLOCK_N, True, DROPS, PRECISION,
    )  # fmt: skip
    dq *= scale
    dq_ptr += b * dq_stride_b + h * dq_stride_h
    tl.store(dq_ptr + at * dq_stride_t + d[None, :], dq.to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dkv_blocks(
    dk,
    dv,
    k,
    v,
    q_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    q_stride_t,
    do_stride_t,
    begin,
    end,
    n,
    lo,
    hi,
    base,
    T,
    scale,
    seed,
    stream,
    threshold,
    keep_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    DROPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Queries from begin to end, multiples of BLOCK_M. All tiles lie on their side, (BLOCK_N, BLOCK_M): so what one
    product gives is the left operand of the next, and need not be turned."""
    d = tl.arange(0, BLOCK_D)
    i = tl.arange(0, BLOCK_M)
    for start in range(begin, end, BLOCK_M):
        m = start + i
        valid = m < T
        inside = valid[:, None] & (d < D)[None, :]
        q_tile, do_tile = q_ptr + tl.cast(start, tl.int64) * q_stride_t, do_ptr + tl.cast(start, tl.int64) * do_stride_t
        q = tl.load(q_tile + (i[:, None] * q_stride_t + d[None, :]), mask=inside, other=0.0)
        do = tl.load(do_tile + (i[:, None] * do_stride_t + d[None, :]), mask=inside, other=0.0)
        lse = tl.load(lse_ptr + m, mask=valid, other=float("inf"))
        delta = tl.load(delta_ptr + m, mask=valid, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        p = tl.exp2(s - lse[None, :])
        if MASKED:
            p = tl.where((m[None, :] >= lo[:, None]) & (m[None, :] < hi[:, None]), p, 0.0)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        dropped = p
        if DROPS:
            first = tl.min(n, 0) // 8
            keep = tl.trans(keep_mask_2d(seed, stream, base + m, first, threshold, BLOCK_N))
            dropped = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


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
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # A program a block of keys of one key/value head; it goes over all queries of all heads that share it.
    blocks = tl.cdiv(S, BLOCK_N)
    block = tl.program_id(0) % blocks  # the first keys are seen by the most
    G = H // group
    b = tl.cast(tl.program_id(0) // blocks // G, tl.int64)
    g = tl.cast(tl.program_id(0) // blocks % G, tl.int64)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    valid = n < S
    inside = valid[:, None] & (d < D)[None, :]
    at = n[:, None].to(tl.int64)
    k = tl.load(k_ptr + b * k_stride_b + g * k_stride_g + at * k_stride_s + d[None, :], mask=inside, other=0.0)
    v = tl.load(v_ptr + b * v_stride_b + g * v_stride_g + at * v_stride_s + d[None, :], mask=inside, other=0.0)
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + b).to(tl.int32)
    # [lo, hi) of the queries that see each key.
    if starts_ptr is not None:
        hi = tl.load(ends_ptr + n, mask=valid, other=0)
        lo = n if IS_CAUSAL else tl.load(starts_ptr + n, mask=valid, other=0)
    else:
        hi = n * 0 + T
        lo = tl.maximum(n - offset, 0) if IS_CAUSAL else n * 0
    hi = tl.where(valid, tl.maximum(hi, lo), lo)
    first = tl.min(tl.where(valid, lo, T), 0) // BLOCK_M * BLOCK_M
    last = tl.max(tl.where(valid, hi, 0), 0)
    whole_first = tl.cdiv(tl.max(tl.where(valid, lo, 0), 0), BLOCK_M) * BLOCK_M
    whole_first = tl.minimum(whole_first, tl.cdiv(last, BLOCK_M) * BLOCK_M)
    whole_last = tl.min(tl.where(valid, hi, T), 0)
    if starts_ptr is not None:
        whole_last = whole_last // BLOCK_M * BLOCK_M
    DROPS: tl.constexpr = seed_ptr is not None
    seed = tl.load(seed_ptr) if DROPS else 0
    scale2 = scale * 1.4426950408889634
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for i in range(group):
        h = g * group + i
        base = (b * H + h) * T
        qs, dos = q_ptr + b * q_stride_b + h * q_stride_h, do_ptr + b * do_stride_b + h * do_stride_h
        dk, dv = _dkv_blocks(
            dk, dv, k, v, qs, dos, lse_ptr + base, delta_ptr + base, q_stride_t, do_stride_t, first, whole_first, n,
            lo, hi, base, T, scale2, seed, stream, threshold, keep_scale, D, BLOCK_D, BLOCK_M, BLOCK_N, True, DROPS,
            PRECISION,
        )  # fmt: skip
        dk, dv = _dkv_blocks(
            dk, dv, k, v, qs, dos, lse_ptr + base, delta_ptr + base, q_stride_t, do_stride_t, whole_first, whole_last,
            n, lo, hi, base, T, scale2, seed, stream, threshold, keep_scale, D, BLOCK_D, BLOCK_M, BLOCK_N, False,
            DROPS, PRECISION,
        )  # fmt: skip
        if starts_ptr is not None:
            dk, dv = _dkv_blocks(
                dk, dv, k, v, qs, dos, lse_ptr + base, delta_ptr + base, q_stride_t, do_stride_t,
                tl.maximum(whole_first, whole_last), last, n, lo, hi, base, T, scale2, seed, stream, threshold,
                keep_scale, D, BLOCK_D, BLOCK_M, BLOCK_N, True, DROPS, PRECISION,
            )  # fmt: skip
    dk *= scale
    if DROPS:
        dv *= keep_scale
    dk_ptr += b * dk_stride_b + g * dk_stride_g
    dv_ptr += b * dv_stride_b + g * dv_stride_g
    tl.store(dk_ptr + at * dk_stride_s + d[None, :], dk.to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + at * dv_stride_s + d[None, :], dv.to(dv_ptr.dtype.element_ty), mask=inside)
