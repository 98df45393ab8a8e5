"""A matrix product and what is done to its result before it reaches memory, in plain Triton: for every GPU.

A program computes a tile of a @ b^T. The same as `hopper`, in the plainest form.
"""

from fusedlm.kernels._philox import keep_groups
from fusedlm.kernels._triton import tl, triton
from fusedlm.kernels.gelu import gelu_and_slope, gelu_of
from fusedlm.kernels.swiglu import swiglu_gradients, swiglu_of


@triton.jit
def _sums(
    a_rows, b_rows, a_inside, b_inside, K, ak_stride, bk_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) fp32. a_rows, b_rows: pointers to the first number of each row."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        a = tl.load(a_rows[:, None] + k[None, :] * ak_stride, mask=a_inside[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(b_rows[None, :] + k[:, None] * bk_stride, mask=b_inside[None, :] & (k < K)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["stream", "threshold"])
def product_kernel(
    a_ptr,  # (M, K)
    b_ptr,  # (N, K); (2N, K), two halves, for "swiglu"
    y_ptr,  # (M, N); (M, 2N), of gate and up, for "dswiglu"
    kept_ptr,  # or None. "gelu": the sums, (M, N), "swiglu": (M, 2N); "dgelu", "dswiglu": what the activation gives
    bias_ptr,  # (N,) or None
    given_ptr,  # "add": (M, N) or None; "dgelu": the sums that GELU was given; "dswiglu": gate and up, (M, 2N)
    seed_ptr,  # "add": of a dropout of the product and bias; or None
    totals_ptr,  # "dgelu": (ceil(M / BLOCK_M), N) fp32, whose sums over rows are those of y; or None
    a_stride,
    ak_stride,
    b_stride,
    bk_stride,
    M,
    N,
    K,
    stream,
    threshold,
    factor,
    EPILOGUE: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_N)
    m = tl.program_id(0) // blocks * BLOCK_M
    n = tl.program_id(0) % blocks * BLOCK_N
    row = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
    col = n + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    WIDE: tl.constexpr = dtype == tl.float32
    a_rows = a_ptr + row * tl.cast(a_stride, tl.int64)
    b_rows = b_ptr + col.to(tl.int64) * tl.cast(b_stride, tl.int64)
    inside = (row < M)[:, None] & (col < N)[None, :]
    acc = _sums(a_rows, b_rows, row < M, col < N, K, ak_stride, bk_stride, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    x = acc.to(dtype).to(tl.float32)  # as the unfused ops round it
    at = row[:, None] * N + col[None, :]
    at2 = row[:, None] * (2 * N) + col[None, :]
    if EPILOGUE == "add":
        y = x
        if seed_ptr is not None:
            group = (row * (N // 8))[:, None] + (n // 8 + tl.arange(0, BLOCK_N // 8))[None, :]
            y = tl.where(keep_groups(tl.load(seed_ptr), stream, group, threshold), y * factor, 0.0)
        if given_ptr is not None:
            y += tl.load(given_ptr + at, mask=inside, other=0.0).to(tl.float32)
    elif EPILOGUE == "gelu":
        y = gelu_of(x, TANH, WIDE)
        if kept_ptr is not None:
            tl.store(kept_ptr + at, x.to(dtype), mask=inside)
    elif EPILOGUE == "dgelu":
        pre = tl.load(given_ptr + at, mask=inside, other=0.0).to(tl.float32)
        act, slope = gelu_and_slope(pre, TANH, WIDE)
        y = x * slope
        if kept_ptr is not None:
            tl.store(kept_ptr + at, act.to(dtype), mask=inside)
        if totals_ptr is not None:
            line = tl.cast(tl.program_id(0) // blocks, tl.int64) * N
            tl.store(totals_ptr + line + col, tl.sum(y, 0), mask=col < N)
    elif EPILOGUE == "swiglu":
        up_rows = b_rows + tl.cast(b_stride, tl.int64) * N
        up = _sums(a_rows, up_rows, row < M, col < N, K, ak_stride, bk_stride, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        up = up.to(dtype).to(tl.float32)
        y = swiglu_of(x, up)
        if kept_ptr is not None:
            tl.store(kept_ptr + at2, x.to(dtype), mask=inside)
            tl.store(kept_ptr + at2 + N, up.to(dtype), mask=inside)
    else:
        gate = tl.load(given_ptr + at2, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(given_ptr + at2 + N, mask=inside, other=0.0).to(tl.float32)
        y, du, act = swiglu_gradients(x, gate, up)
        if kept_ptr is not None:
            tl.store(kept_ptr + at, act.to(dtype), mask=inside)
        tl.store(y_ptr + at2 + N, du.to(dtype), mask=inside)
        at = at2
    tl.store(y_ptr + at, y.to(dtype), mask=inside)
