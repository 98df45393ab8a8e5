"""For Hopper, what goes over queries: dK and dV. As in `hopper`, but that a group of warps owns 64 keys."""

from fusedlm.kernels._gluon import gl, gluon, hopper, tma_load, tma_store


@gluon.jit
def load_queries(
    descriptors, buffers, barriers, pointers, place, blocks, group, T, BLOCK_M: gl.constexpr, STAGES: gl.constexpr
):
    q_desc, k_desc, v_desc, do_desc = descriptors
    q_tiles, do_tiles, k_tiles, v_tiles, lse_rows, delta_rows = buffers
    kv_full, q_full, do_full, empty = barriers
    lse_ptr, delta_ptr = pointers
    b, H, g, start = place
    first, count = blocks
    ROWS: gl.constexpr = gl.BlockedLayout([BLOCK_M // 32], [32], [1], [0])
    hopper.mbarrier.expect(kv_full, 4 * k_desc.block_type.nbytes)
    for w in gl.static_range(2):
        k_tile = k_tiles.index(w).reshape(k_desc.block_type.shape)
        v_tile = v_tiles.index(w).reshape(v_desc.block_type.shape)
        tma_load(k_desc, [b, g, start + 64 * w, 0], kv_full, k_tile)
        tma_load(v_desc, [b, g, start + 64 * w, 0], kv_full, v_tile)
    for i in range(count * group):
        slot = i % STAGES
        h = g * group + i // count
        begin = first + i % count * BLOCK_M
        hopper.mbarrier.wait(empty.index(slot), i // STAGES & 1 ^ 1)
        hopper.mbarrier.expect(q_full.index(slot), q_desc.block_type.nbytes)
        q_tile = q_tiles.index(slot).reshape(q_desc.block_type.shape)
        tma_load(q_desc, [b, h, begin, 0], q_full.index(slot), q_tile)
        hopper.mbarrier.expect(do_full.index(slot), do_desc.block_type.nbytes)
        do_tile = do_tiles.index(slot).reshape(do_desc.block_type.shape)
        tma_load(do_desc, [b, h, begin, 0], do_full.index(slot), do_tile)
        m = begin + gl.arange(0, BLOCK_M, layout=ROWS)
        row = (b * H + h).to(gl.int64) * T
        # Past the end: every weight is 0.
        lse_rows.index(slot).store(gl.load(lse_ptr + row + m, mask=m < T, other=float("inf")))
        delta_rows.index(slot).store(gl.load(delta_ptr + row + m, mask=m < T, other=0.0))
        hopper.mbarrier.arrive(q_full.index(slot))


@gluon.jit
def _sum_over_queries(
    descriptors, buffers, barriers, place, blocks, group, offset, scale,
    W: gl.constexpr, IS_CAUSAL: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dk_desc, dv_desc = descriptors
    q_tiles, do_tiles, k_tiles, v_tiles, lse_rows, delta_rows = buffers
    kv_full, q_full, do_full, empty = barriers
    b, g, start = place
    first, count = blocks
    BLOCK_D: gl.constexpr = q_tiles.type.shape[2]
    dtype: gl.constexpr = q_tiles.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])  # keys lie along rows
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    start += 64 * W
    # The first query that sees each key; from `whole` on, queries see every key of the group.
    lo = start + gl.arange(0, 64, layout=gl.SliceLayout(1, S_LAYOUT)) - offset
    whole = start + 63 - offset
    dk = gl.zeros([64, BLOCK_D], gl.float32, O_LAYOUT)
    dv = gl.zeros([64, BLOCK_D], gl.float32, O_LAYOUT)
    none = gl.zeros([64, BLOCK_M], gl.float32, S_LAYOUT)
    hopper.mbarrier.wait(kv_full, 0)
    k = k_tiles.index(W)
    v = v_tiles.index(W)
    scale2 = scale * 1.4426950408889634
    for i in range(count * group):
        slot = i % STAGES
        phase = i // STAGES & 1
        begin = first + i % count * BLOCK_M
        q = q_tiles.index(slot)
        do = do_tiles.index(slot)
        hopper.mbarrier.wait(q_full.index(slot), phase)
        lse = lse_rows.index(slot).load(gl.SliceLayout(0, S_LAYOUT))
        s = hopper.warpgroup_mma(k, q.permute((1, 0)), none, use_acc=False, is_async=True)
        hopper.mbarrier.wait(do_full.index(slot), phase)
        dp = hopper.warpgroup_mma(v, do.permute((1, 0)), none, use_acc=False, is_async=True)
        s = hopper.warpgroup_mma_wait(1, deps=(s,))
        p = gl.exp2(s * scale2 - lse[None, :])
        if IS_CAUSAL:  # noqa: SIM102
            if begin < whole:
                m = begin + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, S_LAYOUT))
                p = gl.where(m[None, :] >= lo[:, None], p, 0.0)
        weights = gl.convert_layout(p.to(dtype), P_LAYOUT)
        dv = hopper.warpgroup_mma(weights, do, dv, is_async=True)
        dp = hopper.warpgroup_mma_wait(1, deps=(dp,))
        delta = delta_rows.index(slot).load(gl.SliceLayout(0, S_LAYOUT))
        ds = gl.convert_layout((p * (dp - delta[None, :])).to(dtype), P_LAYOUT)
        dk = hopper.warpgroup_mma(ds, q, dk, is_async=True)
        dk, dv, weights, ds = hopper.warpgroup_mma_wait(0, deps=(dk, dv, weights, ds))
        hopper.mbarrier.arrive(empty.index(slot))
    k_tiles.index(W).store((dk * scale).to(dtype))
    v_tiles.index(W).store(dv.to(dtype))
    hopper.fence_async_shared()
    k_tile = k_tiles.index(W).reshape(dk_desc.block_type.shape)
    v_tile = v_tiles.index(W).reshape(dv_desc.block_type.shape)
    tma_store(dk_desc, [b, g, start, 0], k_tile)
    tma_store(dv_desc, [b, g, start, 0], v_tile)
    hopper.tma.store_wait(0)


@gluon.jit
def key_place(G, S, TOGETHER: gl.constexpr):
    """(sequence, key/value head, first key) of a program of 128 keys.

    The first keys are seen by the most queries: of TOGETHER heads at once they come first, so that programs that end
    late have little to do, and the queries of so many heads fit the cache.
    """
    steps = gl.cdiv(S, 128)
    first_head = gl.program_id(0) // (TOGETHER * steps) * TOGETHER
    within = gl.program_id(0) % (TOGETHER * steps)
    if TOGETHER == 1:  # fewer registers, which D = 128 has none to spare of
        start = within * 128
        head = first_head
    else:
        width = gl.minimum(gl.num_programs(0) // steps - first_head, TOGETHER)
        start = within // width * 128
        head = first_head + within % width
    return head // G, head % G, start


@gluon.jit(do_not_specialize=["offset"])
def hopper_dkv_kernel(
    q_desc,  # of (B, H, T, D), tiles of (1, 1, BLOCK_M, BLOCK_D)
    k_desc,  # (B, G, S, D), (1, 1, 64, BLOCK_D)
    v_desc,
    do_desc,
    dk_desc,
    dv_desc,
    lse_ptr,
    delta_ptr,
    offset_ptr,
    H,
    group,
    T,
    S,
    offset,
    scale,
    IS_CAUSAL: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
    TOGETHER: gl.constexpr,
):
    b, g, start = key_place(H // group, S, TOGETHER)
    if offset_ptr is not None:
        offset = gl.load(offset_ptr + b).to(gl.int32)
    first = 0
    if IS_CAUSAL:
        first = gl.maximum(start - offset, 0) // BLOCK_M * BLOCK_M
    count = gl.cdiv(gl.maximum(T - first, 0), BLOCK_M)
    dtype: gl.constexpr = q_desc.dtype
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_D], dtype)
    ROW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_tiles = gl.allocate_shared_memory(dtype, [2, 64, BLOCK_D], LAYOUT)
    v_tiles = gl.allocate_shared_memory(dtype, [2, 64, BLOCK_D], LAYOUT)
    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_D], LAYOUT)
    do_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_D], LAYOUT)
    lse_rows = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], ROW)
    delta_rows = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], ROW)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], hopper.mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    hopper.mbarrier.init(kv_full, count=1)
    for i in gl.static_range(STAGES):
        hopper.mbarrier.init(q_full.index(i), count=2)  # the copy, and the rows beside it
        hopper.mbarrier.init(do_full.index(i), count=1)
        hopper.mbarrier.init(empty.index(i), count=2)  # both groups have read it
    buffers = (q_tiles, do_tiles, k_tiles, v_tiles, lse_rows, delta_rows)
    barriers = (kv_full, q_full, do_full, empty)
    blocks = (first, count)
    place = (b, g, start)
    outputs = (dk_desc, dv_desc)
    inputs = (q_desc, k_desc, v_desc, do_desc)
    pointers = (lse_ptr, delta_ptr)
    gl.warp_specialize(
        [
            (
                _sum_over_queries,
                (outputs, buffers, barriers, place, blocks, group, offset, scale, 0, IS_CAUSAL, BLOCK_M, STAGES),
            ),
            (
                _sum_over_queries,
                (outputs, buffers, barriers, place, blocks, group, offset, scale, 1, IS_CAUSAL, BLOCK_M, STAGES),
            ),
            (
                load_queries,
                (inputs, buffers, barriers, pointers, (b, H, g, start), blocks, group, T, BLOCK_M, STAGES),
            ),
        ],
        [4, 1],
        [240, 24],
    )
