"""Tokens in the order of their ids, those of one id in their own.

Few tokens are ranked by kernels of ours: an id's place is the number of those that come before it. Many go to torch's
radix sort, which takes a dozen launches and leaves most of a GPU idle: other work runs beside it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fusedlm.kernels._backend import interpreting
from fusedlm.kernels._launch import launch
from fusedlm.kernels._triton import tl, triton

FEW = 64 if interpreting() else 16384  # tokens that are ranked; see `few`


class Order(NamedTuple):
    """Tokens by their ids."""

    ids: Tensor  # (M,) uint8, int16 or int32, less the bias; those out of range as -1, which may wrap, and V
    tokens: Tensor  # (M,) int32 or int64: which token each is of
    bias: int


@triton.jit
def _packed(ids_ptr, at, first, M, V, TILE: tl.constexpr):
    """Tokens' ids, plus 1 and those out of range as 0 and V + 1, with their places in a tile: each a number of its own,
    and in the order wanted. After the last token, more than any."""
    v = tl.load(ids_ptr + at, mask=at < M, other=0)
    key = (tl.minimum(tl.maximum(v, -1), V) + 1).to(tl.int32) * TILE + (at - first).to(tl.int32)
    return tl.where(at < M, key, 0x7FFFFFFF)


@triton.jit
def _tile_kernel(
    ids_ptr,
    keys_ptr,  # (M,): those of a tile in order; or None where there is one tile, and what follows
    ordered_ptr,
    order_ptr,
    M,
    V,
    TILE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    # Every token beside every other one of its tile.
    start = tl.cast(tl.program_id(0), tl.int64) * BLOCK_I
    first = start // TILE * TILE
    at = start + tl.arange(0, BLOCK_I)
    key = _packed(ids_ptr, at, first, M, V, TILE)
    before = tl.zeros((BLOCK_I, BLOCK_J), tl.int32)
    for j in range(first, tl.minimum(first + TILE, M), BLOCK_J):
        others = _packed(ids_ptr, j + tl.arange(0, BLOCK_J), first, M, V, TILE)
        # 1 where the difference is negative: two instructions, where a comparison takes three.
        before += ((others[None, :] - key[:, None]).to(tl.uint32) >> 31).to(tl.int32)
    place = first + tl.sum(before, 1)
    if keys_ptr is not None:
        tl.store(keys_ptr + place, key, mask=at < M)
    else:
        tl.store(ordered_ptr + place, key // TILE - 1, mask=at < M)
        tl.store(order_ptr + place, at.to(tl.int32), mask=at < M)


@triton.jit
def _merge_kernel(
    keys_ptr,
    ordered_ptr,
    order_ptr,
    M,
    TILE: tl.constexpr,
    STEPS: tl.constexpr,  # of which TILE is a power of 2
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A token's place among all is the sum of its places in all tiles, which are sorted: by bisection, all at once.
    start = tl.cast(tl.program_id(0), tl.int64) * BLOCK
    own = start // TILE
    at = start + tl.arange(0, BLOCK)
    key = tl.load(keys_ptr + at, mask=at < M, other=0)
    tile = tl.arange(0, TILES)[:, None]
    # Of equal ids, those of earlier tiles come before, those of later ones after.
    bound = tl.where(tile == own, key[None, :], ((key // TILE)[None, :] + (tile < own).to(tl.int32)) * TILE)
    less = tl.zeros((TILES, BLOCK), tl.int32)
    for i in tl.static_range(STEPS):
        half = TILE >> (i + 1)
        probe = tile * TILE + less + (half - 1)
        found = tl.load(keys_ptr + probe, mask=probe < M, other=0x7FFFFFFF)
        less += tl.where(found < bound, half, 0)
    probe = tile * TILE + less
    less += (tl.load(keys_ptr + probe, mask=probe < M, other=0x7FFFFFFF) < bound).to(tl.int32)
    place = tl.sum(less, 0)
    tl.store(ordered_ptr + place, key // TILE - 1, mask=at < M)
    tl.store(order_ptr + place, (own * TILE + key % TILE).to(tl.int32), mask=at < M)


def _tile(M: int) -> int:
    """Tokens of a tile: all of them, where that takes less than a second kernel."""
    if interpreting():
        return 16
    return 4096 if M <= 4096 else 1024


def few(M: int, V: int) -> bool:
    """Whether M tokens of V rows are ranked: few enough, and the end of the last row's keys is a number of 32 bits."""
    return M <= FEW and (V + 2) * _tile(M) < 2**31


def _ranked(ids: Tensor, V: int) -> Order:
    """The order of ids of which there are few."""
    M = ids.numel()
    tile = _tile(M)
    tiles = triton.next_power_of_2(triton.cdiv(M, tile))
    # Of their own, for both begin aligned then, or launches would take Triton's slow way.
    ordered, tokens = (torch.empty(M, dtype=torch.int32, device=ids.device) for _ in range(2))
    keys = None if tiles == 1 else torch.empty(M, dtype=torch.int32, device=ids.device)
    block_i, block_j, block = (4, 8, 4) if interpreting() else (8, 1024, 32)
    constants = {"TILE": tile, "BLOCK_I": block_i, "BLOCK_J": block_j, "num_warps": 4}
    grid = (triton.cdiv(M, block_i), 1, 1)
    launch(_tile_kernel, grid, (ids.dtype, keys is None), (ids, keys, ordered, tokens), (M, V), constants)
    if keys is not None:
        constants = {"TILE": tile, "STEPS": tile.bit_length() - 1, "TILES": tiles, "BLOCK": block, "num_warps": 4}
        grid = (triton.cdiv(M, block), 1, 1)
        launch(_merge_kernel, grid, (), (keys, ordered, tokens), (M,), constants)
    return Order(ordered, tokens, 0)


def key_type(V: int) -> tuple[torch.dtype, int]:
    """In as few bytes as tell V rows and two more from each other, and the bias: a radix sort goes over keys byte by
    byte."""
    if V < 2**8 - 1:
        return torch.uint8, 0
    return (torch.int16, 0) if V < 2**15 - 1 else (torch.int16, 2**15 - 1) if V < 2**16 - 1 else (torch.int32, 0)


def narrow_keys(ids: Tensor, V: int) -> Tensor:
    """ids in one dimension; those out of range as -1 and V."""
    dtype, bias = key_type(V)
    kept = ids.reshape(-1).clamp(-1, V)
    return (kept - bias if bias else kept).to(dtype)


def in_order(ids: Tensor, V: int) -> Order:
    """Tokens by their ids, which lie contiguously and are those of a table of V rows, or out of range."""
    if few(ids.numel(), V):
        return _ranked(ids, V)
    return Order(*narrow_keys(ids, V).sort(stable=True), key_type(V)[1])
