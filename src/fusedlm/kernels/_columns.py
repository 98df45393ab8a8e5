"""Sums over the rows of a tall matrix, as the gradient of a bias is: in a fixed order, in fp32, reading it once."""

import functools
from typing import Any

import torch
from torch import Tensor

from fusedlm.kernels._backend import interpreting
from fusedlm.kernels._launch import launch, num_programs, rows
from fusedlm.kernels._operator import operator
from fusedlm.kernels._triton import tl, triton


@functools.cache
def column_config(
    M: int, N: int, device: torch.device, tile: int = 2048, programs: int = 8
) -> tuple[dict[str, Any], int, int, int]:
    """(constants, blocks of columns, parts that rows are cut into, rows of a part) of kernels that go down columns.

    tile: how many elements a program has on their way at once. programs: of a multiprocessor.
    """
    block_n = min(triton.next_power_of_2(N), 16 if interpreting() else 256)
    block_m = 4 if interpreting() else tile // block_n
    blocks = triton.cdiv(N, block_n)
    parts = max(num_programs(device, programs) // blocks, 1)
    rows = triton.cdiv(triton.cdiv(M, parts), block_m) * block_m
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4}, blocks, triton.cdiv(M, rows), rows


@triton.jit
def _column_sums_kernel(x_ptr, sums_ptr, x_stride, M, N, rows, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    blocks = tl.cdiv(N, BLOCK_N)
    part = tl.program_id(0) // blocks
    cols = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(part * rows, tl.minimum((part + 1) * rows, M), BLOCK_M):
        lines = start + tl.arange(0, BLOCK_M)
        at = lines[:, None].to(tl.int64) * x_stride + cols[None, :]
        total += tl.load(x_ptr + at, mask=(lines < M)[:, None] & (cols < N)[None, :], other=0.0).to(tl.float32)
    tl.store(sums_ptr + tl.cast(part, tl.int64) * N + cols, tl.sum(total, 0), mask=cols < N)


@triton.jit(do_not_specialize=["P"])
def _sum_rows_kernel(p_ptr, out_ptr, P, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    # Program (i, j) adds up BLOCK_N columns of the j-th (P, N) table.
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < N
    p_ptr += tl.cast(tl.program_id(1), tl.int64) * P * N
    out_ptr += tl.program_id(1) * N
    total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, P, BLOCK_P):
        lines = start + tl.arange(0, BLOCK_P)
        at = lines[:, None].to(tl.int64) * N + cols[None, :]
        total += tl.load(p_ptr + at, mask=(lines < P)[:, None] & mask[None, :], other=0.0)
    tl.store(out_ptr + cols, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=mask)


# 64 rows of 64 bytes, so that there are many programs. For every P the same, which changes with the number of tokens:
# another shape compiles nothing.
_SUM_TILE = {"BLOCK_P": 64, "BLOCK_N": 16, "num_warps": 4}


def sum_partials(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, N) in dtype: the sums over P of (n, P, N) fp32, in a fixed order."""
    n, P, N = partial.shape
    sums = torch.empty((n, N), dtype=dtype, device=partial.device)
    config = {"N": N, **_SUM_TILE}
    launch(_sum_rows_kernel, (triton.cdiv(N, config["BLOCK_N"]), n, 1), dtype, (partial, sums), (P,), config)
    return sums


@operator(fake=lambda x: x.new_empty(x.shape[1]))
def _column_sums(x: Tensor) -> Tensor:
    """(N,) of x, (M, N) with unit stride along N; in x's dtype."""
    M, N = x.shape
    if not M or not N:
        return x.new_zeros(N)
    constants, blocks, parts, rows = column_config(M, N, x.device, 8192, 4)
    partial = torch.empty((1, parts, N), dtype=torch.float32, device=x.device)
    launch(_column_sums_kernel, (blocks * parts, 1, 1), x.dtype, (x, partial), (x.stride(0), M, N, rows), constants)
    return sum_partials(partial, x.dtype)[0]


def remember_sums(x: Tensor, sums: Tensor) -> None:
    """Keep with x, (..., N), what `column_sums` would compute of it: whoever made x had it at hand."""
    x._fusedlm_column_sums = x._version, sums  # type: ignore[attr-defined]


def column_sums(x: Tensor) -> Tensor:
    """(N,) of x, (..., N) with unit stride along N, on a GPU; in x's dtype.

    Those that were kept with this very tensor, if it has not been written to since, are not computed again. Autograd
    hands a gradient on as the same tensor where it has one consumer and one source, and another where it is a sum.
    """
    version, sums = getattr(x, "_fusedlm_column_sums", (None, None))
    if sums is not None and version == x._version:
        return sums
    return _column_sums(rows(x))
