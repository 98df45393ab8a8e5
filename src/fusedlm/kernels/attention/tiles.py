"""What the passes share: which program works on what, tiles of rows, and the intervals of what sees what."""

from fusedlm.kernels._triton import tl, triton


@triton.jit
def program_place(rows, heads, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """(block of rows, sequence, head) of a program of a grid of B * heads * cdiv(rows, BLOCK)."""
    blocks = tl.cdiv(rows, BLOCK)
    block = tl.program_id(0) % blocks
    if LAST_FIRST:
        block = blocks - 1 - block
    outer = tl.program_id(0) // blocks
    return block, tl.cast(outer // heads, tl.int64), tl.cast(outer % heads, tl.int64)


@triton.jit
def store_lse(lse_ptr, row, top, total, mask, WIDE: tl.constexpr):
    """log2 of a row's sum of exponentials, top + log2(total); WIDE: and beside it what rounding took from it."""
    lse = top + tl.log2(total)
    if WIDE:
        tl.store(lse_ptr + 2 * row, lse, mask=mask)
        rest = (top - lse) + tl.log2(total)
        tl.store(lse_ptr + 2 * row + 1, tl.where(total == 0.0, 0.0, rest), mask=mask)
    else:
        tl.store(lse_ptr + row, lse, mask=mask)


@triton.jit
def load_lse(lse_ptr, row, mask, WIDE: tl.constexpr):
    """What `store_lse` left, two numbers; so that of rows past the end every weight is 0."""
    if WIDE:
        lse = tl.load(lse_ptr + 2 * row, mask=mask, other=float("inf"))
        rest = tl.load(lse_ptr + 2 * row + 1, mask=mask, other=0.0)
    else:
        lse = tl.load(lse_ptr + row, mask=mask, other=float("inf"))
        rest = lse
    return lse, rest


@triton.jit
def load_rows(
    ptr, start, stride, rows, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
):
    """(BLOCK, BLOCK_D) from row start on, of a (rows, D) matrix; zeros past its end where MASKED."""
    i = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    # 64 bits to the tile, 32 within it: a register an address, not two.
    at = ptr + tl.cast(start, tl.int64) * stride + (i[:, None] * stride + d[None, :])
    if MASKED or D != BLOCK_D:
        return tl.load(at, mask=(start + i < rows)[:, None] & (d < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def store_rows(ptr, start, stride, rows, x, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """The opposite of load_rows; rounds to what ptr points to."""
    i = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    at = ptr + tl.cast(start, tl.int64) * stride + (i[:, None] * stride + d[None, :])
    tl.store(at, x.to(ptr.dtype.element_ty), mask=(start + i < rows)[:, None] & (d < D)[None, :])


@triton.jit
def keys_seen(m, offset, starts_ptr, ends_ptr, T, S, IS_CAUSAL: tl.constexpr):
    """[lo, hi) of the keys that each query of m sees, int32 each; none for queries past the end."""
    valid = m < T
    if starts_ptr is not None:
        lo = tl.load(starts_ptr + m, mask=valid, other=0)
        hi = tl.load(ends_ptr + m, mask=valid, other=0)
        if IS_CAUSAL:
            hi = tl.minimum(hi, m + 1)
    else:
        lo = m * 0
        hi = tl.minimum(m + 1 + offset, S) if IS_CAUSAL else lo + S
    return lo, tl.where(valid, tl.maximum(hi, lo), lo)


@triton.jit
def queries_seeing(n, offset, starts_ptr, ends_ptr, T, S, IS_CAUSAL: tl.constexpr):
    """[lo, hi) of the queries that see each key of n; none for keys past the end."""
    valid = n < S
    if starts_ptr is not None:
        lo = n if IS_CAUSAL else tl.load(starts_ptr + n, mask=valid, other=0)
        hi = tl.load(ends_ptr + n, mask=valid, other=0)
    else:
        lo = tl.maximum(n - offset, 0) if IS_CAUSAL else n * 0
        hi = n * 0 + T
    return lo, tl.where(valid, tl.maximum(hi, lo), lo)


@triton.jit
def _interval_blocks(lo, hi, valid, end, BLOCK: tl.constexpr):
    first = tl.min(tl.where(valid, lo, end), 0) // BLOCK * BLOCK
    last = tl.max(tl.where(valid, hi, 0), 0)
    whole_first = tl.minimum(tl.cdiv(tl.max(tl.where(valid, lo, 0), 0), BLOCK), tl.cdiv(last, BLOCK)) * BLOCK
    whole_last = tl.min(tl.where(valid, hi, end), 0) // BLOCK * BLOCK
    return first, whole_first, whole_last, last


@triton.jit
def key_blocks(
    lo, hi, start, offset, T, S, PACKED: tl.constexpr, IS_CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(first, whole_first, whole_last, last) of the keys that BLOCK_M queries from start on see.

    From first to last are all that one of them sees; from whole_first to whole_last those that all of them see, which
    need no mask. Multiples of BLOCK_N, but for last.
    """
    if PACKED:
        return _interval_blocks(lo, hi, start + tl.arange(0, BLOCK_M) < T, S, BLOCK_N)
    else:  # scalars, where the sums across a program of the other way would cost as much as two blocks
        last = tl.minimum(tl.minimum(start + BLOCK_M, T) + offset, S) if IS_CAUSAL else S
        whole_last = tl.minimum(start + 1 + offset, S) if IS_CAUSAL else S
        return 0, 0, whole_last // BLOCK_N * BLOCK_N, last


@triton.jit
def query_blocks(
    lo, hi, start, offset, T, S, PACKED: tl.constexpr, IS_CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same of the queries that see BLOCK_N keys from start on; those past the end weigh nothing, without a mask."""
    if PACKED:
        return _interval_blocks(lo, hi, start + tl.arange(0, BLOCK_N) < S, T, BLOCK_M)
    else:
        first = tl.maximum(start - offset, 0) // BLOCK_M * BLOCK_M if IS_CAUSAL else 0
        highest = tl.minimum(start + BLOCK_N, S) - 1
        whole_first = tl.cdiv(tl.maximum(highest - offset, 0), BLOCK_M) * BLOCK_M if IS_CAUSAL else 0
        return first, whole_first, T, T
