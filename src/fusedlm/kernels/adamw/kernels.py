"""The kernels of `adamw` and `global_norm`. They reach tensors through tables on the device: see workspace.py.

A tensor is cut into chunks of BLOCK_N elements, a program each. ALIGNED: addresses and sizes of the tensors are
multiples of 16; without being told, the compiler makes every access 4 bytes wide.
"""

import functools

import torch

from fusedlm.kernels._backend import interpreting
from fusedlm.kernels._triton import tl, triton

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
MASTERS = {torch.float32: "fp32", torch.int16: "int16"}


@triton.jit
def _at(address, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer to element `start` of the tensor at an address; start is a multiple of a block."""
    if DTYPE == "fp32":
        pointer = address.to(tl.pointer_type(tl.float32)) + start
    elif DTYPE == "bf16":
        pointer = address.to(tl.pointer_type(tl.bfloat16)) + start
    elif DTYPE == "int16":
        pointer = address.to(tl.pointer_type(tl.int16)) + start
    else:
        pointer = address.to(tl.pointer_type(tl.float16)) + start
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def squares_kernel(
    addresses_ptr,
    chunks_ptr,
    partial_ptr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # The sum of squares of one chunk.
    chunk_ptr = chunks_ptr + tl.program_id(0) * 4
    i = tl.load(chunk_ptr)
    start = tl.load(chunk_ptr + 1).to(tl.int64) * BLOCK_N
    left = tl.load(chunk_ptr + 2)
    if ALIGNED:
        left = tl.multiple_of(left, 16)  # or else the mask would keep the compiler from wide loads
    at = tl.arange(0, BLOCK_N)
    g_ptr = _at(tl.load(addresses_ptr + i), start, GRAD, ALIGNED)
    g = tl.load(g_ptr + at, mask=at < left, other=0.0).to(tl.float32)
    tl.store(partial_ptr + tl.load(chunk_ptr + 3), tl.sum(g * g, 0))


@triton.jit
def sum_kernel(partial_ptr, bounds_ptr, out_ptr, SQRT: tl.constexpr, BLOCK_P: tl.constexpr):
    # Program j adds up the partial sums from bounds[j] to bounds[j + 1], always in the same order.
    pid = tl.program_id(0)
    start, end = tl.load(bounds_ptr + pid), tl.load(bounds_ptr + pid + 1)
    total = tl.zeros((BLOCK_P,), tl.float32)
    for block in range(start, end, BLOCK_P):
        at = block + tl.arange(0, BLOCK_P)
        total += tl.load(partial_ptr + at, mask=at < end, other=0.0)
    result = tl.sum(total, 0)
    if SQRT:
        result = tl.sqrt(result)
    tl.store(out_ptr + pid, result)


@triton.jit
def _double(pointer, mask):
    return tl.load(pointer, mask=mask, other=0).to(tl.float64, bitcast=True)  # the table is one of int64


@triton.jit
def prepare_kernel(
    table_ptr, addresses_ptr, hyper_ptr, norm_ptr, skipped_ptr, out_ptr, T, max_norm, BLOCK_T: tl.constexpr
):
    # One program: from steps, hyperparameters and norm to the seven numbers that the update of each tensor needs.
    clip = 1.0
    run = 1
    if norm_ptr is not None:
        norm = tl.load(norm_ptr)
        clip = max_norm / (norm + 1e-6)
        clip = tl.where(clip > 1.0, 1.0, clip)  # stays NaN where the norm is, as in torch
        if skipped_ptr is not None:
            run = (tl.abs(norm) < float("inf")).to(tl.int32)
            tl.store(skipped_ptr, tl.load(skipped_ptr) + 1 - run)
    for start in range(0, T, BLOCK_T):
        i = start + tl.arange(0, BLOCK_T)
        mask = i < T
        step_ptr = tl.load(table_ptr + i * 8 + 4, mask=mask, other=0).to(tl.pointer_type(tl.float32))
        t = tl.load(step_ptr, mask=mask, other=0.0).to(tl.float64) + 1.0
        group = tl.load(table_ptr + i * 8 + 5, mask=mask, other=0)
        h_ptr = hyper_ptr + group * 8
        lr_address = tl.load(addresses_ptr + T + group, mask=mask, other=0)  # 0 where lr is a number of the host's
        lr_ptr = lr_address.to(tl.pointer_type(tl.float32))
        lr = tl.load(lr_ptr, mask=lr_address != 0, other=0.0).to(tl.float64) + _double(h_ptr, mask)
        correction1 = 1.0 - tl.exp(t * _double(h_ptr + 1, mask))
        root2 = tl.sqrt(1.0 - tl.exp(t * _double(h_ptr + 2, mask)))
        eps = _double(h_ptr + 5, mask)
        decay = 1.0 - lr * _double(h_ptr + 6, mask)
        sign = _double(h_ptr + 7, mask).to(tl.float32)
        out = out_ptr + i * 8
        tl.store(out, clip * sign, mask=mask)
        tl.store(out + 1, decay.to(tl.float32), mask=mask)
        tl.store(out + 2, _double(h_ptr + 3, mask).to(tl.float32), mask=mask)
        tl.store(out + 3, _double(h_ptr + 4, mask).to(tl.float32), mask=mask)
        # lr / correction1 * m / (sqrt(v) / root2 + eps), with one root and one division an element
        tl.store(out + 4, (lr * root2 / correction1).to(tl.float32), mask=mask)
        tl.store(out + 5, (eps * root2).to(tl.float32), mask=mask)
        tl.store(out + 6, 1.0 * run, mask=mask)
    tl.debug_barrier()  # every step is read before any is advanced, for tensors may share one
    for start in range(0, T, BLOCK_T):
        i = start + tl.arange(0, BLOCK_T)
        step_ptr = tl.load(table_ptr + i * 8 + 4, mask=i < T, other=0).to(tl.pointer_type(tl.float32))
        first = tl.load(table_ptr + i * 8 + 6, mask=i < T, other=0) != 0  # of those that share it
        tl.store(step_ptr, tl.load(step_ptr, mask=first, other=0.0) + run, mask=first)


@triton.jit
def _join(p, low):
    # `join_master`, of the bits of a bf16 parameter.
    high = p.to(tl.int32) << 16
    bits = tl.where(((high & 0x7FFFFFFF) == 0) & (low < 0), high, high + low)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _split(w):
    # `split_master`, the parameter as its bits.
    bits = w.to(tl.int32, bitcast=True)
    high = (bits + 0x8000) >> 16
    low = bits - (high << 16)
    return tl.where(w == w, high, 0x7FC0).to(tl.int16), tl.where(w == w, low, 0).to(tl.int16)


@triton.jit
def update_kernel(
    table_ptr,
    addresses_ptr,
    chunks_ptr,
    coefficients_ptr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    MASTER: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    chunk_ptr = chunks_ptr + tl.program_id(0) * 4
    i = tl.load(chunk_ptr)
    start = tl.load(chunk_ptr + 1).to(tl.int64) * BLOCK_N
    left = tl.load(chunk_ptr + 2)
    c_ptr = coefficients_ptr + i * 8
    left = tl.where(tl.load(c_ptr + 6) != 0.0, left, 0)  # a skipped step
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    at = tl.arange(0, BLOCK_N)
    mask = at < left
    # Beside an int16 master the parameter, of bf16, is read and written as bits.
    p_ptr = _at(tl.load(table_ptr + i * 8), start, "int16" if MASTER == "int16" else PARAM, ALIGNED) + at
    m_ptr = _at(tl.load(table_ptr + i * 8 + 1), start, EXP_AVG, ALIGNED) + at
    v_ptr = _at(tl.load(table_ptr + i * 8 + 2), start, EXP_AVG_SQ, ALIGNED) + at
    g_ptr = _at(tl.load(addresses_ptr + i), start, GRAD, ALIGNED) + at
    w_ptr = _at(tl.load(table_ptr + i * 8 + 3), start, MASTER, ALIGNED) + at if MASTER != "none" else p_ptr
    g = tl.load(g_ptr, mask=mask, other=0.0).to(tl.float32) * tl.load(c_ptr)
    if MASTER == "int16":
        w = _join(tl.load(p_ptr, mask=mask, other=0), tl.load(w_ptr, mask=mask, other=0))
    else:
        w = tl.load(w_ptr, mask=mask, other=0.0).to(tl.float32)
    w *= tl.load(c_ptr + 1)
    m = tl.load(m_ptr, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr, mask=mask, other=0.0).to(tl.float32)
    m += tl.load(c_ptr + 2) * (g - m)
    v += tl.load(c_ptr + 3) * (g * g - v)
    w -= tl.load(c_ptr + 4) * m / (tl.sqrt(v) + tl.load(c_ptr + 5))
    tl.store(m_ptr, m.to(m_ptr.dtype.element_ty), mask=mask)
    tl.store(v_ptr, v.to(v_ptr.dtype.element_ty), mask=mask)
    if MASTER == "int16":
        p, low = _split(w)
        tl.store(p_ptr, p, mask=mask)
        tl.store(w_ptr, low, mask=mask)
    else:
        tl.store(p_ptr, w.to(p_ptr.dtype.element_ty), mask=mask)
        if MASTER == "fp32":
            tl.store(w_ptr, w, mask=mask)


@functools.cache
def config(name: str) -> dict[str, int]:
    """Constants of a kernel: 8 elements a thread where every one is read and written, 64 where it is only read.

    Blocks are small under the interpreter, so that small tests have several.
    """
    block, size, small, warps = {
        "squares": ("BLOCK_N", 16384, 128, 8),
        "sum": ("BLOCK_P", 4096, 4, 8),
        "prepare": ("BLOCK_T", 128, 2, 4),
        "update": ("BLOCK_N", 1024, 128, 4),
    }[name]
    return {block: small if interpreting() else size, "num_warps": warps}
