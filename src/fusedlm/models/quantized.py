"""Weights of 8 bits: groups of 64 elements along a row share a scale."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 64  # elements of a row that share a scale
_ROWS = 2**18  # elements widened at once: they stay in the cache


class Int8Weight(Tensor):
    """A matrix (N, K) that is stored as int8 and computed with as float32, or whatever dtype it says it has.

    integers: (N, K padded with zeros to a multiple of 64) int8. scales: (N, groups) bfloat16; element (n, k) is
    integers[n, k] * scales[n, k // 64]. A tensor subclass, so that models need not know: `F.linear` and `F.embedding`
    take it in place of a matrix; anything that would need its elements is refused.
    """

    integers: Tensor
    scales: Tensor

    @staticmethod
    def __new__(
        cls, integers: Tensor, scales: Tensor, columns: int, dtype: torch.dtype = torch.float32
    ) -> "Int8Weight":
        made: Int8Weight = Tensor._make_wrapper_subclass(
            cls, (integers.shape[0], columns), dtype=dtype, device=integers.device
        )
        made.integers, made.scales = integers, scales
        return made

    @classmethod
    def quantize(cls, weight: Tensor) -> "Int8Weight":
        """Round a matrix, (N, K) of any float dtype, to 8 bits: the highest of each group becomes 127.

        A scale is rounded up to bfloat16 before it is used, so its rounding costs next to nothing and no value exceeds
        127.
        """
        N, K = weight.shape
        groups = -(-K // GROUP)
        integers = torch.zeros(N, groups * GROUP, dtype=torch.int8, device=weight.device)
        scales = torch.empty(N, groups, dtype=torch.bfloat16, device=weight.device)
        with _one_thread():
            for rows in _blocks(N, K):
                padded = F.pad(weight[rows].float(), (0, groups * GROUP - K)).view(-1, groups, GROUP)
                scale = padded.abs().amax(-1) / 127  # (n, groups)
                scale = ((scale.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
                scaled = padded / torch.where(scale == 0, 1.0, scale).unsqueeze(-1)
                integers[rows] = scaled.round_().view(-1, groups * GROUP).to(torch.int8)
                scales[rows] = scale.to(torch.bfloat16)
        return cls(integers, scales, K, weight.dtype)

    def widen(self, rows: Any = slice(None), dtype: torch.dtype | None = None) -> Tensor:
        """Rows of the matrix, as numbers: (n, K)."""
        integers, scales = self.integers[rows], self.scales[rows]
        wide = integers.to(dtype or self.dtype).view(*scales.shape, GROUP)
        return wide.mul_(scales.unsqueeze(-1)).view(*integers.shape)[..., : self.shape[1]]

    def element_size(self) -> int:
        """Bytes of an element, its share of the scales aside."""
        return 1

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes it takes: 1.03 an element."""
        return self.integers.nbytes + self.scales.nbytes

    @classmethod
    def __torch_function__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            return _linear(*args, **(kwargs or {}))
        if function is F.embedding:
            ids, weight = args[:2]
            return weight.widen(ids)
        if function is Tensor.detach:  # here already: torch's dispatch of subclasses imports half a second of modules
            (weight,) = args
            return cls(weight.integers, weight.scales, weight.shape[1], weight.dtype)
        return super().__torch_function__(function, kinds, args, kwargs or {})  # type: ignore[no-untyped-call]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if function is torch.ops.aten.detach.default:
            (weight,) = args
            return cls(weight.integers, weight.scales, weight.shape[1], weight.dtype)
        raise NotImplementedError(f"{function} does not take weights of 8 bits; expected to load without quantize")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Int8Weight({tuple(self.shape)}, groups of {GROUP})"


@contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of short operations: where cores are busy with other work, two threads would wait for each other at the
    end of each, and take thirty times as long as one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias. The whole matrix is widened at once: every operation has to wait for all threads."""
    return F.linear(x, weight.widen(dtype=x.dtype), bias)


def _blocks(N: int, K: int) -> list[slice]:
    n = max(1, _ROWS // K)
    return [slice(i, i + n) for i in range(0, N, n)]
