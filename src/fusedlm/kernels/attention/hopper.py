"""For Hopper, what goes over keys: the forward pass and dQ. Tiles come by TMA, warps have different jobs.

One warp loads; two groups of four warps compute, and fill each other's gaps: while one waits for its products, the
other has its exponentials. A group owns 64 queries. In the forward pass the scores of the next block are being computed
while the softmax of this one is (Shah et al. 2024, FlashAttention-3, algorithm 2). The arithmetic is that of `forward`
and `backward`.
"""

from fusedlm.kernels._gluon import gl, gluon, hopper, tma_load, tma_store


@gluon.jit
def _load_keys(queries, keys, barriers, place, count, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """The producer of the kernels that own queries. queries: (descriptors, tiles) of all that have queries as rows."""
    query_descs, query_tiles = queries
    k_desc, v_desc, k_tiles, v_tiles = keys
    q_full, k_full, k_empty, v_full, v_empty = barriers
    b, h, g, start = place
    KINDS: gl.constexpr = len(query_descs)
    for w in gl.static_range(2):
        hopper.mbarrier.expect(q_full.index(w), KINDS * query_descs[0].block_type.nbytes)
        for j in gl.static_range(KINDS):
            desc = query_descs[j]
            q_tile = query_tiles[j].index(w).reshape(desc.block_type.shape)
            tma_load(desc, [b, h, start + 64 * w, 0], q_full.index(w), q_tile)
    for i in range(count):
        slot = i % STAGES
        phase = i // STAGES & 1 ^ 1
        at = (count - 1 - i) * BLOCK_N  # from the last keys to the first: those that need a mask come first
        hopper.mbarrier.wait(k_empty.index(slot), phase)
        hopper.mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
        tile = k_tiles.index(slot).reshape(k_desc.block_type.shape)
        tma_load(k_desc, [b, g, at, 0], k_full.index(slot), tile)
        hopper.mbarrier.wait(v_empty.index(slot), phase)
        hopper.mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
        tile = v_tiles.index(slot).reshape(v_desc.block_type.shape)
        tma_load(v_desc, [b, g, at, 0], v_full.index(slot), tile)


@gluon.jit
def _key_barriers(STAGES: gl.constexpr):
    """(q_full, k_full, k_empty, v_full, v_empty): of both groups' queries, and of each slot of keys and values."""
    LAYOUT: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], LAYOUT)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], LAYOUT)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], LAYOUT)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], LAYOUT)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], LAYOUT)
    for i in gl.static_range(2):
        hopper.mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        hopper.mbarrier.init(k_full.index(i), count=1)
        hopper.mbarrier.init(v_full.index(i), count=1)
        hopper.mbarrier.init(k_empty.index(i), count=2)  # both groups have read it
        hopper.mbarrier.init(v_empty.index(i), count=2)
    return q_full, k_full, k_empty, v_full, v_empty


@gluon.jit
def _query_place(offset_ptr, H, T, S, offset, IS_CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr):
    """(sequence, head, first query, its offset, blocks of keys) of a program of 128 queries."""
    blocks = gl.cdiv(T, 128)
    start = (blocks - 1 - gl.program_id(0) % blocks) * 128  # the last queries see the most and come first
    bh = gl.program_id(0) // blocks
    b = bh // H
    if offset_ptr is not None:
        offset = gl.load(offset_ptr + b).to(gl.int32)
    last = S
    if IS_CAUSAL:
        last = gl.minimum(gl.minimum(start + 128, T) + offset, S)
    return b, bh % H, start, offset, gl.cdiv(gl.maximum(last, 0), BLOCK_N)


@gluon.jit
def _weights(s, top, total, hi, least, at, scale, BLOCK_N: gl.constexpr, S_LAYOUT: gl.constexpr):
    """(exponentials, their running sum and maximum, what the sum so far was multiplied by) of a block of scores."""
    if at + BLOCK_N > least:
        n = at + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
        s = gl.where(n[None, :] < hi[:, None], s, float("-inf"))
    higher = gl.maximum(top, gl.max(s, 1) * scale)
    known = gl.where(higher == float("-inf"), 0.0, higher)
    p = gl.exp2(s * scale - known[:, None])
    shrink = gl.exp2(top - known)
    total = total * shrink + gl.sum(p, 1)
    return p, total, higher, shrink


@gluon.jit
def _attend(
    o_desc, buffers, barriers, place, count, numbers, lse_ptr,
    W: gl.constexpr, IS_CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q_tiles, k_tiles, v_tiles = buffers
    q_full, k_full, k_empty, v_full, v_empty = barriers
    b, h, row, start = place
    T, S, offset, scale = numbers
    BLOCK_D: gl.constexpr = q_tiles.type.shape[2]
    dtype: gl.constexpr = q_tiles.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    start += 64 * W
    m = start + gl.arange(0, 64, layout=gl.SliceLayout(1, S_LAYOUT))
    if IS_CAUSAL:
        hi = gl.minimum(m + 1 + offset, S)
        least = gl.minimum(start + 1 + offset, S)  # keys that every query sees
    else:
        hi = m * 0 + S
        least = S
    top = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, S_LAYOUT))
    acc = gl.zeros([64, BLOCK_D], gl.float32, O_LAYOUT)
    none = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
    if count > 0:
        hopper.mbarrier.wait(q_full.index(W), 0)
        q = q_tiles.index(W)
        hopper.mbarrier.wait(k_full.index(0), 0)
        s = hopper.warpgroup_mma(q, k_tiles.index(0).permute((1, 0)), none, use_acc=False, is_async=True)
        s = hopper.warpgroup_mma_wait(0, deps=(s,))
        hopper.mbarrier.arrive(k_empty.index(0))
        p, total, top, _ = _weights(s, top, total, hi, least, (count - 1) * BLOCK_N, scale, BLOCK_N, S_LAYOUT)
        p = gl.convert_layout(p.to(dtype), P_LAYOUT)
        for i in range(1, count):
            slot = i % STAGES
            before = (i - 1) % STAGES
            hopper.mbarrier.wait(k_full.index(slot), i // STAGES & 1)
            s = hopper.warpgroup_mma(q, k_tiles.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
            hopper.mbarrier.wait(v_full.index(before), (i - 1) // STAGES & 1)
            acc = hopper.warpgroup_mma(p, v_tiles.index(before), acc, is_async=True)
            s = hopper.warpgroup_mma_wait(1, deps=(s,))
            hopper.mbarrier.arrive(k_empty.index(slot))
            weights, total, top, shrink = _weights(
                s, top, total, hi, least, (count - 1 - i) * BLOCK_N, scale, BLOCK_N, S_LAYOUT
            )
            acc, p = hopper.warpgroup_mma_wait(0, deps=(acc, p))
            hopper.mbarrier.arrive(v_empty.index(before))
            acc *= gl.convert_layout(shrink, gl.SliceLayout(1, O_LAYOUT))[:, None]
            p = gl.convert_layout(weights.to(dtype), P_LAYOUT)
        slot = (count - 1) % STAGES
        hopper.mbarrier.wait(v_full.index(slot), (count - 1) // STAGES & 1)
        acc = hopper.warpgroup_mma(p, v_tiles.index(slot), acc, is_async=True)
        acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
    lse = top + gl.log2(total)
    total = gl.where(total == 0.0, 1.0, total)  # a query that sees no key: 0
    o = acc / gl.convert_layout(total, gl.SliceLayout(1, O_LAYOUT))[:, None]
    gl.store(lse_ptr + row + m, lse, mask=m < T)
    if count == 0:  # nobody asked for them, but the tile is written to
        hopper.mbarrier.wait(q_full.index(W), 0)
    q_tiles.index(W).store(o.to(dtype))
    hopper.fence_async_shared()
    tile = q_tiles.index(W).reshape(o_desc.block_type.shape)
    tma_store(o_desc, [b, h, start, 0], tile)
    hopper.tma.store_wait(0)


@gluon.jit(do_not_specialize=["offset"])
def hopper_fwd_kernel(
    q_desc,  # of (B, H, T, D), tiles of (1, 1, 64, BLOCK_D)
    k_desc,  # (B, G, S, D), (1, 1, BLOCK_N, BLOCK_D)
    v_desc,
    o_desc,
    lse_ptr,
    offset_ptr,
    H,
    group,
    T,
    S,
    offset,
    scale,
    IS_CAUSAL: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
):
    b, h, start, offset, count = _query_place(offset_ptr, H, T, S, offset, IS_CAUSAL, BLOCK_N)
    dtype: gl.constexpr = q_desc.dtype
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_D], dtype)
    q_tiles = gl.allocate_shared_memory(dtype, [2, 64, BLOCK_D], LAYOUT)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], LAYOUT)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], LAYOUT)
    barriers = _key_barriers(STAGES)
    buffers = (q_tiles, k_tiles, v_tiles)
    numbers = (T, S, offset, scale * 1.4426950408889634)
    place = (b, h, (b * H + h).to(gl.int64) * T, start)
    queries = ((q_desc,), (q_tiles,))
    keys = (k_desc, v_desc, k_tiles, v_tiles)
    gl.warp_specialize(
        [
            (_attend, (o_desc, buffers, barriers, place, count, numbers, lse_ptr, 0, IS_CAUSAL, BLOCK_N, STAGES)),
            (_attend, (o_desc, buffers, barriers, place, count, numbers, lse_ptr, 1, IS_CAUSAL, BLOCK_N, STAGES)),
            (_load_keys, (queries, keys, barriers, (b, h, h // group, start), count, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _sum_over_keys(
    dq_desc, buffers, barriers, place, count, numbers, rows,
    W: gl.constexpr, IS_CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q_tiles, do_tiles, o_tiles, k_tiles, v_tiles = buffers
    q_full, k_full, k_empty, v_full, v_empty = barriers
    b, h, row, start = place
    T, S, offset, scale = numbers
    lse_ptr, delta_ptr = rows
    BLOCK_D: gl.constexpr = q_tiles.type.shape[2]
    dtype: gl.constexpr = q_tiles.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    start += 64 * W
    m = start + gl.arange(0, 64, layout=gl.SliceLayout(1, S_LAYOUT))
    if IS_CAUSAL:
        hi = gl.minimum(m + 1 + offset, S)
        least = gl.minimum(start + 1 + offset, S)  # keys that every query sees
    else:
        hi = m * 0 + S
        least = S
    lse = gl.load(lse_ptr + row + m, mask=m < T, other=float("inf"))  # so past the end every weight is 0
    hopper.mbarrier.wait(q_full.index(W), 0)
    q = q_tiles.index(W)
    do = do_tiles.index(W)
    delta = gl.sum(o_tiles.index(W).load(ROWS).to(gl.float32) * do.load(ROWS).to(gl.float32), 1)
    delta = gl.convert_layout(delta, gl.SliceLayout(1, S_LAYOUT))
    gl.store(delta_ptr + row + m, delta, mask=m < T)
    dq = gl.zeros([64, BLOCK_D], gl.float32, O_LAYOUT)
    none = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
    scale2 = scale * 1.4426950408889634
    for i in range(count):
        slot = i % STAGES
        phase = i // STAGES & 1
        at = (count - 1 - i) * BLOCK_N
        k = k_tiles.index(slot)
        hopper.mbarrier.wait(k_full.index(slot), phase)
        s = hopper.warpgroup_mma(q, k.permute((1, 0)), none, use_acc=False, is_async=True)
        hopper.mbarrier.wait(v_full.index(slot), phase)
        dp = hopper.warpgroup_mma(do, v_tiles.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
        s = hopper.warpgroup_mma_wait(1, deps=(s,))
        p = gl.exp2(s * scale2 - lse[:, None])
        if at + BLOCK_N > least:
            n = at + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
            p = gl.where(n[None, :] < hi[:, None], p, 0.0)
        dp = hopper.warpgroup_mma_wait(0, deps=(dp,))
        hopper.mbarrier.arrive(v_empty.index(slot))
        ds = gl.convert_layout((p * (dp - delta[:, None])).to(dtype), P_LAYOUT)
        dq = hopper.warpgroup_mma(ds, k, dq, is_async=True)
        dq, ds = hopper.warpgroup_mma_wait(0, deps=(dq, ds))
        hopper.mbarrier.arrive(k_empty.index(slot))
    o_tiles.index(W).store((dq * scale).to(dtype))
    hopper.fence_async_shared()
    tile = o_tiles.index(W).reshape(dq_desc.block_type.shape)
    tma_store(dq_desc, [b, h, start, 0], tile)
    hopper.tma.store_wait(0)


@gluon.jit(do_not_specialize=["offset"])
def hopper_dq_kernel(
    q_desc,  # of (B, H, T, D), tiles of (1, 1, 64, BLOCK_D)
    k_desc,  # (B, G, S, D), (1, 1, BLOCK_N, BLOCK_D)
    v_desc,
    o_desc,
    do_desc,
    dq_desc,
    lse_ptr,
    delta_ptr,  # written here, for the other kernel too
    offset_ptr,
    H,
    group,
    T,
    S,
    offset,
    scale,
    IS_CAUSAL: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
):
    b, h, start, offset, count = _query_place(offset_ptr, H, T, S, offset, IS_CAUSAL, BLOCK_N)
    dtype: gl.constexpr = q_desc.dtype
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_D], dtype)
    q_tiles = gl.allocate_shared_memory(dtype, [2, 64, BLOCK_D], LAYOUT)
    do_tiles = gl.allocate_shared_memory(dtype, [2, 64, BLOCK_D], LAYOUT)
    o_tiles = gl.allocate_shared_memory(dtype, [2, 64, BLOCK_D], LAYOUT)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], LAYOUT)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], LAYOUT)
    barriers = _key_barriers(STAGES)
    buffers = (q_tiles, do_tiles, o_tiles, k_tiles, v_tiles)
    numbers = (T, S, offset, scale)
    place = (b, h, (b * H + h).to(gl.int64) * T, start)
    queries = ((q_desc, do_desc, o_desc), (q_tiles, do_tiles, o_tiles))
    keys = (k_desc, v_desc, k_tiles, v_tiles)
    rows = (lse_ptr, delta_ptr)
    gl.warp_specialize(
        [
            (
                _sum_over_keys,
                (dq_desc, buffers, barriers, place, count, numbers, rows, 0, IS_CAUSAL, BLOCK_N, STAGES),
            ),
            (
                _sum_over_keys,
                (dq_desc, buffers, barriers, place, count, numbers, rows, 1, IS_CAUSAL, BLOCK_N, STAGES),
            ),
            (_load_keys, (queries, keys, barriers, (b, h, h // group, start), count, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
