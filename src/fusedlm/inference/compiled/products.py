"""Rows of a matrix times one vector or several, for weights of each format: nearly all that there is to do.

With one vector, a token's, four rows go through it together, so that each part of it is loaded once for all four. Rows
lie behind one another in memory and are read once. What limits a core is how many lines of memory it has asked for and
not yet got; with the arithmetic of narrow formats in between, its own look-ahead asks for too few. So the next four
rows are asked for, line by line, while these are multiplied.
"""

from typing import Any

import numpy as np
from numba import njit

from fusedlm.inference.compiled.vector import (
    LANES,
    add_sums,
    fma,
    inline,
    load_bf16,
    load_bf16_part,
    load_f32,
    load_f32_part,
    load_int8,
    one_bf16,
    prefetch,
    put_f32,
    splat,
    store_f32,
    total,
)

F32, BF16, INT8 = 0, 1, 2
GROUP = 64  # elements of an int8 row that share a scale
LINE = 64  # bytes that memory hands over at once
AHEAD = 6144  # bytes from the line being read to the line being asked for, at least


def _rows_of(size: int, load: Any, load_part: Any) -> Any:
    """The product of four rows with x, whose elements have `size` bytes and are loaded by these two."""

    @inline
    def rows(a0, a1, a2, a3, ahead, x, columns):
        y0 = y1 = y2 = y3 = splat(0.0)
        whole = columns // LANES
        for i in range(whole):
            k = LANES * size * i
            v = load_f32(x + 64 * i)
            for j in range(size):  # 16 elements of four rows are so many lines
                prefetch(a0 + ahead + 4 * k + LINE * j)
            y0 = fma(load(a0 + k), v, y0)
            y1 = fma(load(a1 + k), v, y1)
            y2 = fma(load(a2 + k), v, y2)
            y3 = fma(load(a3 + k), v, y3)
        left, k = columns - LANES * whole, LANES * size * whole
        if left:
            v = load_f32(x + 64 * whole)
            y0 = fma(load_part(a0 + k, left), v, y0)
            y1 = fma(load_part(a1 + k, left), v, y1)
            y2 = fma(load_part(a2 + k, left), v, y2)
            y3 = fma(load_part(a3 + k, left), v, y3)
        return total(y0), total(y1), total(y2), total(y3)

    return rows


_f32, _bf16 = _rows_of(4, load_f32, load_f32_part), _rows_of(2, load_bf16, load_bf16_part)


@inline
def _group(a, x0, x1, x2, x3, scale, y):
    """y + scale * (one group of int8 weights times its part of the vector)."""
    s = load_int8(a) * x0
    s = fma(load_int8(a + 16), x1, s)
    s = fma(load_int8(a + 32), x2, s)
    s = fma(load_int8(a + 48), x3, s)
    return fma(s, splat(one_bf16(scale)), y)


@inline
def _int8(a0, a1, a2, a3, s0, s1, s2, s3, ahead, x, groups):
    y0 = y1 = y2 = y3 = splat(0.0)
    for i in range(groups):
        k, v = GROUP * i, x + 4 * GROUP * i
        x0, x1, x2, x3 = load_f32(v), load_f32(v + 64), load_f32(v + 128), load_f32(v + 192)
        for j in range(4):
            prefetch(a0 + ahead + 4 * k + LINE * j)
        y0 = _group(a0 + k, x0, x1, x2, x3, s0 + 2 * i, y0)
        y1 = _group(a1 + k, x0, x1, x2, x3, s1 + 2 * i, y1)
        y2 = _group(a2 + k, x0, x1, x2, x3, s2 + 2 * i, y2)
        y3 = _group(a3 + k, x0, x1, x2, x3, s3 + 2 * i, y3)
    return total(y0), total(y1), total(y2), total(y3)


@njit(nogil=True, error_model="numpy")
def rows_times(format, weight, scales, row_bytes, columns, x, first, end, y):
    """y = rows first to end of a matrix times a vector, and zeros up to a multiple of 16.

    weight: address of (N, columns) float32, bfloat16 or int8, rows row_bytes apart. int8 rows are padded to whole
    groups; scales: address of (N, groups) bfloat16. x: address of columns float32 and zeros up to a multiple of 64. y:
    address of float32.
    """
    ahead = max(4 * row_bytes, AHEAD)
    groups = row_bytes // GROUP
    for row in range(first, end, 4):
        r1, r2, r3 = min(row + 1, end - 1), min(row + 2, end - 1), min(row + 3, end - 1)  # the last row again
        a0, a1, a2, a3 = (
            weight + row * row_bytes,
            weight + r1 * row_bytes,
            weight + r2 * row_bytes,
            weight + r3 * row_bytes,
        )
        if format == F32:
            y0, y1, y2, y3 = _f32(a0, a1, a2, a3, ahead, x, columns)
        elif format == BF16:
            y0, y1, y2, y3 = _bf16(a0, a1, a2, a3, ahead, x, columns)
        else:
            b = 2 * groups
            s0, s1, s2, s3 = scales + row * b, scales + r1 * b, scales + r2 * b, scales + r3 * b
            y0, y1, y2, y3 = _int8(a0, a1, a2, a3, s0, s1, s2, s3, ahead, x, groups)
        put_f32(y, y0)
        put_f32(y + 4, y1)
        put_f32(y + 8, y2)
        put_f32(y + 12, y3)
        y += 16
    n = end - first
    for i in range(n, (n + LANES - 1) // LANES * LANES):
        put_f32(y + 4 * (i - (n + 3) // 4 * 4), np.float32(0))


@inline
def load_row(format, row, scales, index, columns):
    """Elements 16*index to 16*index + 15 of a row of `columns`, zeros behind its end. row, scales: their addresses."""
    left = columns - LANES * index
    if format == F32:
        a = row + 64 * index
        return load_f32(a) if left >= LANES else load_f32_part(a, left)
    if format == BF16:
        a = row + 32 * index
        return load_bf16(a) if left >= LANES else load_bf16_part(a, left)
    return load_int8(row + LANES * index) * splat(one_bf16(scales + 2 * (LANES * index // GROUP)))


@inline
def four_fma(w, x0, x1, x2, x3, s):
    """A vector times each of four, added to four sums."""
    return fma(w, x0, s[0]), fma(w, x1, s[1]), fma(w, x2, s[2]), fma(w, x3, s[3])


@njit(nogil=True, error_model="numpy")
def _tile(w, w_stride, x0, x1, x2, x3, n, y, y_stride):
    """y[t, r] += w[r] . x[t] for four rows of 16 * n float32 and four vectors: 16 sums that stay in registers."""
    zero = splat(0.0)
    s0 = s1 = s2 = s3 = (zero, zero, zero, zero)
    for k in range(0, 64 * n, 64):
        a = w + k
        w0, w1 = load_f32(a), load_f32(a + w_stride)
        w2, w3 = load_f32(a + 2 * w_stride), load_f32(a + 3 * w_stride)
        s0 = four_fma(load_f32(x0 + k), w0, w1, w2, w3, s0)
        s1 = four_fma(load_f32(x1 + k), w0, w1, w2, w3, s1)
        s2 = four_fma(load_f32(x2 + k), w0, w1, w2, w3, s2)
        s3 = four_fma(load_f32(x3 + k), w0, w1, w2, w3, s3)
    add_sums(y, y_stride, s0 + s1 + s2 + s3)


@njit(nogil=True, error_model="numpy")
def rows_times_many(format, weight, scales, row_bytes, columns, x, x_stride, T, first, end, y, y_stride, wide):
    """y[t] = rows first to end of a matrix times x[t], and zeros up to a multiple of 16, for T vectors.

    Arguments are those of `rows_times`, with x and y rows of so many bytes, whose number is a multiple of four.
    wide: address of 8 * 1024 float32. Eight rows, at most 1024 columns of them, are widened to float32 at a time: with
    the same columns of four vectors they stay in the first-level cache.
    """
    n = (columns + LANES - 1) // LANES
    for t in range((T + 3) // 4 * 4):
        for i in range((end - first + LANES - 1) // LANES):
            store_f32(y + t * y_stride + 64 * i, splat(0.0))
    parts = (n + 63) // 64
    length = (n + parts - 1) // parts  # of a part, in vectors
    for row in range(first, end, 8):
        for begin in range(0, n, length):
            m = min(length, n - begin)
            for i in range(8):
                r = row + i
                a, s = weight + r * row_bytes, scales + r * (row_bytes // GROUP) * 2
                for k in range(m):
                    v = load_row(format, a, s, begin + k, columns) if r < end else splat(0.0)
                    store_f32(wide + 64 * (i * m + k), v)
            for t in range(0, T, 4):
                x0 = x + t * x_stride + 64 * begin
                x1, x2, x3 = x0 + x_stride, x0 + 2 * x_stride, x0 + 3 * x_stride
                there = y + t * y_stride + 4 * (row - first)
                _tile(wide, 64 * m, x0, x1, x2, x3, m, there, y_stride)
                if row + 4 < end:
                    _tile(wide + 256 * m, 64 * m, x0, x1, x2, x3, m, there + 16, y_stride)
