"""Queries, keys and values side by side in memory, as one projection makes them and takes their gradients.

Slices of one tensor cost nothing; their gradients, three tensors, would have to be put side by side again, which costs
a copy of all of them. The backward pass of attention writes them so in the first place.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def heads_side_by_side(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for q, k and v, (B, heads, T, D) each: slices of one, (B, T, H + 2G, D) in memory."""
    B, H, T, D = q.shape
    G = k.shape[1]
    whole = q.new_empty((B, T, H + 2 * G, D)).transpose(1, 2)
    a, b, c = whole.split((H, G, G), dim=1)
    return a, b, c


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    """(B, N, T, D) of parts along N: without a copy where they lie so in memory, tokens outermost."""
    first = parts[0]
    B, _, T, D = first.shape
    N = sum(t.shape[1] for t in parts)
    at = first.storage_offset()
    strides = (T * N * D, D, N * D, 1)
    for t in parts:
        same = t.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and t.dtype == first.dtype
        if not same or t.storage_offset() != at or t.stride() != strides:
            return torch.cat([t.transpose(1, 2) for t in parts], dim=2).transpose(1, 2)
        at += t.shape[1] * D
    return first.as_strided((B, N, T, D), strides)


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *heads: int) -> tuple[Tensor, ...]:
        return x.split(heads, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _joined(gradients), *([None] * len(gradients))


def split_heads(x: Tensor, heads: tuple[int, ...]) -> tuple[Tensor, ...]:
    """x, (B, N, T, D), in parts along N, views of it: queries, keys and values. heads: of each part; they add up to N.

    As torch's split; but gradients that lie side by side in memory, as `attention` gives them, are one already.
    Raises ValueError for other shapes.
    """
    if x.ndim != 4 or sum(heads) != x.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)} and parts have {heads} heads; expected (B, sum of heads, T, D)")
    if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
        return _SplitHeads.apply(x, *heads)
    return x.split(heads, dim=1)
