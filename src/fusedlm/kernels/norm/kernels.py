"""The kernels of the norms: a row a program forward, rows in turn backward, and the sum over programs.

One pair serves all four: HAS_MEAN is LayerNorm, HAS_SUM a sum before the norm, and what is not there is None.
"""

from fusedlm.kernels._philox import keep_mask
from fusedlm.kernels._triton import tl, triton


@triton.jit(do_not_specialize=["stream", "threshold"])
def fwd_kernel(
    x_ptr,
    r_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    seed_ptr,
    x_stride,
    r_stride,
    eps,
    stream,
    threshold,
    scale,
    N: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_SUM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.cast(tl.program_id(0), tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < N
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
    if HAS_SUM:
        if seed_ptr is not None:
            keep = keep_mask(tl.load(seed_ptr), stream, row, 0, threshold, BLOCK_N)
            x = tl.where(keep, x.to(tl.float32) * scale, 0.0)
        r = tl.load(r_ptr + row * r_stride + cols, mask=mask, other=0.0)
        x = (x.to(tl.float32) + r.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * N + cols, x, mask=mask)
    x = x.to(tl.float32)
    w = tl.load(w_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_MEAN:
        mean = tl.sum(x, 0) / N
        x = tl.where(mask, x - mean, 0.0)
        if mean_ptr is not None:
            tl.store(mean_ptr + row, mean)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / N + eps)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd)
    y = x * rstd * w
    if b_ptr is not None:
        y += tl.load(b_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * N + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["stream", "threshold"])
def bwd_kernel(
    dy_ptr,
    ds_ptr,
    x_ptr,
    w_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dropped_ptr,
    dw_ptr,
    db_ptr,
    dx_sums_ptr,
    seed_ptr,
    dy_stride,
    ds_stride,
    x_stride,
    M,
    stream,
    threshold,
    scale,
    N: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < N
    if BLOCK_N <= 4096:
        w = tl.load(w_ptr + cols, mask=mask, other=0.0)
    dw = tl.zeros((BLOCK_N,), tl.float32)
    if db_ptr is not None:
        db = tl.zeros((BLOCK_N,), tl.float32)
    if dx_sums_ptr is not None:
        dx_sums = tl.zeros((BLOCK_N,), tl.float32)
    # The next row is on its way while this one is worked on: the sums over a row would leave the memory idle.
    step = tl.num_programs(0)
    row = tl.cast(pid, tl.int64)
    next_dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0)
    next_x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
    for i in range(pid, M, step):
        row = tl.cast(i, tl.int64)
        dy = next_dy.to(tl.float32)
        x = next_x.to(tl.float32)
        if ds_ptr is not None:
            ds = tl.load(ds_ptr + row * ds_stride + cols, mask=mask, other=0.0)
        ahead = tl.minimum(row + step, M - 1)  # the last row once more is cheaper than a mask
        next_dy = tl.load(dy_ptr + ahead * dy_stride + cols, mask=mask, other=0.0)
        next_x = tl.load(x_ptr + ahead * x_stride + cols, mask=mask, other=0.0)
        rstd = tl.load(rstd_ptr + row)
        if HAS_MEAN:
            x -= tl.load(mean_ptr + row)  # not 0 past the end of a row, where dy is
        xh = x * rstd
        dw += dy * xh  # before the sums over the row, so that dy is not kept across them
        if db_ptr is not None:
            db += dy
        if BLOCK_N > 4096:  # read again, from the cache: there are no registers to keep it in
            w = tl.load(w_ptr + cols, mask=mask, other=0.0)
        g = dy * w.to(tl.float32)
        if HAS_MEAN:
            of_g, of_gx = tl.split(tl.sum(tl.join(g, g * xh), 0))  # two sums across the program for one's waiting
            dx = g - xh * (of_gx / N) - of_g / N
        else:
            dx = g - xh * (tl.sum(g * xh, 0) / N)
        dx *= rstd
        if ds_ptr is not None:
            dx += ds.to(tl.float32)
        rounded = dx.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + row * N + cols, rounded, mask=mask)
        if seed_ptr is not None:
            keep = keep_mask(tl.load(seed_ptr), stream, row, 0, threshold, BLOCK_N)
            rounded = tl.where(keep, dx * scale, 0.0).to(dx_ptr.dtype.element_ty)
            tl.store(dropped_ptr + row * N + cols, rounded, mask=mask)
        if dx_sums_ptr is not None:
            dx_sums += rounded.to(tl.float32)
    # A row of partial sums a program, added up in a fixed order by a second kernel: no atomics.
    partial = tl.cast(pid, tl.int64) * N
    tl.store(dw_ptr + partial + cols, dw, mask=mask)
    if db_ptr is not None:
        tl.store(db_ptr + partial + cols, db, mask=mask)
    if dx_sums_ptr is not None:
        tl.store(dx_sums_ptr + partial + cols, dx_sums, mask=mask)
