"""The gradients of an embedding's tables: rows of dy, summed by id in a fixed order.

Tokens are put in the order of their ids. A program sums the runs of equal ids within its chunk of them and writes a row
of the table for each; a second kernel puts together the runs that cross chunks. Rows that no token has are zeroed, and
positions summed, meanwhile.
"""

import functools

import torch
from torch import Tensor

from fusedlm.kernels._backend import interpreting
from fusedlm.kernels._launch import launch, rows
from fusedlm.kernels._operator import operator
from fusedlm.kernels._philox import drop_threshold, keep_rows
from fusedlm.kernels._triton import tl, triton
from fusedlm.kernels.embedding.order import FEW, Order, in_order

ZERO_ALL = 8 if interpreting() else 4096  # tokens with which it takes longer to find out whose rows need no zeros
Mask = tuple[Tensor | None, int, int, float]  # a seed, a stream, and drop_threshold's


@triton.jit
def _dropped(dy_ptr, dy_stride, token, there, cols, mask, group, drop, BLOCK_C: tl.constexpr):
    """(R, BLOCK_C) fp32: drop(dy) of R tokens, all on their way together; zeros where there is none."""
    at = token[:, None] * dy_stride + cols[None, :]
    dy = tl.load(dy_ptr + at, mask=there[:, None] & mask[None, :], other=0.0).to(tl.float32)
    seed_ptr, stream, threshold, scale = drop
    if seed_ptr is not None:
        keep = keep_rows(tl.load(seed_ptr), stream, token, group, threshold, BLOCK_C)
        dy = tl.where(keep, dy * scale, 0.0)
    return dy


@triton.jit
def _store_row(dw_ptr, at, total, mask, ADD: tl.constexpr):
    if ADD:
        total += tl.load(dw_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(dw_ptr + at, total.to(dw_ptr.dtype.element_ty), mask=mask)


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
    BIAS: tl.constexpr,  # see Order
    CHUNK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    chunk = tl.cast(tl.program_id(0), tl.int64)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    group = tl.program_id(1) * (BLOCK_C // 8)
    mask = cols < C
    start = chunk * CHUNK
    end = tl.minimum(start + CHUNK, M)
    before = _key(ids_ptr, start - 1, start > 0, BIAS)
    after = _key(ids_ptr, end, end < M, BIAS)
    total = tl.zeros((BLOCK_C,), tl.float32)
    place = tl.arange(0, AT_ONCE)
    for first in range(start, end, AT_ONCE):
        there = first + place < end
        token = tl.load(order_ptr + first + place, mask=there, other=0).to(tl.int64)
        drop = (seed_ptr, stream, threshold, scale)
        rows = _dropped(dy_ptr, dy_stride, token, there, cols, mask, group, drop, BLOCK_C)
        following = _key(ids_ptr, first, True, BIAS)
        for i in tl.static_range(AT_ONCE):
            v = following
            following = _key(ids_ptr, first + i + 1, first + i + 1 < end, BIAS)
            total += tl.sum(tl.where((place == i)[:, None], rows, 0.0), 0)  # row i
            if v != following:  # the end of a run, or of the chunk
                # By branches and not by masks, of which the compiler could not tell that whole rows share them.
                if (v >= 0) & (v < V):
                    if v == before:
                        tl.store(first_ptr + chunk * C + cols, total, mask=mask)
                    elif (v == after) & (first + i + 1 == end):
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
    # To leave the cache first: rows of dy are read twice.
    at = lines[:, None] * C + cols[None, :]
    tl.store(dw_ptr + at, zeros, mask=others[:, None] & (cols < C)[None, :], cache_modifier=".cs")


@triton.jit(do_not_specialize=["offset", "stream", "threshold"])
def _positions_kernel(
    dy_ptr,
    seed_ptr,
    dpos_ptr,
    dy_stride,
    M,
    C,
    T,
    offset,
    stream,
    threshold,
    scale,
    AT_ONCE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One program sums all sequences of a position; zeros where no token has it.
    p = tl.cast(tl.program_id(0), tl.int64)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    group = tl.program_id(1) * (BLOCK_C // 8)
    mask = cols < C
    t = p - offset
    total = tl.zeros((BLOCK_C,), tl.float32)
    if (t >= 0) & (t < T):
        for first in range(t, M, AT_ONCE * T):
            token = first + tl.arange(0, AT_ONCE) * T
            drop = (seed_ptr, stream, threshold, scale)
            total += tl.sum(_dropped(dy_ptr, dy_stride, token, token < M, cols, mask, group, drop, BLOCK_C), 0)
    tl.store(dpos_ptr + p * C + cols, total.to(dpos_ptr.dtype.element_ty), mask=mask)


def _columns(C: int) -> dict[str, int]:
    """Columns a program of the backward kernels. One warp: then no thread waits for another one's bits of a mask."""
    return {"BLOCK_C": min(max(triton.next_power_of_2(C), 8), 32 if interpreting() else 256), "num_warps": 1}


def _chunk(M: int) -> tuple[int, int]:
    """Places of a chunk, and how many rows of dy are on their way together.

    Where tokens are few, programs are: each takes all its places at once. Long chunks share fewer runs.
    """
    return (4, 2) if interpreting() else (8, 8) if M <= 16384 else (32, 4)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """What runs on it comes first: there is little of it at a time, and one kernel waits for the other."""
    return torch.cuda.Stream(device, priority=-1)


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
    dy2, ids = rows(dy), ids.contiguous()
    if not dy2.numel():
        for table in ([] if add else [dw]) + ([] if dpos is None else [dpos]):
            table.zero_()
        return
    mask = (seed, stream, *drop_threshold(p))
    V, M = dw.shape[0], ids.numel()
    parts = torch.empty((2, triton.cdiv(M, _chunk(M)[0]), dw.shape[1]), dtype=torch.float32, device=dy.device)

    def zeros(touched: Tensor | None = None) -> None:
        if not add:
            _zero_others(dw, ids, touched)

    def positions() -> None:
        if dpos is not None:
            _sum_positions(dpos, dy2, ids.shape[-1], offset, mask)

    if not dy.is_cuda or (add and dpos is None):
        zeros()
        positions()
        _sum_runs(dw, dy2, in_order(ids, V), mask, parts, add=add)
        return
    # Zeros, positions and runs are written to different places, so that they may run side by side: what only writes
    # beside what waits for memory. What is made on the side stream is used there alone.
    main, side = torch.cuda.current_stream(dy.device), _side_stream(dy.device)
    side.wait_stream(main)
    if M <= ZERO_ALL:
        with torch.cuda.stream(side):
            order = in_order(ids, V)
        zeros()
        side.wait_stream(main)
        positions()
        with torch.cuda.stream(side):
            _sum_runs(dw, dy2, order, mask, parts, add=add)
    else:
        # Positions read what the runs read again. Only while the sort takes longer than they do are zeros better
        # beside it. While the count is short, whose rows need zeros is found out beside it too.
        if FEW < M <= 2 * FEW:
            zeros()
            positions()
        else:
            touched = _touched(ids, V) if M <= FEW and not add else None
            positions()
            zeros(touched)
        with torch.cuda.stream(side):
            _sum_runs(dw, dy2, in_order(ids, V), mask, parts, add=add)
    main.wait_stream(side)


def _sum_runs(dw: Tensor, dy: Tensor, order: Order, mask: Mask, parts: Tensor, *, add: bool) -> None:
    """Into dw, (V, C), the sums of the rows of dy, (M, C), of each id. parts: (2, chunks, C), for what chunks share."""
    (M, C), V = dy.shape, dw.shape[0]
    seed, *drop = mask
    chunk, at_once = _chunk(M)
    constants = {"ADD": add, "BIAS": order.bias, "CHUNK": chunk}
    columns = _columns(C)
    grid = (parts.shape[1], triton.cdiv(C, columns["BLOCK_C"]), 1)
    key = (dy.dtype, dw.dtype, order.ids.dtype, order.tokens.dtype, seed is None)
    tensors = (dy, order.ids, order.tokens, seed, dw, *parts)
    config = {**constants, "AT_ONCE": at_once, **columns}
    launch(_runs_kernel, grid, key, tensors, (dy.stride(0), M, V, C, *drop), config)
    config = {**constants, "CHUNKS": 2 if interpreting() else 8, **columns}
    launch(_join_kernel, grid, (dw.dtype, order.ids.dtype), (order.ids, *parts, dw), (M, V, C), config)


def _touched(ids: Tensor, V: int) -> Tensor:
    """(V,) uint8: 1 for each row that ids name."""
    touched = torch.zeros(V, dtype=torch.uint8, device=ids.device)
    block = 64 if interpreting() else 256
    grid = (triton.cdiv(ids.numel(), block), 1, 1)
    launch(_mark_kernel, grid, ids.dtype, (ids, touched), (ids.numel(), V), {"BLOCK_N": block, "num_warps": 4})
    return touched


def _zero_others(dw: Tensor, ids: Tensor, touched: Tensor | None) -> None:
    """Zeros into the rows of dw, (V, C), that ids do not name; into all of them where ids are few. touched: of ids."""
    V, C = dw.shape
    if ids.numel() <= ZERO_ALL:
        dw.zero_()
        return
    touched = _touched(ids, V) if touched is None else touched
    constants = {"ROWS": 512 if interpreting() else 16, **_columns(C)}
    grid = (triton.cdiv(V, constants["ROWS"]), triton.cdiv(C, constants["BLOCK_C"]), 1)
    launch(_zero_kernel, grid, dw.dtype, (touched, dw), (V, C), constants)


def _sum_positions(dpos: Tensor, dy: Tensor, T: int, offset: int, mask: Mask) -> None:
    """Into dpos, (S, C), at positions from the offset on, the sums over sequences, of T tokens, of dy, (M, C); zeros
    elsewhere."""
    (S, C), M = dpos.shape, dy.shape[0]
    seed, *drop = mask
    # Warps of 8 rows each: two where T is short, for else few positions have too few rows on their way.
    at_once = 2 if interpreting() else 8 if M <= 8 * T or T >= 512 else 16
    constants = {"AT_ONCE": at_once, **_columns(C), "num_warps": triton.cdiv(at_once, 8)}
    grid = (S, triton.cdiv(C, constants["BLOCK_C"]), 1)
    scalars = (dy.stride(0), M, C, T, offset, *drop)
    launch(_positions_kernel, grid, (dy.dtype, seed is None), (dy, seed, dpos), scalars, constants)


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
        _sum_positions(dpos, rows(dy), dy.shape[-2], offset, (seed, stream, *drop_threshold(p)))
    else:
        dpos.zero_()
    return dpos
