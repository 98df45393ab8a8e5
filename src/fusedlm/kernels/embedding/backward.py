"""The gradients of an embedding's tables: rows of dy, summed by id in a fixed order.

Tokens are sorted by id. A program sums the runs of equal ids within its chunk of the sorted tokens and writes a row of
the table for each; a second kernel puts together the runs that cross chunks. Rows that no token has are zeroed, and
positions summed, while the sort runs on a stream of its own.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fusedlm.kernels._backend import interpreting
from fusedlm.kernels._launch import launch, rows
from fusedlm.kernels._operator import operator
from fusedlm.kernels._philox import drop_threshold, keep_mask
from fusedlm.kernels._triton import tl, triton


@triton.jit
def _dropped(dy, token, seed_ptr, stream, threshold, scale, first_group, BLOCK_C: tl.constexpr):
    """drop(dy), fp32, of columns of a token from 8 * first_group on."""
    dy = dy.to(tl.float32)
    if seed_ptr is not None:
        keep = keep_mask(tl.load(seed_ptr), stream, token, first_group, threshold, BLOCK_C)
        dy = tl.where(keep, dy * scale, 0.0)
    return dy


@triton.jit
def _store_row(dw_ptr, at, total, mask, ADD: tl.constexpr):
    if ADD:
        total += tl.load(dw_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(dw_ptr + at, total.to(dw_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _mark_kernel(ids_ptr, touched_ptr, M, V, BLOCK_N: tl.constexpr):
    at = tl.cast(tl.program_id(0), tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    v = tl.load(ids_ptr + at, mask=at < M, other=-1)
    tl.store(touched_ptr + v, tl.full((BLOCK_N,), 1, tl.uint8), mask=(v >= 0) & (v < V))


@triton.jit
def _zero_kernel(touched_ptr, dw_ptr, V, C, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    lines = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    others = tl.load(touched_ptr + lines, mask=lines < V, other=1) == 0
    zeros = tl.zeros((ROWS, BLOCK_C), dw_ptr.dtype.element_ty)
    tl.store(dw_ptr + lines[:, None] * C + cols[None, :], zeros, mask=others[:, None] & (cols < C)[None, :])


@triton.jit
def _key(ids_ptr, i, there, BIAS: tl.constexpr):
    """The id at place i of the sorted ones; -1 where there is none."""
    return tl.load(ids_ptr + i, mask=there, other=-1 - BIAS).to(tl.int64) + BIAS


@triton.jit(do_not_specialize=["stream", "threshold"])
def _runs_kernel(
    dy_ptr,
    ids_ptr,  # sorted
    order_ptr,  # the token at each place of the sorted ids
    seed_ptr,
    dw_ptr,
    first_ptr,  # (chunks, C): sums of runs that come from the chunk before
    last_ptr,  # (chunks, C): sums of runs that begin here and go on in the next chunk
    dy_stride,
    M,
    V,
    C,
    stream,
    threshold,
    scale,
    ADD: tl.constexpr,  # to what dw holds
    BIAS: tl.constexpr,  # see _keys
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    chunk = tl.cast(tl.program_id(0), tl.int64)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = cols < C
    group = tl.program_id(1) * (BLOCK_C // 8)
    start = chunk * CHUNK
    end = tl.minimum(start + CHUNK, M)
    before = _key(ids_ptr, start - 1, start > 0, BIAS)
    after = _key(ids_ptr, end, end < M, BIAS)
    total = tl.zeros((BLOCK_C,), tl.float32)
    # The next row is on its way while this one is added.
    next_token = tl.load(order_ptr + start)
    next_dy = tl.load(dy_ptr + next_token * dy_stride + cols, mask=mask, other=0.0)
    for i in range(start, end):
        token, dy = next_token, next_dy
        next_token = tl.load(order_ptr + tl.minimum(i + 1, end - 1))  # the last once more is cheaper than a mask
        next_dy = tl.load(dy_ptr + next_token * dy_stride + cols, mask=mask, other=0.0)
        v = _key(ids_ptr, i, True, BIAS)
        following = _key(ids_ptr, i + 1, i + 1 < end, BIAS)
        total += _dropped(dy, token, seed_ptr, stream, threshold, scale, group, BLOCK_C)
        if v != following:  # the end of a run, or of the chunk
            # By branches and not by masks, of which the compiler could not tell that whole rows share them.
            if (v >= 0) & (v < V):
                if v == before:
                    tl.store(first_ptr + chunk * C + cols, total, mask=mask)
                elif (v == after) & (i + 1 == end):
                    tl.store(last_ptr + chunk * C + cols, total, mask=mask)
                else:
                    _store_row(dw_ptr, v * C + cols, total, mask, ADD)
            total = tl.zeros((BLOCK_C,), tl.float32)


@triton.jit
def _join_kernel(
    ids_ptr,
    first_ptr,
    last_ptr,
    dw_ptr,
    M,
    V,
    C,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,  # that are read at once
    BLOCK_C: tl.constexpr,
):
    # A program a chunk: where a run begins in it and goes on, it adds what the following chunks have of that run.
    chunk = tl.cast(tl.program_id(0), tl.int64)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = cols < C
    start = chunk * CHUNK
    end = start + CHUNK
    v = _key(ids_ptr, end - 1, end - 1 < M, BIAS)
    before = _key(ids_ptr, start - 1, start > 0, BIAS)
    after = _key(ids_ptr, end, end < M, BIAS)
    begins = (v == after) & (v != before) & (v >= 0) & (v < V)
    if begins:
        total = tl.load(last_ptr + chunk * C + cols, mask=mask, other=0.0)
        i = chunk + 1
        found = CHUNKS
        while found == CHUNKS:
            lines = i + tl.arange(0, CHUNKS)
            same = _key(ids_ptr, lines * CHUNK, lines * CHUNK < M, BIAS) == v
            at = lines[:, None] * C + cols[None, :]
            total += tl.sum(tl.load(first_ptr + at, mask=same[:, None] & mask[None, :], other=0.0), 0)
            i += CHUNKS
            found = tl.sum(same.to(tl.int32), 0)
        _store_row(dw_ptr, v * C + cols, total, mask, ADD)


@triton.jit(do_not_specialize=["offset", "stream", "threshold"])
def _positions_kernel(
    dy_ptr,
    seed_ptr,
    dpos_ptr,
    dy_stride,
    B,
    T,
    S,
    C,
    offset,
    stream,
    threshold,
    scale,
    AT_ONCE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Positions from an offset on: one program sums all sequences of a position, some of them on their way together.
    t = tl.cast(tl.program_id(0), tl.int64)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = cols < C
    group = tl.program_id(1) * (BLOCK_C // 8)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, B, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            b = start + i
            token = tl.cast(tl.minimum(b, B - 1), tl.int64) * T + t
            dy = tl.load(dy_ptr + token * dy_stride + cols, mask=mask, other=0.0)
            dy = _dropped(dy, token, seed_ptr, stream, threshold, scale, group, BLOCK_C)
            total += tl.where(b < B, dy, 0.0)
    p = t + offset
    if (p >= 0) & (p < S):
        tl.store(dpos_ptr + p * C + cols, total.to(dpos_ptr.dtype.element_ty), mask=mask)


def _columns(C: int, most: int) -> dict[str, int]:
    """Columns a program of the backward kernels, at the most so many: 8 numbers a thread."""
    block = min(max(triton.next_power_of_2(C), 8), 32 if interpreting() else most)
    return {"BLOCK_C": block, "num_warps": max(block // 256, 1)}


def _chunk(M: int) -> int:
    """Places of a chunk. Few where there are few tokens: a program goes through them one after the other."""
    return 4 if interpreting() else 8 if M <= 16384 else 32


def _key_type(V: int) -> tuple[torch.dtype, int]:
    """In as few bytes as tell V rows and two more from each other, and what is subtracted: a radix sort goes over keys
    byte by byte."""
    if V < 2**8 - 1:
        return torch.uint8, 0
    return (torch.int16, 0) if V < 2**15 - 1 else (torch.int16, 2**15 - 1) if V < 2**16 - 1 else (torch.int32, 0)


def _keys(ids: Tensor, V: int) -> Tensor:
    """ids in one dimension; those out of range as -1 and V."""
    dtype, bias = _key_type(V)
    kept = ids.reshape(-1).clamp(-1, V)
    return (kept - bias if bias else kept).to(dtype)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """What little there is to do on it comes first: a sort leaves most of a GPU idle, and others wait for it."""
    return torch.cuda.Stream(device, priority=-1)


def _sorted_meanwhile(ids: Tensor, V: int, meanwhile: Callable[[], None]) -> tuple[Tensor, Tensor]:
    """ids as sorted keys, and the place that each had. On a GPU meanwhile's kernels run beside the sort."""
    if not ids.is_cuda:
        meanwhile()
        return _keys(ids, V).sort(stable=True)
    # What leaves the side stream is made here, so that its memory is this stream's.
    ordered = torch.empty(ids.numel(), dtype=_key_type(V)[0], device=ids.device)
    order = torch.empty(ids.numel(), dtype=torch.int64, device=ids.device)
    main, side = torch.cuda.current_stream(ids.device), _side_stream(ids.device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        torch.sort(_keys(ids, V), stable=True, out=(ordered, order))
    meanwhile()
    main.wait_stream(side)
    return ordered, order


def sum_rows(
    dw: Tensor,
    dy: Tensor,
    ids: Tensor,
    p: float,
    seed: Tensor | None,
    stream: int,
    *,
    add: bool,
    dpos: Tensor | None = None,
    offset: int = 0,
) -> None:
    """Into dw, (V, C), at each id the sum of its rows of dy, and zeros elsewhere. add: to what is there, all of it.

    dpos: (S, C), gets the sums of positions, which count from the offset on.
    """
    dy2 = rows(dy)
    (M, C), V = dy2.shape, dw.shape[0]
    if not M or not C:
        for table in ([] if add else [dw]) + ([] if dpos is None else [dpos]):
            table.zero_()
        return
    ids, drop = ids.contiguous(), (stream, *drop_threshold(p))

    def meanwhile() -> None:
        if not add:
            _zero_others(dw, ids)
        if dpos is not None:
            _sum_positions(dpos, dy2, ids.shape[-1], offset, seed, drop)

    ordered, order = _sorted_meanwhile(ids, V, meanwhile)
    size = _chunk(M)
    chunks = triton.cdiv(M, size)
    first, last = torch.empty((2, chunks, C), dtype=torch.float32, device=dy.device)
    constants = {"ADD": add, "BIAS": _key_type(V)[1], "CHUNK": size}
    config = _columns(C, 1024)
    grid = (chunks, triton.cdiv(C, config["BLOCK_C"]), 1)
    key = (dy.dtype, dw.dtype, ordered.dtype, seed is None)
    scalars = (dy2.stride(0), M, V, C, *drop)
    launch(_runs_kernel, grid, key, (dy2, ordered, order, seed, dw, first, last), scalars, {**constants, **config})
    config = {"CHUNKS": 2 if interpreting() else 8, **_columns(C, 256)}
    grid = (chunks, triton.cdiv(C, config["BLOCK_C"]), 1)
    tables = (ordered, first, last, dw)
    launch(_join_kernel, grid, (dw.dtype, ordered.dtype), tables, (M, V, C), {**constants, **config})


def _zero_others(dw: Tensor, ids: Tensor) -> None:
    """Zeros into the rows of dw that ids do not name: the others are written anyway."""
    V, C = dw.shape
    touched = torch.zeros(V, dtype=torch.uint8, device=dw.device)
    block = 64 if interpreting() else 256
    grid = (triton.cdiv(ids.numel(), block), 1, 1)
    launch(_mark_kernel, grid, (), (ids, touched), (ids.numel(), V), {"BLOCK_N": block, "num_warps": 4})
    config = {"ROWS": 512 if interpreting() else 4, **_columns(C, 1024)}
    grid = (triton.cdiv(V, config["ROWS"]), triton.cdiv(C, config["BLOCK_C"]), 1)
    launch(_zero_kernel, grid, dw.dtype, (touched, dw), (V, C), config)


def _sum_positions(
    dpos: Tensor, dy: Tensor, T: int, offset: int, seed: Tensor | None, drop: tuple[int, int, float]
) -> None:
    """Into dpos, (S, C), the sums over sequences of dy, (B T, C), at positions from the offset on; zeros elsewhere."""
    S, C = dpos.shape
    dpos.zero_()
    config = {"AT_ONCE": 2 if interpreting() else 8, **_columns(C, 256)}
    grid = (T, triton.cdiv(C, config["BLOCK_C"]), 1)
    scalars = (dy.stride(0), dy.shape[0] // T, T, S, C, offset, *drop)
    launch(_positions_kernel, grid, (dy.dtype, seed is None), (dy, seed, dpos), scalars, config)


@operator(fake=lambda dy, ids, V, S, *_: (dy.new_empty((V, dy.shape[-1])), dy.new_empty((S, dy.shape[-1]))))
def embedding_backward(
    dy: Tensor, ids: Tensor, V: int, S: int, offset: int, p: float, seed: Tensor | None, stream: int
) -> tuple[Tensor, Tensor]:
    """The gradients of a table of V rows that ids, of dy's shape less the last, chose from, and of one of S positions,
    of which dy's second last dimension took those from the offset on. S: 0 for the first alone."""
    dw, dpos = (torch.empty((n, dy.shape[-1]), dtype=dy.dtype, device=dy.device) for n in (V, S))
    sum_rows(dw, dy, ids, p, seed, stream, add=False, dpos=dpos if S else None, offset=offset)
    return dw, dpos


@operator(fake=lambda dy, S, *_: dy.new_empty((S, dy.shape[-1])))
def positions_backward(dy: Tensor, S: int, offset: int, p: float, seed: Tensor | None, stream: int) -> Tensor:
    """The gradient of a table of S positions alone."""
    dpos = torch.empty((S, dy.shape[-1]), dtype=dy.dtype, device=dy.device)
    if dy.numel():
        _sum_positions(dpos, rows(dy), dy.shape[-2], offset, seed, (stream, *drop_threshold(p)))
    else:
        dpos.zero_()
    return dpos
