"""A pass of the whole model over a few tokens as one function that every thread runs: stages, each cut into chunks.

A thread goes through the stages in order. In each it takes tickets: a ticket is a chunk that nobody else computes. When
there are none left it waits until all chunks of the stage are done, whoever did them, and goes on. So no thread waits
for another one that has nothing in hand, and a core that is busy with something else takes part as far as it gets.

What keeps the threads apart: a stage's input is complete before the stage begins, its chunks write disjoint places, and
its input is not written again before all of its chunks are done. A thread that comes late finds no tickets, and
touches nothing.

Stages, for x the residual stream, (T, C):
    EMBED    x = the tokens' rows of the embedding (+ learned positions); cosines and sines of their positions
    PRODUCT  target = after(before(source) @ W^T + bias)
    ATTEND   attention of every query over the cache, in segments of it, whose parts the next stage joins
A decoding step is a pass of one token; prompts are read some tokens at a time.
"""

import hashlib
import math
from pathlib import Path

import numpy as np
from numba import njit

from fusedlm.inference.compiled.atomics import take_ticket, wait_for
from fusedlm.inference.compiled.products import BF16, GROUP, four_fma, load_row, rows_times, rows_times_many
from fusedlm.inference.compiled.vector import (
    LANES,
    exp,
    fma,
    highest,
    inline,
    load_f32,
    one_f32,
    one_f64,
    one_i64,
    peak,
    put_bf16,
    put_f32,
    splat,
    store_f32,
    total,
)

EMBED, PRODUCT, ATTEND = 0, 1, 2
AS_IT_IS, LAYER_NORM, RMS_NORM, JOIN = 0, 1, 2, 3  # before a product; JOIN adds up the segments of attention
STORE, ADD, GELU, SWIGLU, HEADS = 0, 1, 2, 3, 4  # after it; ADD: into x; HEADS: queries to `qkv`, the rest to the cache
PANEL = 16  # rows of a matrix whose results are finished together; for HEADS a head
TOKENS = 256  # of a pass, at most
QUERIES = 16  # tokens that one chunk of attention takes, at most

# Addresses are int64, strides bytes. Activations, gains, shifts and biases are float32, every row of them padded with
# zeros to a multiple of 64.
STAGE = np.dtype(
    [
        ("kind", "i8"),
        ("format", "i8"),  # of the matrix, as in products.py
        ("weight", "i8"),
        ("scales", "i8"),
        ("row_bytes", "i8"),
        ("rows", "i8"),  # of the result; SWIGLU has twice as many in its matrix, gate's and then up's
        ("columns", "i8"),
        ("bias", "i8"),  # 0: none
        ("before", "i8"),
        ("source", "i8"),
        ("source_stride", "i8"),  # from one token to the next
        ("gain", "i8"),
        ("shift", "i8"),
        ("eps", "f8"),
        ("after", "i8"),
        ("target", "i8"),  # 0: the logits, and of the last token alone
        ("target_stride", "i8"),
        ("panel", "i8"),
        ("keys", "i8"),  # this layer's cache, (G, capacity, D)
        ("values", "i8"),
        ("first_bound", "i8"),  # chunk c takes rows bounds[first_bound + c] to bounds[first_bound + c + 1]
        ("chunks", "i8"),
    ],
    align=True,
)

SHAPE = np.dtype(
    [
        ("heads", "i8"),
        ("groups", "i8"),  # heads of keys and values
        ("head_dim", "i8"),
        ("capacity", "i8"),  # tokens of the cache
        ("cache_format", "i8"),
        ("frequencies", "i8"),  # (D/2,) float64; 0: no rotary positions
        ("angles", "i8"),  # (T, D) float32, D/2 cosines and D/2 sines of each position
        ("positions", "i8"),  # learned ones, a matrix like `weight`; 0: none
        ("positions_bytes", "i8"),
        ("positions_format", "i8"),
        ("x", "i8"),
        ("x_stride", "i8"),
        ("queries", "i8"),  # (T, H, D), turned and scaled
        ("segment", "i8"),  # tokens of the cache that one chunk of attention takes
        ("segments", "i8"),  # that the cache has
        ("parts", "i8"),  # of attention, (T, H, segments, part_size): the sum over values, the highest score, the sum
        ("part_size", "i8"),  # D padded to a multiple of 16, and 16 more
        ("own_results", "i8"),  # where in a thread's scratch results of a panel go, (2, T, panel),
        ("own_wide", "i8"),  # and four rows of a matrix as float32; before these a product's source or scores
    ],
    align=True,
)


@inline
def _embed(stage, shape, token, position, t):
    row = stage.weight + token * stage.row_bytes
    scales = stage.scales + token * (stage.row_bytes // GROUP) * 2
    there = shape.positions + position * shape.positions_bytes
    for i in range((stage.columns + LANES - 1) // LANES):
        v = load_row(stage.format, row, scales, i, stage.columns)
        if shape.positions:
            v = v + load_row(shape.positions_format, there, np.int64(0), i, stage.columns)
        store_f32(shape.x + t * shape.x_stride + 64 * i, v)
    if shape.frequencies:
        half = shape.head_dim // 2
        angles = shape.angles + 4 * t * shape.head_dim
        for i in range(half):
            angle = position * one_f64(shape.frequencies + 8 * i)
            put_f32(angles + 4 * i, np.float32(math.cos(angle)))
            put_f32(angles + 4 * (half + i), np.float32(math.sin(angle)))


@inline
def _norm(stage, source, own):
    """LayerNorm or RMSNorm of a row into own, zeros up to a multiple of 64 by the padding of gain and shift."""
    n = (stage.columns + LANES - 1) // LANES
    padding = np.float32(n * LANES - stage.columns)  # zeros in the source, which count as -mean below
    mean = np.float32(0)
    if stage.before == LAYER_NORM:
        s = splat(0.0)
        for i in range(n):
            s = s + load_f32(source + 64 * i)
        mean = total(s) / np.float32(stage.columns)
    s = splat(0.0)
    for i in range(n):
        v = load_f32(source + 64 * i) - splat(mean)
        s = fma(v, v, s)
    variance = (total(s) - padding * mean * mean) / np.float32(stage.columns)
    scale = splat(np.float32(1) / math.sqrt(variance + np.float32(stage.eps)))
    for i in range((n + 3) // 4 * 4):
        v = (load_f32(source + 64 * i) - splat(mean)) * scale * load_f32(stage.gain + 64 * i)
        if stage.before == LAYER_NORM:
            v = v + load_f32(stage.shift + 64 * i)
        store_f32(own + 64 * i, v)


@inline
def _join(shape, position, t, own):
    """A token's heads, one behind the other and zeros behind them, each from its segments' parts.

    With a segment's highest score m and M the highest of all: sum of e^(m - M) * part over sum of e^(m - M) * its sum.
    """
    segments, D, padded = position // shape.segment + 1, shape.head_dim, shape.part_size - LANES
    for h in range(shape.heads):
        first = shape.parts + 4 * (t * shape.heads + h) * shape.segments * shape.part_size
        top, below = np.float32(-1e30), np.float32(0)
        for s in range(segments):
            top = max(top, one_f32(first + 4 * (s * shape.part_size + padded)))
        for s in range(segments):
            m = first + 4 * (s * shape.part_size + padded)
            below += math.exp(one_f32(m) - top) * one_f32(m + 4)
        for s in range(segments):
            part = first + 4 * s * shape.part_size
            weight = splat(math.exp(one_f32(part + 4 * padded) - top) / below)
            for i in range(padded // LANES):
                v = load_f32(part + 64 * i) * weight
                there = own + 4 * (h * D + LANES * i)
                store_f32(there, v if s == 0 else v + load_f32(there))
    for i in range(shape.heads * D, (shape.heads * D + 63) // 64 * 64):
        put_f32(own + 4 * i, np.float32(0))


@inline
def _sigmoid_times(x, y):
    """x * sigmoid(y)."""
    return x / (splat(1.0) + exp(splat(0.0) - y))


@inline
def _gelu(x):
    """The tanh approximation, by way of (1 + tanh(u)) / 2 = sigmoid(2u)."""
    inner = fma(x * x, splat(0.044715), splat(1.0)) * x
    return _sigmoid_times(x, inner * splat(1.5957691216057308))


@inline
def _turn(shape, t, source, target, scale):
    """One head from source to target, times scale, turned by its token's position where positions are rotary."""
    half = shape.head_dim // 2
    if shape.frequencies:
        angles = shape.angles + 4 * t * shape.head_dim
        for i in range(half):
            c, s = one_f32(angles + 4 * i), one_f32(angles + 4 * (half + i))
            a, b = one_f32(source + 4 * i), one_f32(source + 4 * (half + i))
            put_f32(target + 4 * i, (a * c - b * s) * scale)
            put_f32(target + 4 * (half + i), (b * c + a * s) * scale)
    else:
        for i in range(shape.head_dim):
            put_f32(target + 4 * i, one_f32(source + 4 * i) * scale)


@inline
def _append(shape, source, row):
    """Write a key or a value into the cache."""
    for i in range(shape.head_dim):
        if shape.cache_format == BF16:
            put_bf16(row + 2 * i, one_f32(source + 4 * i))
        else:
            put_f32(row + 4 * i, one_f32(source + 4 * i))


@inline
def _place_head(stage, shape, head, t, position, y):
    """A query to the queries, a key turned to the keys, a value to the values. y: address of it."""
    H, G, D = shape.heads, shape.groups, shape.head_dim
    if head < H:
        _turn(shape, t, y, shape.queries + 4 * (t * H + head) * D, np.float32(1 / math.sqrt(D)))
        return
    g = (head - H) % G
    at = (g * shape.capacity + position) * D * (2 if shape.cache_format == BF16 else 4)
    if head < H + G:
        _turn(shape, t, y, y, np.float32(1))
        _append(shape, y, stage.keys + at)
    else:
        _append(shape, y, stage.values + at)


@njit(nogil=True, error_model="numpy")
def _finish(stage, shape, row, end, y, y_up, t, position, target):
    """What comes after a product, for one token: rows row to end of it, whose results are at y (up's at y_up)."""
    for i in range((end - row + LANES - 1) // LANES):
        v = load_f32(y + 64 * i)
        if stage.bias:
            v = v + load_f32(stage.bias + 4 * row + 64 * i)
        if stage.after == ADD:
            v = v + load_f32(target + 64 * i)
        elif stage.after == GELU:
            v = _gelu(v)
        elif stage.after == SWIGLU:
            v = _sigmoid_times(v, v) * load_f32(y_up + 64 * i)
        store_f32(y + 64 * i if stage.after == HEADS else target + 64 * i, v)
    if stage.after == HEADS:
        _place_head(stage, shape, row // shape.head_dim, t, position, y)


@njit(nogil=True, error_model="numpy")
def _product(stage, shape, first, end, x, x_stride, T, position, logits, own):
    """A chunk: rows first to end of the result, for T tokens. x: address of the first token's vector."""
    format, weight, scales = stage.format, stage.weight, stage.scales
    row_bytes, columns = stage.row_bytes, stage.columns
    y, wide = own + shape.own_results, own + shape.own_wide
    stride = 4 * ((stage.panel + LANES - 1) // LANES * LANES)
    up = y + (T + 3) * stride
    for row in range(first, end, stage.panel):
        last = min(row + stage.panel, end)
        for i in range(2 if stage.after == SWIGLU else 1):
            low, high, there = row + i * stage.rows, last + i * stage.rows, up if i else y
            if T == 1:
                rows_times(format, weight, scales, row_bytes, columns, x, low, high, there)
            else:
                arguments = (x_stride, T, low, high, there, stride, wide)
                rows_times_many(format, weight, scales, row_bytes, columns, x, *arguments)
        for t in range(T):
            target = (stage.target + t * stage.target_stride if stage.target else logits) + 4 * row
            _finish(stage, shape, row, last, y + t * stride, up + t * stride, t, position + t, target)


@njit(nogil=True, error_model="numpy")
def _prepare(stage, shape, source, T, position, own):
    """A product's source as it goes into it, for T tokens, padded rows in own: every thread for itself, it is short."""
    stride = 4 * ((stage.columns + 63) // 64 * 64)
    for t in range(T):
        if stage.before == JOIN:
            _join(shape, position + t, t, own + t * stride)
        else:
            _norm(stage, source + t * stage.source_stride, own + t * stride)
    return stride


@inline
def _softmax(scores, count, end, part, padded):
    """e^(score - highest) of the first count scores, nearly 0 from there to end; highest and sum go into the part."""
    n = (end + LANES - 1) // LANES
    for i in range(count, n * LANES):
        put_f32(scores + 4 * i, np.float32(-1e30))
    highs, s = splat(-1e30), splat(0.0)
    for i in range(n):
        highs = highest(highs, load_f32(scores + 64 * i))
    m = peak(highs)
    for i in range(n):
        p = exp(load_f32(scores + 64 * i) - splat(m))
        store_f32(scores + 64 * i, p)
        s = s + p
    put_f32(part + 4 * padded, m)
    put_f32(part + 4 * padded + 4, total(s))


@njit(nogil=True, error_model="numpy")
def _attend(stage, shape, chunk, T, position, own):
    """A chunk: the query heads of one key/value head, of a few tokens, over one segment of the cache.

    Every head of every token writes one part. own: scratch for a row of scores for each token.
    """
    H, G, D, blocks = shape.heads, shape.groups, shape.head_dim, (T + QUERIES - 1) // QUERIES
    g, t, segment = chunk % G, chunk // G % blocks * QUERIES, chunk // (G * blocks)
    first, n = segment * shape.segment, min(QUERIES, T - t)
    end = min(shape.segment, position + t + n - first)  # of what the last of the tokens sees
    if end <= 0:
        return
    format, none = shape.cache_format, np.int64(0)  # a literal 0 would compile functions for a type of its own
    row_bytes = D * (2 if format == BF16 else 4)
    keys = stage.keys + (g * shape.capacity + first) * row_bytes
    values = stage.values + (g * shape.capacity + first) * row_bytes
    padded, stride = shape.part_size - LANES, 4 * (shape.segment + 64)
    size = 4 * shape.segments * shape.part_size  # of a head's parts
    for h in range(g * (H // G), (g + 1) * (H // G)):
        queries = shape.queries + 4 * (t * H + h) * D
        parts = shape.parts + (t * H + h) * size + 4 * segment * shape.part_size
        if n == 1:
            rows_times(format, keys, none, row_bytes, D, queries, none, end, own)
        else:
            wide = own + shape.own_wide
            rows_times_many(format, keys, none, row_bytes, D, queries, 4 * H * D, n, none, end, own, stride, wide)
        for i in range(n):
            count = max(none, min(end, position + t + i + 1 - first))
            _softmax(own + i * stride, count, end, parts + i * H * size, padded)
        for i in range(0, n, 4):
            if i + 4 <= n:
                _weigh_four(format, D, values, row_bytes, own + i * stride, stride, end, parts + i * H * size, H * size)
            else:
                for j in range(i, n):
                    _weigh(format, D, values, row_bytes, own + j * stride, end, parts + j * H * size)


@njit(nogil=True, error_model="numpy")
def _weigh(format, D, values, row_bytes, weights, count, part):
    """part = sum over i of weights[i] * values[i], 64 columns at a time while there are so many."""
    none = np.int64(0)
    j = none
    while j + 4 <= D // LANES:
        s = (splat(0.0), splat(0.0), splat(0.0), splat(0.0))
        for i in range(count):
            row = values + i * row_bytes
            v0, v1 = load_row(format, row, none, j, D), load_row(format, row, none, j + 1, D)
            v2, v3 = load_row(format, row, none, j + 2, D), load_row(format, row, none, j + 3, D)
            s = four_fma(splat(one_f32(weights + 4 * i)), v0, v1, v2, v3, s)
        for k in range(4):
            store_f32(part + 64 * (j + k), s[k])
        j += 4
    while j * LANES < D:
        s0 = splat(0.0)
        for i in range(count):
            s0 = fma(load_row(format, values + i * row_bytes, none, j, D), splat(one_f32(weights + 4 * i)), s0)
        store_f32(part + 64 * j, s0)
        j += 1


@njit(nogil=True, error_model="numpy")
def _weigh_four(format, D, values, row_bytes, weights, stride, count, part, part_stride):
    """`_weigh` for four rows of weights at once, 16 columns at a time, which reads the values once for all."""
    none = np.int64(0)
    for j in range((D + LANES - 1) // LANES):
        s0 = s1 = s2 = s3 = splat(0.0)
        for i in range(count):
            v, w = load_row(format, values + i * row_bytes, none, j, D), weights + 4 * i
            s0 = fma(v, splat(one_f32(w)), s0)
            s1 = fma(v, splat(one_f32(w + stride)), s1)
            s2 = fma(v, splat(one_f32(w + 2 * stride)), s2)
            s3 = fma(v, splat(one_f32(w + 3 * stride)), s3)
        store_f32(part + 64 * j, s0)
        store_f32(part + part_stride + 64 * j, s1)
        store_f32(part + 2 * part_stride + 64 * j, s2)
        store_f32(part + 3 * part_stride + 64 * j, s3)


def _run(stages, shapes, bounds, counters, tokens, T, position, logits, own):
    """Take part in a pass until all of it is done.

    stages: (S,) STAGE. shapes: (1,) SHAPE. bounds: int64, see STAGE. counters: address of (S, 2, 8) int64, zeros at the
    start of a pass: tickets taken and chunks done, each on a cache line of its own. tokens: address of T int64, the
    first at `position`. logits: address of V float32, padded to a multiple of 16, for the last token's; 0: not wanted.
    own: address of this thread's scratch.
    """
    shape = shapes[0]
    for i in range(len(stages)):
        stage = stages[i]
        chunks = stage.chunks
        n, source = T, stage.source
        if stage.kind == EMBED:
            chunks = T
        elif stage.kind == ATTEND:
            blocks = (T + QUERIES - 1) // QUERIES
            chunks = shape.groups * blocks * ((position + T - 1) // shape.segment + 1)
        elif stage.target == 0:
            n, source = 1, stage.source + (T - 1) * stage.source_stride
            if logits == 0:
                break
        tickets = counters + 128 * i
        x = 0
        while True:
            chunk = take_ticket(tickets)
            if chunk >= chunks:
                break
            if stage.kind == PRODUCT:
                if x == 0:
                    x, stride = source, stage.source_stride
                    if stage.before != AS_IT_IS:
                        x, stride = own, _prepare(stage, shape, source, n, position, own)
                first, end = bounds[stage.first_bound + chunk], bounds[stage.first_bound + chunk + 1]
                _product(stage, shape, first, end, x, stride, n, position, logits, own)
            elif stage.kind == ATTEND:
                _attend(stage, shape, chunk, T, position, own)
            else:
                _embed(stage, shape, one_i64(tokens + 8 * chunk), position + chunk, chunk)
            take_ticket(tickets + 64)
        wait_for(tickets + 64, chunks)


# numba keeps compiled code on disk under a function's name, and looks for changes in this file alone; what is compiled
# comes from all files here.
_SOURCES = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
_run.__qualname__ = f"run_{hashlib.sha256(_SOURCES).hexdigest()[:12]}"
try:
    run = njit(nogil=True, error_model="numpy", cache=True)(_run)
except RuntimeError:  # no folder for it can be written to
    run = njit(nogil=True, error_model="numpy")(_run)


def is_on_disk() -> bool:
    """Whether `run` was compiled for this machine before; the first time takes about ten seconds."""
    folder = run.stats.cache_path
    return folder is not None and any(Path(folder).glob(f"*{_run.__qualname__}*.nbi"))
