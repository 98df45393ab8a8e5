"""The three passes of `sample`: scan every chunk, gather the candidates, draw.

A row is cut into C chunks of CHUNK tokens. Kept are the tokens at or above a threshold. From the count (top-k) and the
mass (top-p) of what lies above T pivots, the first two passes pin it down to a narrow range of logits; the third, one
program a row, finds it among the few logits in that range, the candidates, and adds up and draws what is kept.
"""

from fusedlm.kernels._triton import tl, triton

# Keys are int32 numbers in the order of the floats. -0 has the key of 0, NaN one above that of infinity.


@triton.jit
def _key(x):
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def _value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _weight(x, origin):
    return tl.exp2((x - origin) * 1.4426950408889634)


@triton.jit
def _fixed(weight):
    return (weight * 1099511627776.0).to(tl.int64)  # 2^40


@triton.jit
def _logits(x_ptr, seen_ptr, row, x_stride, seen_stride, cols, V, penalty):
    # int64 rows and columns
    x = tl.load(x_ptr + row * x_stride + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
    if seen_ptr is not None:
        seen = tl.load(seen_ptr + row * seen_stride + cols, mask=cols < V, other=0) != 0
        x = tl.where(seen, tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + penalty), x * penalty), x)
    return x


@triton.jit
def _pin(x, N: tl.constexpr):
    # x as it is. The compiler will not repeat a scan (of one number each), and so not what comes before it; without,
    # it computes an exponential anew for every pivot that a number is compared with.
    return tl.reshape(tl.cumsum(tl.reshape(x, (N, 1)), 1), (N,))


@triton.jit
def _top(best, inverse, STEPS: tl.constexpr):
    """The highest logit of a packed maximum, and its place on the pivots' grid: the next 1 / STEPS above it.

    Pivots are whole numbers n on that grid, as floats: the logit times STEPS is compared with n. Chunks count theirs
    down from their own maximum, and yet two chunks' pivots of the same n are the same number, however it was rounded.
    """
    top = _value((best >> 32).to(tl.int32)) * inverse
    return top, tl.where(top > -float("inf"), tl.ceil(top * STEPS), 0.0)


@triton.jit
def scan_kernel(
    x_ptr,
    seen_ptr,
    best_ptr,
    mass_ptr,
    count_ptr,
    x_stride,
    seen_stride,
    V,
    C,
    inverse,
    penalty,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    T: tl.constexpr,
    STEPS: tl.constexpr,
):
    # A chunk's highest logit and where it is; the mass and the count of what lies above each of T pivots, T - 1 below
    # that logit and the last at -infinity.
    pid = tl.cast(tl.program_id(0), tl.int64)
    row, start = pid // C, (pid % C) * CHUNK
    cols = start + tl.arange(0, CHUNK)
    x = _logits(x_ptr, seen_ptr, row, x_stride, seen_stride, cols, V, penalty)
    best = tl.max((_key(x).to(tl.int64) << 32) | (0x7FFFFFFF - cols), 0)  # of equals, the lowest index
    tl.store(best_ptr + pid, best)
    if mass_ptr is not None or count_ptr is not None:
        _, n = _top(best, inverse, STEPS)
        j = tl.arange(0, T)
        pivots = tl.where(j < T - 1, n - 1.0 - j, -float("inf"))
        mass = tl.zeros((T,), tl.float32)
        count = tl.zeros((T,), tl.int32)
        for at in range(0, CHUNK, TILE):
            tile = start + at + tl.arange(0, TILE)
            y = _logits(x_ptr, seen_ptr, row, x_stride, seen_stride, tile, V, penalty) * inverse
            if mass_ptr is not None:
                weight = _pin(_weight(y, n / STEPS), TILE)[:, None]
            above = _pin(y * STEPS, TILE)[:, None] > pivots[None, :]
            if mass_ptr is not None:
                mass += tl.sum(tl.where(above, weight, 0.0), 0)
            if count_ptr is not None:
                count += tl.sum(above.to(tl.int32), 0)
        if mass_ptr is not None:
            tl.store(mass_ptr + pid * T + j, mass)
        if count_ptr is not None:
            tl.store(count_ptr + pid * T + j, count)


@triton.jit
def gather_kernel(
    x_ptr,
    seen_ptr,
    best_ptr,
    mass_ptr,
    count_ptr,
    sums_ptr,
    slots_ptr,
    x_stride,
    seen_stride,
    V,
    C,
    top_k,
    inverse,
    penalty,
    top_p,
    min_p,
    CHUNK: tl.constexpr,
    NCH: tl.constexpr,
    T: tl.constexpr,
    STEPS: tl.constexpr,
):
    # Every program of a row finds out between which pivots the thresholds lie. Of its chunk it adds up what is above
    # and collects what is between: the candidates.
    pid = tl.cast(tl.program_id(0), tl.int64)
    row, chunk = pid // C, pid % C
    chunks = tl.arange(0, NCH)
    here = chunks < C
    best = tl.load(best_ptr + row * C + chunks, mask=here, other=-0x7FFFFFFFFFFFFFFF)
    tops, ns = _top(best, inverse, STEPS)
    top, n = _top(tl.max(best, 0), inverse, STEPS)
    if tl.abs(n) < float("inf") and top > -float("inf"):
        low, high = -float("inf"), -float("inf")
        if mass_ptr is not None or count_ptr is not None:
            # Pivot j of the row is pivot j - shift of the chunk; the last is every chunk's last.
            j = tl.arange(0, T)
            shift = tl.where(tops > -float("inf"), tl.minimum(n - ns, T), T).to(tl.int32)
            source = tl.where(j[None, :] < T - 1, j[None, :] - shift[:, None], T - 1)
            at = (row * C + chunks)[:, None] * T + source
            there = here[:, None] & (source >= 0)
            if mass_ptr is not None:
                mass = tl.load(mass_ptr + at, mask=there, other=0.0) * _weight(ns / STEPS, n / STEPS)[:, None]
                masses = tl.sum(_fixed(mass), 0)
            last = 0  # the first pivot at or below every threshold
            if count_ptr is not None:
                counts = tl.sum(tl.load(count_ptr + at, mask=there, other=0), 0)
                last = tl.minimum(tl.sum((counts < top_k).to(tl.int32), 0), T - 1)
                first = last
            if mass_ptr is not None:
                # The mass that top-p takes its share of: all, or at least what is above the pivot before top-k's.
                total = tl.sum(tl.where(j == (T - 1 if count_ptr is None else last - 1), masses, 0), 0)
                first = tl.sum((masses.to(tl.float32) < top_p * total.to(tl.float32)).to(tl.int32), 0)
                first = tl.minimum(first, T - 1 if count_ptr is None else last)
                if count_ptr is None:
                    last = first
            low = tl.where(last < T - 1, n - 1.0 - last, -float("inf"))
            high = tl.where(first > 0, n - 1.0 - (first - 1), n)
        cols = chunk * CHUNK + tl.arange(0, CHUNK)
        x = _logits(x_ptr, seen_ptr, row, x_stride, seen_stride, cols, V, penalty) * inverse
        w = _weight(x, n / STEPS)
        weight = _fixed(w)
        above = x * STEPS > high
        sums = sums_ptr + row * 7 * C + chunk
        floor = min_p * _weight(top, n / STEPS)
        tl.store(sums, tl.sum(tl.where(above & (w >= floor), weight, 0), 0))
        if mass_ptr is not None or count_ptr is not None:
            between = (x * STEPS > low) & (x * STEPS <= high)
            rank = tl.cumsum(between.to(tl.int32), 0) - 1
            tl.store(slots_ptr + pid * CHUNK + rank, x, mask=between)
            tl.store(sums + C, tl.sum(between.to(tl.int64), 0))
            tl.store(sums + 2 * C, tl.sum(tl.where(above, weight, 0), 0))
            tl.store(sums + 3 * C, tl.sum(weight, 0))
            tl.store(sums + 4 * C, tl.sum(above.to(tl.int64), 0))
            tl.store(sums + 5 * C, _key(low / STEPS).to(tl.int64))
            tl.store(sums + 6 * C, _key(high / STEPS).to(tl.int64))


@triton.jit
def _candidates(slots, n, at, CHUNK: tl.constexpr, NCH: tl.constexpr, W: tl.constexpr):
    # (NCH, W): W candidates of every chunk, from the at-th on
    cols = at + tl.arange(0, W)
    where = tl.arange(0, NCH)[:, None] * CHUNK + cols[None, :]
    return tl.load(slots + where, mask=cols[None, :] < n[:, None], other=-float("inf"))


@triton.jit
def _above(
    slots,
    n,
    pivots,
    origin,
    BY_COUNT: tl.constexpr,
    CHUNK: tl.constexpr,
    NCH: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
):
    """How many candidates, or how much mass, each of P keys has above it."""
    found = tl.zeros((P,), tl.int64)
    for at in range(0, tl.max(n, 0), W):
        x = tl.reshape(_candidates(slots, n, at, CHUNK, NCH, W), (NCH * W,))
        above = _key(x)[:, None] > pivots[None, :]
        if BY_COUNT:
            found += tl.sum(above.to(tl.int32), 0)
        else:
            found += tl.sum(tl.where(above, _fixed(_weight(x, origin))[:, None], 0), 0)
    return found


@triton.jit
def _extent(slots, n, low, high, CHUNK: tl.constexpr, NCH: tl.constexpr, W: tl.constexpr):
    """The lowest and the highest key of the candidates in (low, high]; the lowest is higher where there are none."""
    first = tl.full((NCH, W), 0x7FFFFFFF, tl.int32)
    last = tl.full((NCH, W), -0x80000000, tl.int32)
    for at in range(0, tl.max(n, 0), W):
        key = _key(_candidates(slots, n, at, CHUNK, NCH, W))
        inside = (key > low) & (key <= high)
        first = tl.where(inside, tl.minimum(first, key), first)
        last = tl.where(inside, tl.maximum(last, key), last)
    return tl.min(tl.min(first, 1), 0).to(tl.int64), tl.max(tl.max(last, 1), 0).to(tl.int64)


@triton.jit
def _narrow(slots, n, low, high, origin, floor, CHUNK: tl.constexpr, NCH: tl.constexpr, W: tl.constexpr):
    """Leave only the candidates above low and up to high. Returns how many of each chunk those are, and of those above
    high, which are taken out, the mass of each chunk, the same with min-p's filter, and the count of each chunk."""
    left = tl.zeros((NCH,), tl.int32)
    count = tl.zeros((NCH,), tl.int32)
    mass = tl.zeros((NCH,), tl.int64)
    kept = tl.zeros((NCH,), tl.int64)
    for at in range(0, tl.max(n, 0), W):
        x = _candidates(slots, n, at, CHUNK, NCH, W)
        key = _key(x)
        w = _weight(x, origin)
        weight = tl.where(key > high, _fixed(w), 0)
        mass += tl.sum(weight, 1)
        kept += tl.sum(tl.where(w >= floor, weight, 0), 1)
        count += tl.sum((key > high).to(tl.int32), 1)
        stay = ((key > low) & (key <= high)).to(tl.int32)
        to = tl.arange(0, NCH)[:, None] * CHUNK + left[:, None] + tl.cumsum(stay, 1) - 1
        tl.debug_barrier()  # everybody has read these candidates: their places may be written
        tl.store(slots + to, x, mask=stay != 0)
        left += tl.sum(stay, 1)
    tl.debug_barrier()
    return left, mass, kept, count


@triton.jit
def _search(
    slots,
    n,
    kept,
    base,
    low,
    high,
    target,
    origin,
    floor,
    BY_COUNT: tl.constexpr,
    LAST: tl.constexpr,
    CHUNK: tl.constexpr,
    NCH: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
):
    """The lowest key in (low, high] that has less than target above it, in count or mass, base included.

    The last search takes candidates out of the list once they are decided: those kept join kept, the chunks' masses.
    """
    turn = 0
    i = tl.arange(1, P + 1)
    while high - low > 1:
        first, last = _extent(slots, n, low, high, CHUNK, NCH, W)
        high = tl.where(first <= last, last, high)
        low = tl.where(first < last, first - 1, high - 1)
        if high - low > 1:
            if turn < 3:  # evenly spaced values first: half of all keys belong to numbers next to zero
                bottom, top = _value(first.to(tl.int32)), _value(last.to(tl.int32))
                pivots = _key(bottom + (top - bottom) * (i / (P + 1))).to(tl.int64)
                pivots = tl.minimum(tl.maximum(pivots, first), last - 1)
            else:
                pivots = first + (last - first) * i // (P + 1)
            found = base + _above(slots, n, pivots.to(tl.int32), origin, BY_COUNT, CHUNK, NCH, W, P)
            low = tl.max(tl.where(found >= target, pivots, low), 0)
            high = tl.min(tl.where(found < target, pivots, high), 0)
            turn += 1
            if LAST and tl.max(n, 0) > W:
                n, mass, more, count = _narrow(slots, n, low, high, origin, floor, CHUNK, NCH, W)
                kept += more
                base += tl.sum(count.to(tl.int64), 0) if BY_COUNT else tl.sum(mass, 0)
    return high, n, kept


@triton.jit
def draw_kernel(
    x_ptr,
    seen_ptr,
    uniform_ptr,
    best_ptr,
    sums_ptr,
    slots_ptr,
    token_ptr,
    x_stride,
    seen_stride,
    V,
    C,
    top_k,
    inverse,
    penalty,
    top_p,
    min_p,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    CHUNK: tl.constexpr,
    NCH: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    STEPS: tl.constexpr,
):
    row = tl.cast(tl.program_id(0), tl.int64)
    chunks = tl.arange(0, NCH)
    here = chunks < C
    best = tl.max(tl.load(best_ptr + row * C + chunks, mask=here, other=-0x7FFFFFFFFFFFFFFF), 0)
    token = 0x7FFFFFFF - (best & 0xFFFFFFFF)
    if uniform_ptr is not None:
        top, n_top = _top(best, inverse, STEPS)
        if tl.abs(n_top) < float("inf") and top > -float("inf"):
            origin = n_top / STEPS
            floor = min_p * _weight(top, origin)
            sums = sums_ptr + row * 7 * C + chunks
            slots = slots_ptr + row * C * CHUNK
            kept = tl.load(sums, mask=here, other=0)  # mass of a chunk that the draw is made from
            threshold = tl.cast(-0x80000000, tl.int64)
            if TOP_K or TOP_P:
                n = tl.load(sums + C, mask=here, other=0).to(tl.int32)
                base = tl.sum(tl.load(sums + 2 * C, mask=here, other=0), 0)
                total = tl.sum(tl.load(sums + 3 * C, mask=here, other=0), 0)
                low = tl.load(sums_ptr + row * 7 * C + 5 * C)
                high = tl.load(sums_ptr + row * 7 * C + 6 * C)
                if TOP_K:
                    count = tl.sum(tl.load(sums + 4 * C, mask=here, other=0), 0)
                    threshold, n, kept = _search(
                        slots, n, kept, count, low, high, top_k, origin, floor, True, not TOP_P, CHUNK, NCH, W, P
                    )
                if TOP_P:
                    if TOP_K:
                        low = threshold - 1
                        pivots = low.to(tl.int32) + tl.zeros((P,), tl.int32)
                        total = base + tl.max(_above(slots, n, pivots, origin, False, CHUNK, NCH, W, P), 0)
                    target = tl.ceil(total.to(tl.float64) * tl.cast(top_p, tl.float64)).to(tl.int64)
                    threshold, n, kept = _search(
                        slots, n, kept, base, low, high, target, origin, floor, False, True, CHUNK, NCH, W, P
                    )
                for at in range(0, tl.max(n, 0), W):
                    x = _candidates(slots, n, at, CHUNK, NCH, W)
                    w = _weight(x, origin)
                    kept += tl.sum(tl.where((_key(x) >= threshold) & (w >= floor), _fixed(w), 0), 1)
            # The first chunk, and in it the first token, at which the running sum passes u times the whole.
            whole = tl.sum(kept, 0)
            u = tl.load(uniform_ptr + row).to(tl.float64)
            passed = tl.minimum(tl.maximum((u * whole.to(tl.float64)).to(tl.int64), 0), whole - 1)
            chunk = tl.sum((tl.cumsum(kept, 0) <= passed).to(tl.int32), 0)
            passed -= tl.sum(tl.where(chunks < chunk, kept, 0), 0)
            cols = tl.cast(chunk, tl.int64) * CHUNK + tl.arange(0, CHUNK)
            x = _logits(x_ptr, seen_ptr, row, x_stride, seen_stride, cols, V, penalty) * inverse
            w = _weight(x, origin)
            weight = tl.where((_key(x) >= threshold) & (w >= floor), _fixed(w), 0)
            token = tl.cast(chunk, tl.int64) * CHUNK + tl.sum((tl.cumsum(weight, 0) <= passed).to(tl.int64), 0)
    tl.store(token_ptr + row, token)
