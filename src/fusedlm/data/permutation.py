"""A permutation of the numbers below n that is computed and not stored: a shuffled epoch of any size costs no memory.

A balanced Feistel network (Luby and Rackoff 1988) permutes the numbers of 2k bits; one that comes out at n or above is
put in again until it is below (cycle walking; Black and Rogaway 2002). 2k is the least with n <= 4^k, so a number is
put in 4 times on average at most. The round function is splitmix64's finalizer (Steele et al. 2014); keys come from
Philox (Salmon et al. 2011), whose raw numbers numpy keeps the same for good, other than those of its Generator.
"""

from typing import Any

import numpy as np

Integers = np.ndarray[Any, np.dtype[np.int64]]

_ROUNDS = 6
_M1, _M2, _M3 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(0x9E3779B97F4A7C15)


def raw_numbers(seed: int, counter: int, stream: int, n: int) -> list[int]:
    """n numbers below 2^64 that depend on seed, counter and stream alone, all of them 0 to 2^64 - 1."""
    bits = np.random.Philox(key=np.array([seed, counter], np.uint64), counter=np.array([0, 0, 0, stream], np.uint64))
    return [int(number) for number in bits.random_raw(n)]


def permuted(index: Integers, n: int, seed: int, epoch: int) -> Integers:
    """Where an epoch's permutation of 0 to n - 1 sends each index. index: int64, of any shape. Returns int64."""
    half = np.uint64(max(1, (max(n - 1, 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = [np.uint64(key) for key in raw_numbers(seed, epoch, 1, _ROUNDS)]
    x = index.astype(np.uint64)
    outside = np.ones(x.shape, np.bool_)
    with np.errstate(over="ignore"):  # products are meant to wrap
        while outside.any():
            left, right = x[outside] >> half, x[outside] & low
            for key in keys:
                left, right = right, left ^ (_mixed(right ^ key) & low)
            x[outside] = left << half | right
            outside = x >= np.uint64(n)
    return x.astype(np.int64)


def _mixed(x: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    x = (x + _M3) * _M1
    x = (x ^ (x >> np.uint64(30))) * _M1
    x = (x ^ (x >> np.uint64(27))) * _M2
    return x ^ (x >> np.uint64(31))
