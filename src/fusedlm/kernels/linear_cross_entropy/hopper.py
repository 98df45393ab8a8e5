"""For Hopper: losses of rows, and logits turned into their gradient, with a row in shared memory between the passes.

Persistent. One warp has chunks of rows copied by TMA into slots of shared memory. Four groups of four warps share the
chunks of a row: they make its statistics, put these together, and then the gradient, again from the slots, which they
store over the logits. A slot that was read for the last time is filled with what comes next at once, so that memory
always has work. Of a row that is longer than the slots the last chunks pass through a few slots of their own, twice:
the gradient begins with them, and so they come from the L2 cache the second time. The arithmetic is that of
`cross_entropy`.
"""

from fusedlm.kernels._gluon import gl, gluon, hopper, reinterpret, tma_load
from fusedlm.kernels._index_errors import flag_index
from fusedlm.kernels.cross_entropy import (
    add_block,
    gradient_factors,
    probabilities,
    reduce_lanes,
    row_loss,
    target_logit,
)

LINE = gl.constexpr(64)  # logits side by side in the descriptor, which has a row as lines of so many; it divides V
GROUPS = gl.constexpr(4)
WARPS = gl.constexpr(4)  # of a group, and its threads
THREADS = gl.constexpr(128)


@gluon.jit
def _fill(desc, tiles, barriers, row, chunk, number, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """Copy a chunk into one of COUNT slots from FIRST on, which are taken in turn, once that has been read."""
    full, empty = barriers
    slot = FIRST + number % COUNT
    hopper.mbarrier.wait(empty.index(slot), number // COUNT & 1 ^ 1)
    hopper.mbarrier.expect(full.index(slot), desc.block_type.nbytes)  # also past the row's end, where zeros come
    tma_load(desc, [row, chunk * tiles.type.shape[2], 0], full.index(slot), tiles.index(slot))


@gluon.jit
def _load(desc, tiles, barriers, shape, STREAM: gl.constexpr):
    """The producer: chunks in the order in which `_losses` takes them."""
    M, V = shape
    KEEP: gl.constexpr = tiles.type.shape[0] - STREAM
    chunks = gl.cdiv(V, tiles.type.shape[2] * LINE)
    kept = KEEP if STREAM else chunks
    i = 0
    j = 0
    for row in range(gl.program_id(0), M, gl.num_programs(0)):
        for chunk in range(kept):
            _fill(desc, tiles, barriers, row, chunk, i, 0, KEEP)
            i += 1
        if STREAM:
            for _ in range(2):
                for chunk in range(kept, chunks):
                    _fill(desc, tiles, barriers, row, chunk, j, KEEP, STREAM)
                    j += 1


@gluon.jit
def _vectors(PIECES: gl.constexpr, VECTOR: gl.constexpr, LAYOUT: gl.constexpr):
    """Where in a chunk each thread's vectors begin, (PIECES, THREADS, 1): at multiples of VECTOR, as V is one."""
    piece = gl.arange(0, PIECES, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    thread = gl.arange(0, THREADS, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    return ((piece[:, None] * THREADS + thread[None, :]) * VECTOR)[:, :, None]


@gluon.jit
def _lanes(x):
    """(numbers of a thread, THREADS), as `add_block` takes them."""
    return x.permute((0, 2, 1)).reshape([x.type.shape[0] * x.type.shape[2], THREADS])


@gluon.jit
def _first(number, G: gl.constexpr):
    """The first chunk that is a group's, of those that come after `number` others: every fourth is, so that a slot
    is always the same group's, and a group cannot miss what happens to its slots."""
    return (G - number) & (GROUPS - 1)


@gluon.jit
def _release(barrier):
    """A slot may be filled again. Without the fence numbers of another row were read, as if TMA's writing overtook."""
    hopper.fence_async_shared()
    hopper.mbarrier.arrive(barrier)


@gluon.jit
def _add_chunk(
    slots, barriers, state, place, left,
    FIRST: gl.constexpr, COUNT: gl.constexpr, RELEASE: gl.constexpr, SUM: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """A chunk added to (maximum, sum of exponentials, sum where SUM) of each thread.

    left: logits from the chunk's first on, where they do not fill it; else None.
    """
    full, empty = barriers
    m, total, plain = state
    slot = FIRST + place % COUNT
    hopper.mbarrier.wait(full.index(slot), place // COUNT & 1)
    x = slots.index(slot).load(LAYOUT)
    if RELEASE:
        _release(empty.index(slot))
    x = x.to(gl.float32)
    if SUM:
        plain += gl.sum(_lanes(x), 0)  # past the row's end there are zeros
    if left is not None:
        x = gl.where(_vectors(slots.type.shape[1], slots.type.shape[3], LAYOUT) < left, x, float("-inf"))
    m, total = add_block(_lanes(x), m, total)
    return m, total, plain


@gluon.jit
def _add_chunks(
    slots, barriers, state, begin, end, number, V,
    G: gl.constexpr, FIRST: gl.constexpr, COUNT: gl.constexpr, RELEASE: gl.constexpr, SUM: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """A group's chunks from begin to end, added to the statistics of its threads.

    number: of chunks that these slots have had before. RELEASE: the chunks will not be read again.
    """
    BLOCK: gl.constexpr = slots.type.shape[1] * THREADS * slots.type.shape[3]
    whole = gl.minimum(V // BLOCK, end)  # the one after these has its end within, and masks
    first = begin + _first(number, G)
    for chunk in range(first, whole, GROUPS):
        place = number + chunk - begin
        state = _add_chunk(slots, barriers, state, place, None, FIRST, COUNT, RELEASE, SUM, LAYOUT)
    if (whole < end) & ((whole - first) % GROUPS == 0):
        place = number + whole - begin
        state = _add_chunk(slots, barriers, state, place, V - whole * BLOCK, FIRST, COUNT, RELEASE, SUM, LAYOUT)
    return state


@gluon.jit
def _combine(exchange, met, state, turn, G: gl.constexpr, SUM: gl.constexpr):
    """(logsumexp of a row, its sum where SUM), from the statistics of all threads of all groups, which meet here.

    exchange: (2 turns * 3 numbers * GROUPS, WARPS): while some read those of a row, others may write of the next.
    """
    m, total, plain = state
    m = m.reshape([WARPS, 32])
    top = gl.max(m, 1)  # of each warp: groups have no barriers of their own here
    known = gl.where(top == float("-inf"), 0.0, top)
    total = gl.sum(total.reshape([WARPS, 32]) * gl.exp2((m - known[:, None]) * 1.4426950408889634), 1)
    first = turn % 2 * 3
    exchange.index(first * GROUPS + G).store(top)
    exchange.index((first + 1) * GROUPS + G).store(total)
    if SUM:
        exchange.index((first + 2) * GROUPS + G).store(gl.sum(plain.reshape([WARPS, 32]), 1))
    hopper.mbarrier.arrive(met)
    hopper.mbarrier.wait(met, turn & 1)
    rows = reinterpret(exchange, gl.float32, [6, GROUPS * WARPS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    top, total = reduce_lanes(rows.index(first).load(LAYOUT), rows.index(first + 1).load(LAYOUT))
    row_sum = gl.sum(rows.index(first + 2).load(LAYOUT), 0) if SUM else 0.0
    return top + gl.log2(total) * 0.6931471805599453, row_sum


@gluon.jit
def _store_gradients(
    slots, barriers, row_ptr, factors, begin, end, number, col, V,
    G: gl.constexpr, FIRST: gl.constexpr, COUNT: gl.constexpr, WAIT: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Of a group's chunks from begin to end. WAIT: they are copied anew; others have been there for the statistics."""
    full, empty = barriers
    a, b, c, lse = factors
    PIECES: gl.constexpr = slots.type.shape[1]
    VECTOR: gl.constexpr = slots.type.shape[3]
    BLOCK: gl.constexpr = PIECES * THREADS * VECTOR
    within = gl.arange(0, VECTOR, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    vectors = _vectors(PIECES, VECTOR, LAYOUT)
    for chunk in range(begin + _first(number, G), end, GROUPS):
        place = number + chunk - begin
        slot = FIRST + place % COUNT
        if WAIT:
            hopper.mbarrier.wait(full.index(slot), place // COUNT & 1)
        x = slots.index(slot).load(LAYOUT)
        _release(empty.index(slot))
        dx = a * probabilities(x.to(gl.float32), lse) - b
        start = chunk * BLOCK
        if (start + BLOCK <= V) & ((col < start) | (col >= start + BLOCK)):  # neither masks nor the target: nearly all
            gl.store(row_ptr + start + (vectors + within[None, None, :]), dx.to(slots.dtype))
        else:
            at = (col - start) % VECTOR
            dx -= gl.where((vectors == col - start - at) & (within == at)[None, None, :], c, 0.0)
            gl.store(row_ptr + start + (vectors + within[None, None, :]), dx.to(slots.dtype), mask=vectors < V - start)


@gluon.jit
def _losses(
    slots, barriers, exchange, met, tensors, shape, options,
    G: gl.constexpr, SUM: gl.constexpr, GRADIENT: gl.constexpr, STREAM: gl.constexpr,
):  # fmt: skip
    x_ptr, t_ptr, loss_ptr, flag_ptr = tensors
    M, V = shape
    ignore, smoothing, z = options
    KEEP: gl.constexpr = slots.type.shape[0] - STREAM
    PIECES: gl.constexpr = slots.type.shape[1]
    VECTOR: gl.constexpr = slots.type.shape[3]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1, VECTOR], [1, 32, 1], [1, WARPS, 1], [2, 1, 0])
    chunks = gl.cdiv(V, PIECES * THREADS * VECTOR)
    kept = KEEP if STREAM else chunks
    i = 0  # chunks that the first KEEP slots have had, and the others
    j = 0
    turn = 0
    following = gl.load(t_ptr + gl.program_id(0))
    for row in range(gl.program_id(0), M, gl.num_programs(0)):
        row_ptr = x_ptr + gl.cast(row, gl.int64) * V
        t = following
        valid = t != ignore
        inside = (t >= 0) & (t < V)
        col = gl.where(inside, t, -1).to(gl.int32)
        # The logit is asked for before the statistics and a target a row ahead, so that nothing waits for them.
        x_t = 0.0
        if G == 0:
            x_t = target_logit(row_ptr, col, V)  # overwritten after the groups have met
            flag_index(flag_ptr, valid & (inside == 0), t, V)
        following = gl.load(t_ptr + gl.minimum(row + gl.num_programs(0), M - 1))
        zeros = gl.sum(_lanes(gl.zeros([PIECES, THREADS, VECTOR], gl.float32, LAYOUT)), 0)
        state = (zeros + float("-inf"), zeros, zeros)
        state = _add_chunks(slots, barriers, state, 0, kept, i, V, G, 0, KEEP, not GRADIENT, SUM, LAYOUT)
        if STREAM:
            state = _add_chunks(slots, barriers, state, kept, chunks, j, V, G, KEEP, STREAM, True, SUM, LAYOUT)
        lse, row_sum = _combine(exchange, met, state, turn, G, SUM)
        turn += 1  # noqa: SIM113
        if G == 0:
            gl.store(loss_ptr + row, row_loss(x_t, col, lse, row_sum, valid, V, smoothing, z))
        if GRADIENT:
            g = gl.where(valid, gl.where(inside, 1.0, float("nan")), 0.0)
            a, b, c = gradient_factors(col, lse, g, V, smoothing, z)
            factors = (a, b, c, lse)
            if STREAM:
                j += chunks - kept
                _store_gradients(
                    slots, barriers, row_ptr, factors, kept, chunks, j, col, V, G, KEEP, STREAM, True, LAYOUT
                )
                j += chunks - kept
            _store_gradients(slots, barriers, row_ptr, factors, 0, kept, i, col, V, G, 0, KEEP, False, LAYOUT)
        i += kept


@gluon.jit(do_not_specialize=["M", "ignore"])
def hopper_loss_kernel(
    desc,  # of the logits as (M, V / LINE, LINE), chunks of (1, BLOCK / LINE, LINE)
    x_ptr,  # the same, (M, V)
    t_ptr,
    loss_ptr,
    flag_ptr,
    M,  # no less than programs
    V,
    ignore,
    smoothing,
    z,
    SUM: gl.constexpr,
    GRADIENT: gl.constexpr,
    SLOTS: gl.constexpr,  # a multiple of GROUPS
    STREAM: gl.constexpr,  # of these, for what comes twice, such a multiple; 0 where a row fits or comes once anyway
):
    dtype: gl.constexpr = desc.dtype
    VECTOR: gl.constexpr = 128 // dtype.primitive_bitwidth  # 16 bytes
    PIECES: gl.constexpr = desc.block_shape[1] * LINE // (THREADS * VECTOR)
    tiles = gl.allocate_shared_memory(dtype, [SLOTS, 1, desc.block_shape[1], LINE], desc.layout)
    LINEAR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    slots = reinterpret(tiles, dtype, [SLOTS, PIECES, THREADS, VECTOR], LINEAR)
    exchange = gl.allocate_shared_memory(gl.float32, [6 * GROUPS, WARPS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    BARRIER: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    met = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    hopper.mbarrier.init(met, count=GROUPS)
    for i in gl.static_range(SLOTS):
        hopper.mbarrier.init(full.index(i), count=1)
        hopper.mbarrier.init(empty.index(i), count=1)
    shape = (M, V)
    barriers = (full, empty)
    tensors = (x_ptr, t_ptr, loss_ptr, flag_ptr)
    options = (ignore, smoothing, z)
    gl.warp_specialize(
        [
            (_losses, (slots, barriers, exchange, met, tensors, shape, options, 0, SUM, GRADIENT, STREAM)),
            (_losses, (slots, barriers, exchange, met, tensors, shape, options, 1, SUM, GRADIENT, STREAM)),
            (_losses, (slots, barriers, exchange, met, tensors, shape, options, 2, SUM, GRADIENT, STREAM)),
            (_losses, (slots, barriers, exchange, met, tensors, shape, options, 3, SUM, GRADIENT, STREAM)),
            (_load, (desc, tiles, barriers, shape, STREAM)),
        ],
        [4, 4, 4, 1],
        [112, 112, 112, 24],
    )
