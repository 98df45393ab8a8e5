"""GELU of a vector, three ways: what the compiled step does, and two that it does not. For `fusedlm bench --ablate`.

x, y: addresses of n float32, n a multiple of 16.
"""

import math

import numpy as np
from numba import njit

from fusedlm.inference.compiled.step import _gelu
from fusedlm.inference.compiled.vector import LANES, half_bits, load_f32, one_f16, one_f32, put_f32, store_f32


@njit(nogil=True, error_model="numpy")
def gelu_by_vectors(x, y, n):
    """Sixteen at a time, by their exponentials."""
    for i in range(n // LANES):
        store_f32(y + 64 * i, _gelu(load_f32(x + 64 * i)))


@njit(nogil=True, error_model="numpy")
def gelu_by_tanh(x, y, n):
    """One at a time, by the C library's tanh."""
    for i in range(n):
        v = one_f32(x + 4 * i)
        u = np.float32(0.7978845608028654) * (v + np.float32(0.044715) * v * v * v)
        put_f32(y + 4 * i, np.float32(0.5) * v * (np.float32(1) + math.tanh(u)))


@njit(nogil=True, error_model="numpy")
def gelu_by_table(x, y, table, n):
    """One at a time, from 65,536 float16, found by the bits of x as float16. table: its address."""
    for i in range(n):
        put_f32(y + 4 * i, one_f16(table + 2 * half_bits(one_f32(x + 4 * i))))
