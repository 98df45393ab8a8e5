"""The key/value cache: allocated once, filled token by token."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedlm.kernels import attention
from fusedlm.models import ModelConfig


class KVCache:
    """Keys and values of B sequences of at most `capacity` tokens each. A `models.Cache`.

    Memory is (2, L, B, G, capacity, D) elements, left uninitialised: the system commits it as it is written. The first
    `lengths[b]` tokens of sequence b are valid. A step writes its T tokens behind them; `advance` then says how many of
    those count, so that sequences of different lengths can share a padded step.
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, capacity: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.n_layers, batch_size, config.n_kv_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.capacity = capacity
        self.lengths = [0] * batch_size
        self._written = 0  # columns in which every sequence has something finite

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def uniform(self) -> bool:
        """Whether all sequences are of one length, so that plain slices do."""
        return min(self.lengths) == max(self.lengths)

    def _starts(self) -> Tensor:
        return torch.tensor(self.lengths, device=self.keys.device)  # (B,)

    def positions(self, T: int) -> Tensor:
        steps = torch.arange(T, device=self.keys.device)
        return self.lengths[0] + steps if self.uniform else self._starts().unsqueeze(1) + steps

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T = k.shape[2]
        keys, values = self.keys[layer], self.values[layer]  # (B, G, S, D)
        end = max(self.lengths) + T
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit a cache of {self.capacity}")
        if self.uniform:
            start = self.lengths[0]
            keys[:, :, start:end] = k
            values[:, :, start:end] = v
            return attention(q, keys[:, :, :end], values[:, :, :end], offset=start)
        # Columns behind a shorter sequence's end are masked, but uninitialised memory may hold NaN, and 0 * NaN is NaN.
        keys[:, :, self._written : end] = 0
        values[:, :, self._written : end] = 0
        starts = self._starts()
        columns = (starts.unsqueeze(1) + torch.arange(T, device=keys.device)).view(self.batch_size, 1, T, 1)
        index = columns.expand(k.shape)
        keys.scatter_(2, index, k)
        values.scatter_(2, index, v)
        return attention(q, keys[:, :, :end], values[:, :, :end], offset=starts)

    def advance(self, counts: Sequence[int], written: int) -> None:
        """After a step of `written` tokens a sequence, of which the first counts[b] of sequence b are real."""
        self._written = max(self.lengths) + written
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens of every sequence."""
        self.lengths = [min(n, length) for n in self.lengths]
