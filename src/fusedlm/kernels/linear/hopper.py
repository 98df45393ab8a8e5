"""For Hopper: a matrix product and what is done to its result before it reaches memory.

Persistent, one program a multiprocessor, and its warps have different jobs. One warp loads tiles by TMA. Two groups of
four warps multiply, each 128 rows of a tile of 256 x 128, and leave the sums in shared memory, rounded. Two other
groups take them from there, piece by piece: activation or residual, sums for a bias' gradient, stores. So the tensor
cores are at the next tile meanwhile, which at a K of 768 they need: there, what is done to a tile takes about as long
as its product.
"""

from fusedlm.kernels._gluon import gl, gluon, hopper, reinterpret, tma_load
from fusedlm.kernels._philox import keep_groups
from fusedlm.kernels.gelu import gelu_and_slope, gelu_of

BLOCK_M = gl.constexpr(256)
BLOCK_N = gl.constexpr(128)
BLOCK_K = gl.constexpr(64)
ROWS = gl.constexpr(16)  # of a piece, which is finished at once, and its columns
COLS = gl.constexpr(64)


@gluon.jit
def _tile(number, M, N, GROUP_M: gl.constexpr):
    """(first row, first column) of a tile, outside of the matrix for a number past the last one.

    GROUP_M tiles below each other come together: they share a part of b.
    """
    columns = gl.cdiv(N, BLOCK_N)
    first = number // (GROUP_M * columns) * GROUP_M
    height = gl.maximum(gl.minimum(gl.cdiv(M, BLOCK_M) - first, GROUP_M), 1)
    within = number % (GROUP_M * columns)
    return (first + within % height) * BLOCK_M, within // height * BLOCK_N


@gluon.jit
def _sigmoid(x):
    """1 / (1 + 2^x): the hardware's own inverse, where Triton's division takes five instructions more.

    The activations here are those of `gelu` and `swiglu` with fewer instructions: the power that they draw is taken
    from the tensor cores. 16 bits are all that is stored, so 1 - s need not have all its digits.
    """
    d = 1.0 + gl.exp2(x)
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [d], gl.float32, is_pure=True, pack=1)


@gluon.jit
def _gelu(x, TANH: gl.constexpr):
    return x * _sigmoid(x * (-2.302208198 - 0.1029432396 * (x * x))) if TANH else gelu_of(x, TANH, False)


@gluon.jit
def _gelu_and_slope(x, TANH: gl.constexpr):
    if TANH:
        x2 = gl.minimum(x * x, 1e30)  # finite, for it is multiplied by a zero
        s = _sigmoid(x * (-2.302208198 - 0.1029432396 * x2))
        y = x * s
        slope = s + (y - y * s) * (1.5957691216 + 0.2140644488 * x2)
    else:
        y, slope = gelu_and_slope(x, TANH, False)
    return y, slope


@gluon.jit
def _swiglu_gradients(dy, g, u):
    """(dg, du, SwiGLU itself)."""
    s = _sigmoid(-1.4426950409 * g)
    silu = g * s
    return dy * u * (s + (silu - silu * s)), dy * silu, silu * u


@gluon.jit
def _load(
    descriptors, tiles, barriers, shape, B_ROWS: gl.constexpr, HALVES: gl.constexpr, GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    a_desc, b_desc = descriptors
    a_tiles, b_tiles = tiles
    full, empty = barriers
    M, N, K = shape
    i = 0
    for number in range(gl.program_id(0), gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N), gl.num_programs(0)):
        m, n = _tile(number, M, N, GROUP_M)
        for step in range(gl.cdiv(K, BLOCK_K)):
            slot = i % STAGES
            k = step * BLOCK_K
            hopper.mbarrier.wait(empty.index(slot), i // STAGES & 1 ^ 1)
            hopper.mbarrier.expect(full.index(slot), 2 * (2 * BLOCK_K * 128 + BLOCK_K * BLOCK_N))  # bytes
            tma_load(a_desc, [m, k], full.index(slot), a_tiles.index(2 * slot))
            tma_load(a_desc, [m + 128, k], full.index(slot), a_tiles.index(2 * slot + 1))
            if HALVES:  # 64 columns of the first half of b, and those of the second that belong to them
                tma_load(b_desc, [n // 2, k], full.index(slot), b_tiles.index(slot).slice(0, 64, 0))
                tma_load(b_desc, [(N + n) // 2, k], full.index(slot), b_tiles.index(slot).slice(64, 64, 0))
            elif B_ROWS:
                tma_load(b_desc, [n, k], full.index(slot), b_tiles.index(slot))
            else:
                tma_load(b_desc, [k, n], full.index(slot), b_tiles.index(slot))
            i += 1


@gluon.jit
def _multiply(
    tiles, sums, barriers, bias_ptr, shape, W: gl.constexpr, B_ROWS: gl.constexpr, GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    a_tiles, b_tiles = tiles
    full, empty, sums_full, sums_empty = barriers
    M, N, K = shape
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    i = 0
    done = 0
    for number in range(gl.program_id(0), gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N), gl.num_programs(0)):
        _, n = _tile(number, M, N, GROUP_M)
        acc = gl.zeros([128, BLOCK_N], gl.float32, LAYOUT)
        if bias_ptr is not None:  # the sum begins with it, so it needs no registers beside the sum
            cols = n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
            acc += gl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(gl.float32)[None, :]
        for step in range(gl.cdiv(K, BLOCK_K)):
            slot = i % STAGES
            b = b_tiles.index(slot)
            if B_ROWS:
                b = b.permute((1, 0))
            hopper.mbarrier.wait(full.index(slot), i // STAGES & 1)
            acc = hopper.warpgroup_mma(a_tiles.index(2 * slot + W), b, acc, is_async=True)
            acc = hopper.warpgroup_mma_wait(1, deps=(acc,))
            if step > 0:
                hopper.mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES))
            i += 1
        acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
        hopper.mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES))
        hopper.mbarrier.wait(sums_empty.index(W), done & 1 ^ 1)
        left, right = acc.reshape([128, 2, COLS]).permute((0, 2, 1)).split()
        sums.index(2 * W).store(left.to(sums.dtype))
        sums.index(2 * W + 1).store(right.to(sums.dtype))
        hopper.mbarrier.arrive(sums_full.index(W))
        done += 1  # noqa: SIM113


@gluon.jit
def _piece(row, col, stride, shape, LAYOUT: gl.constexpr):
    """(where it begins, offsets from there, mask) of a piece, in a matrix of that stride."""
    M, N = shape
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    cols = gl.arange(0, COLS, layout=gl.SliceLayout(0, LAYOUT))
    inside = (rows < M - row)[:, None] & (cols < N - col)[None, :]
    return row.to(gl.int64) * stride + col, rows[:, None] * stride + cols[None, :], inside


@gluon.jit
def _given(pointers, row, col, stride, shape, LAYOUT: gl.constexpr):
    """What a piece needs beside the sums, on its way from memory: a tuple."""
    begin, at, inside = _piece(row, col, stride, shape, LAYOUT)
    found = ()
    for j in gl.static_range(len(pointers)):
        found += (gl.load(pointers[j] + begin + at, mask=inside, other=0.0),)
    return found


@gluon.jit
def _fetch(pointers, number, stride, shape, W: gl.constexpr, GROUP_M: gl.constexpr):
    """Have the L2 cache read what a tile will need beside the sums: from memory it takes microseconds."""
    M = shape[0]
    N = shape[1]
    m, n = _tile(number, M, N, GROUP_M)
    rows = m + 128 * W + gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    begin = gl.minimum(rows, M - 1).to(gl.int64) * stride
    for i in gl.static_range(2):  # 128 bytes each
        for j in gl.static_range(len(pointers)):
            place = pointers[j] + begin + gl.minimum(n + i * COLS, N - 1)
            gl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [place], gl.int32, is_pure=False, pack=1
            )


@gluon.jit
def _kept(row, col, N, dropout, LAYOUT: gl.constexpr):
    """Which elements of a piece dropout leaves, of (M, N) with N a multiple of 8."""
    seed_ptr, stream, threshold, _ = dropout
    GROUPS: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0])  # a thread has what it has 8 elements of
    rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, GROUPS))
    cols = col // 8 + gl.arange(0, COLS // 8, layout=gl.SliceLayout(0, GROUPS))
    group = rows.to(gl.int64)[:, None] * (N // 8) + cols[None, :]
    return gl.convert_layout(keep_groups(gl.load(seed_ptr), stream, group, threshold), LAYOUT)


@gluon.jit
def _store_totals(ptr, totals, row, col, N):
    """Four rows of partial sums for 128 rows, one of each warp: adding those up would have the warps wait."""
    sums = gl.sum(totals.reshape([4, ROWS // 4, COLS]), 1)
    rows = row // 32 + gl.arange(0, 4, layout=gl.SliceLayout(1, sums.type.layout))
    cols = col + gl.arange(0, COLS, layout=gl.SliceLayout(0, sums.type.layout))
    gl.store(ptr + rows.to(gl.int64)[:, None] * N + cols[None, :], sums, mask=(cols < N)[None, :])


@gluon.jit
def _finish(
    slabs, barriers, outputs, inputs, totals_ptr, dropout, shape, W: gl.constexpr,
    EPILOGUE: gl.constexpr, TANH: gl.constexpr, GROUP_M: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    y_ptr, kept_ptr = outputs
    sums_full, sums_empty = barriers
    M = shape[0]
    N = shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    dtype: gl.constexpr = slabs.dtype
    DOWN: gl.constexpr = 128 // ROWS
    HALVES: gl.constexpr = 1 if EPILOGUE == "swiglu" else 2  # of the tile's columns, that are finished one by one
    size = (M, N)
    wide = N  # the stride of inputs
    if EPILOGUE == "dswiglu":
        wide = 2 * N
    elif EPILOGUE == "swiglu":
        size = (M, N // 2)
    done = 0
    for number in range(gl.program_id(0), gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N), gl.num_programs(0)):
        m, n = _tile(number, M, N, GROUP_M)
        first = m + 128 * W
        if EPILOGUE == "swiglu":
            n = n // 2
        if len(inputs):
            _fetch(inputs, number + gl.num_programs(0), wide, size, W, GROUP_M)
        ahead = ()
        for early in gl.static_range(AHEAD if len(inputs) else 0):
            ahead += (_given(inputs, first + early * ROWS, n, wide, size, LAYOUT),)
        hopper.mbarrier.wait(sums_full.index(W), done & 1)
        for half in range(HALVES):
            col = n + half * COLS
            totals = gl.zeros([ROWS, COLS], gl.float32, LAYOUT)
            for i in range(DOWN):
                row = first + i * ROWS
                x = slabs.index((2 * W + half) * DOWN + i).load(LAYOUT)
                begin, at, inside = _piece(row, col, size[1], size, LAYOUT)
                if len(inputs) and AHEAD == 0:
                    given = _given(inputs, row, col, wide, size, LAYOUT)
                elif len(inputs):
                    given = ahead[0]
                    later = half * DOWN + i + AHEAD  # the number of the piece that is asked for now
                    later_row = first + later % DOWN * ROWS
                    later_col = n + later // DOWN * COLS
                    if later >= HALVES * DOWN:  # there is none
                        later_col = N
                    ahead = ahead[1:]
                    ahead += (_given(inputs, later_row, later_col, wide, size, LAYOUT),)
                if EPILOGUE == "add":
                    y = x.to(gl.float32)
                    if dropout[0] is not None:
                        y = gl.where(_kept(row, col, N, dropout, LAYOUT), y * dropout[3], 0.0)
                    if len(inputs):
                        y += given[0].to(gl.float32)
                elif EPILOGUE == "gelu":
                    y = _gelu(x.to(gl.float32), TANH)
                    if kept_ptr is not None:
                        gl.store(kept_ptr + begin + at, x, mask=inside)
                elif EPILOGUE == "dgelu":
                    act, slope = _gelu_and_slope(given[0].to(gl.float32), TANH)
                    y = x.to(gl.float32) * slope
                    if kept_ptr is not None:
                        gl.store(kept_ptr + begin + at, act.to(dtype), mask=inside)
                    if totals_ptr is not None:
                        totals += y
                elif EPILOGUE == "swiglu":
                    up = slabs.index((2 * W + 1) * DOWN + i).load(LAYOUT)
                    gate = x.to(gl.float32)
                    y = gate * _sigmoid(-1.4426950409 * gate) * up.to(gl.float32)
                    if kept_ptr is not None:
                        there = _piece(row, col, N, size, LAYOUT)
                        gl.store(kept_ptr + there[0] + there[1], x, mask=inside)
                        gl.store(kept_ptr + there[0] + (there[1] + N // 2), up, mask=inside)
                else:
                    y, du, act = _swiglu_gradients(x.to(gl.float32), given[0].to(gl.float32), given[1].to(gl.float32))
                    if kept_ptr is not None:
                        gl.store(kept_ptr + begin + at, act.to(dtype), mask=inside)
                    begin, at, inside = _piece(row, col, wide, size, LAYOUT)
                    gl.store(y_ptr + begin + (at + N), du.to(dtype), mask=inside)
                gl.store(y_ptr + begin + at, y.to(dtype), mask=inside)
            if totals_ptr is not None:
                _store_totals(totals_ptr, totals, first, col, N)
        hopper.mbarrier.arrive(sums_empty.index(W))
        done += 1  # noqa: SIM113


@gluon.jit(do_not_specialize=["stream", "threshold"])
def hopper_product_kernel(
    a_desc,  # of (M, K), tiles of (128, 64)
    b_desc,  # of (N, K), tiles of (128, 64), or (64, 64) for "swiglu"; or of (K, N), tiles of (64, 128)
    y_ptr,  # "add", "gelu", "dgelu": (M, N); "swiglu": (M, N / 2); "dswiglu": (M, 2N), of gate and up
    kept_ptr,  # or None. "gelu", "swiglu": the sums, (M, N); "dgelu", "dswiglu": what the activation gives, (M, N)
    bias_ptr,  # (N,) or None
    given_ptr,  # "add": (M, N) or None; "dgelu": the sums that GELU was given, (M, N); "dswiglu": gate and up, (M, 2N)
    seed_ptr,  # "add": of a dropout of the product and bias; or None
    totals_ptr,  # "dgelu": (8 * ceil(M / 256), N) fp32, whose sums over rows are those of y; or None
    M,
    N,
    K,
    stream,
    threshold,
    factor,
    B_ROWS: gl.constexpr,
    EPILOGUE: gl.constexpr,
    TANH: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    AHEAD: gl.constexpr,
):
    dtype: gl.constexpr = a_desc.dtype
    A_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, BLOCK_K], dtype)
    B_SHAPE: gl.constexpr = [BLOCK_N, BLOCK_K] if B_ROWS else [BLOCK_K, BLOCK_N]
    B_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(B_SHAPE, dtype)
    HALVES: gl.constexpr = EPILOGUE == "swiglu"
    a_tiles = gl.allocate_shared_memory(dtype, [2 * STAGES, 128, BLOCK_K], A_LAYOUT)
    b_tiles = gl.allocate_shared_memory(dtype, [STAGES, B_SHAPE[0], B_SHAPE[1]], B_LAYOUT)
    sums = gl.allocate_shared_memory(dtype, [4, 128, COLS], A_LAYOUT)  # of each group the left half, the right half
    slabs = reinterpret(sums, dtype, [4 * 128 // ROWS, ROWS, COLS], A_LAYOUT)
    BARRIER: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    sums_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    sums_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for i in gl.static_range(STAGES):
        hopper.mbarrier.init(full.index(i), count=1)
        hopper.mbarrier.init(empty.index(i), count=2)  # both groups have read it
    for i in gl.static_range(2):
        hopper.mbarrier.init(sums_full.index(i), count=1)
        hopper.mbarrier.init(sums_empty.index(i), count=1)
    tiles = (a_tiles, b_tiles)
    shape = (M, N, K)
    groups = (full, empty, sums_full, sums_empty)
    inputs = ()
    if EPILOGUE == "dswiglu":
        inputs = (given_ptr, given_ptr + N)
    elif given_ptr is not None:
        inputs = (given_ptr,)
    outputs = (y_ptr, kept_ptr)
    dropout = (seed_ptr, stream, threshold, factor)
    ends = (sums_full, sums_empty)
    gl.warp_specialize(
        [
            (_finish, (slabs, ends, outputs, inputs, totals_ptr, dropout, shape, 0, EPILOGUE, TANH, GROUP_M, AHEAD)),
            (_finish, (slabs, ends, outputs, inputs, totals_ptr, dropout, shape, 1, EPILOGUE, TANH, GROUP_M, AHEAD)),
            (_multiply, (tiles, sums, groups, bias_ptr, shape, 0, B_ROWS, GROUP_M, STAGES)),
            (_multiply, (tiles, sums, groups, bias_ptr, shape, 1, B_ROWS, GROUP_M, STAGES)),
            (_load, ((a_desc, b_desc), tiles, (full, empty), shape, B_ROWS, HALVES, GROUP_M, STAGES)),
        ],
        [4, 4, 4, 1],
        [72, 160, 160, 24],
    )
