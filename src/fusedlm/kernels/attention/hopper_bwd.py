"""For Hopper, the whole backward pass in five products. As `hopper_dkv`, and a third group of warps sums up dQ.

A program owns 128 keys and goes over queries. Its two groups leave dS of their 64 keys in shared memory. From there the
third multiplies it by K, the sum over the program's keys, and adds that in fp32 to what other programs add, by TMA,
while the two are at the next queries. In which order programs add is for the hardware to choose: the last bits of dQ
differ from call to call. What comes before and after is in `fused`.
"""

from fusedlm.kernels._gluon import gl, gluon, hopper, tma_add, tma_store
from fusedlm.kernels.attention.hopper_dkv import key_place, load_queries


@gluon.jit
def _differentiate(
    descriptors, buffers, barriers, handed, place, blocks, numbers,
    W: gl.constexpr, IS_CAUSAL: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, DS_STAGES: gl.constexpr,
):  # fmt: skip
    """One of the two groups: dK and dV of 64 keys, and their dS^T for the third."""
    dk_desc, dv_desc = descriptors
    q_tiles, do_tiles, k_tiles, v_tiles, lse_rows, delta_rows = buffers
    kv_full, q_full, do_full, empty = barriers
    ds_tiles, ds_full, ds_empty = handed
    b, g, start = place
    first, count, group = blocks
    S, offset, scale = numbers
    BLOCK_D: gl.constexpr = q_tiles.type.shape[2]
    dtype: gl.constexpr = q_tiles.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])  # keys lie along rows
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    start += 64 * W
    # The first query that sees each key; from `whole` on, queries see every key of the group. Keys past the end are
    # zeros, but a weight of theirs may be infinite, and infinity times zero is no number: no query sees them.
    n = start + gl.arange(0, 64, layout=gl.SliceLayout(1, S_LAYOUT))
    if IS_CAUSAL:
        lo = gl.where(n < S, n - offset, 2**30)
        whole = start + 63 - offset
    else:
        lo = gl.where(n < S, 0, 2**30)
        whole = 0
    if start + 64 > S:
        whole = 2**30
    dk = gl.zeros([64, BLOCK_D], gl.float32, O_LAYOUT)
    dv = gl.zeros([64, BLOCK_D], gl.float32, O_LAYOUT)
    none = gl.zeros([64, BLOCK_M], gl.float32, S_LAYOUT)
    hopper.mbarrier.wait(kv_full, 0)
    k = k_tiles.index(W)
    v = v_tiles.index(W)
    scale2 = scale * 1.4426950408889634
    total = count * group
    # Scores are asked for one block early, behind dK: so the tensor core goes from one to the other, and dP is computed
    # while the exponentials are. They are waited for in the same iteration, as ptxas wants it of what a loop carries.
    hopper.mbarrier.wait(q_full.index(0), 0, pred=total > 0)
    s = hopper.warpgroup_mma(k, q_tiles.index(0).permute((1, 0)), none, use_acc=False, is_async=True)
    s = hopper.warpgroup_mma_wait(0, deps=(s,))
    for i in range(total):
        slot = i % STAGES
        phase = i // STAGES & 1
        begin = first + i % count * BLOCK_M
        q = q_tiles.index(slot)
        do = do_tiles.index(slot)
        lse = lse_rows.index(slot).load(gl.SliceLayout(0, S_LAYOUT))
        hopper.mbarrier.wait(do_full.index(slot), phase)
        dp = hopper.warpgroup_mma(v, do.permute((1, 0)), none, use_acc=False, is_async=True)
        p = gl.exp2(s * scale2 - lse[None, :])
        if begin < whole:
            m = begin + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, S_LAYOUT))
            p = gl.where(m[None, :] >= lo[:, None], p, 0.0)
        weights = gl.convert_layout(p.to(dtype), P_LAYOUT)
        dv = hopper.warpgroup_mma(weights, do, dv, is_async=True)
        dp = hopper.warpgroup_mma_wait(1, deps=(dp,))
        delta = delta_rows.index(slot).load(gl.SliceLayout(0, S_LAYOUT))
        narrow = (p * (dp - delta[None, :])).to(dtype)
        ds = gl.convert_layout(narrow, P_LAYOUT)
        dk = hopper.warpgroup_mma(ds, q, dk, is_async=True)
        # Of a block that does not exist, any memory will do: nobody looks at the product.
        then = (i + 1) % STAGES
        hopper.mbarrier.wait(q_full.index(then), (i + 1) // STAGES & 1, pred=i + 1 < total)
        s = hopper.warpgroup_mma(k, q_tiles.index(then).permute((1, 0)), none, use_acc=False, is_async=True)
        at = i % DS_STAGES
        hopper.mbarrier.wait(ds_empty.index(at), i // DS_STAGES & 1 ^ 1)
        ds_tiles.index(2 * at + W).store(narrow)
        hopper.fence_async_shared()
        hopper.mbarrier.arrive(ds_full.index(at))
        dk, dv, weights, ds, s = hopper.warpgroup_mma_wait(0, deps=(dk, dv, weights, ds, s))
        hopper.mbarrier.arrive(empty.index(slot))
    v_tiles.index(W).store(dv.to(dtype))
    hopper.fence_async_shared()
    v_tile = v_tiles.index(W).reshape(dv_desc.block_type.shape)
    tma_store(dv_desc, [b, g, start, 0], v_tile)
    # The third group reads K until it has emptied the last dS. With no queries at all there was none to wait for.
    last = total + DS_STAGES - 1
    hopper.mbarrier.wait(ds_empty.index(last % DS_STAGES), last // DS_STAGES & 1 ^ 1)
    k_tiles.index(W).store((dk * scale).to(dtype))
    hopper.fence_async_shared()
    k_tile = k_tiles.index(W).reshape(dk_desc.block_type.shape)
    tma_store(dk_desc, [b, g, start, 0], k_tile)
    hopper.tma.store_wait(0)


@gluon.jit
def _add_dq(dq_desc, dq_tiles, k_tiles, kv_full, handed, place, blocks, BLOCK_M: gl.constexpr, DS_STAGES: gl.constexpr):
    """The third group: dQ / scale of BLOCK_M queries from the program's keys, added to what is in memory."""
    ds_tiles, ds_full, ds_empty = handed
    b, g = place
    first, count, group = blocks
    BLOCK_D: gl.constexpr = k_tiles.type.shape[2]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    none = gl.zeros([BLOCK_M, BLOCK_D], gl.float32, LAYOUT)
    hopper.mbarrier.wait(kv_full, 0)
    for i in range(count * group):
        at = i % DS_STAGES
        hopper.mbarrier.wait(ds_full.index(at), i // DS_STAGES & 1)
        dq = hopper.warpgroup_mma(
            ds_tiles.index(2 * at).permute((1, 0)), k_tiles.index(0), none, use_acc=False, is_async=True
        )
        dq = hopper.warpgroup_mma(ds_tiles.index(2 * at + 1).permute((1, 0)), k_tiles.index(1), dq, is_async=True)
        dq = hopper.warpgroup_mma_wait(0, deps=(dq,))
        hopper.mbarrier.arrive(ds_empty.index(at))
        hopper.tma.store_wait(1)  # the tile of two blocks ago has been read
        dq_tiles.index(i % 2).store(dq)
        hopper.fence_async_shared()
        dq_tile = dq_tiles.index(i % 2).reshape(dq_desc.block_type.shape)
        tma_add(dq_desc, [b, g * group + i // count, first + i % count * BLOCK_M, 0], dq_tile)
    hopper.tma.store_wait(0)


@gluon.jit(do_not_specialize=["offset"])
def hopper_bwd_kernel(
    q_desc,  # of (B, H, T, D), tiles of (1, 1, BLOCK_M, BLOCK_D)
    k_desc,  # (B, G, S, D), (1, 1, 64, BLOCK_D)
    v_desc,
    do_desc,
    dq_desc,  # (B, H, T, D) fp32, added to: dQ / scale
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
    DS_STAGES: gl.constexpr,
    TOGETHER: gl.constexpr,
    REGISTERS: gl.constexpr,  # of the two groups, a thread
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
    DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_M], dtype)
    DQ_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_D], gl.float32)
    ROW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BARRIER: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    k_tiles = gl.allocate_shared_memory(dtype, [2, 64, BLOCK_D], LAYOUT)
    v_tiles = gl.allocate_shared_memory(dtype, [2, 64, BLOCK_D], LAYOUT)
    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_D], LAYOUT)
    do_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_D], LAYOUT)
    ds_tiles = gl.allocate_shared_memory(dtype, [2 * DS_STAGES, 64, BLOCK_M], DS_LAYOUT)
    dq_tiles = gl.allocate_shared_memory(gl.float32, [2, BLOCK_M, BLOCK_D], DQ_LAYOUT)
    lse_rows = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], ROW)
    delta_rows = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], ROW)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    ds_full = gl.allocate_shared_memory(gl.int64, [DS_STAGES, 1], BARRIER)
    ds_empty = gl.allocate_shared_memory(gl.int64, [DS_STAGES, 1], BARRIER)
    hopper.mbarrier.init(kv_full, count=1)
    for i in gl.static_range(STAGES):
        hopper.mbarrier.init(q_full.index(i), count=2)  # the copy, and the rows beside it
        hopper.mbarrier.init(do_full.index(i), count=1)
        hopper.mbarrier.init(empty.index(i), count=2)  # both groups have read it
    for i in gl.static_range(DS_STAGES):
        hopper.mbarrier.init(ds_full.index(i), count=2)  # both groups have written theirs
        hopper.mbarrier.init(ds_empty.index(i), count=1)
    buffers = (q_tiles, do_tiles, k_tiles, v_tiles, lse_rows, delta_rows)
    barriers = (kv_full, q_full, do_full, empty)
    handed = (ds_tiles, ds_full, ds_empty)
    blocks = (first, count, group)
    place = (b, g, start)
    numbers = (S, offset, scale)
    outputs = (dk_desc, dv_desc)
    inputs = (q_desc, k_desc, v_desc, do_desc)
    pointers = (lse_ptr, delta_ptr)
    gl.warp_specialize(
        [
            (
                _differentiate,
                (outputs, buffers, barriers, handed, place, blocks, numbers, 0, IS_CAUSAL, BLOCK_M, STAGES, DS_STAGES),
            ),
            (
                _differentiate,
                (outputs, buffers, barriers, handed, place, blocks, numbers, 1, IS_CAUSAL, BLOCK_M, STAGES, DS_STAGES),
            ),
            (_add_dq, (dq_desc, dq_tiles, k_tiles, kv_full, handed, (b, g), blocks, BLOCK_M, DS_STAGES)),
            (
                load_queries,
                (inputs, buffers, barriers, pointers, (b, H, g, start), (first, count), group, T, BLOCK_M, STAGES),
            ),
        ],
        [4, 4, 1],
        [REGISTERS, 488 - 2 * REGISTERS, 24],  # with the first group's 512, of which each group of four warps has 128
    )
