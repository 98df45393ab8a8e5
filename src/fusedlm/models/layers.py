"""The layers both architectures are built of. They know no cache: attention asks whoever holds one through `Cache`."""

from typing import Protocol

import torch
from torch import Tensor, nn

from fusedlm.kernels import attention, embedding, layer_norm, linear, rms_norm, rope, rotary_frequencies, rotary_tables
from fusedlm.models.config import LlamaConfig, ModelConfig


class Cache(Protocol):
    """Where keys and values of earlier tokens live. The model only ever asks these two things of it."""

    def positions(self, T: int) -> Tensor:
        """Positions of the next T tokens: (T,) or (B, T) int64."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v, (B, G, T, D), as those of the next T tokens; attend q, (B, H, T, D), over all so far."""
        ...


class Linear(nn.Module):
    """y = x @ weight^T + bias. weight: (N, K), bias: (N,)."""

    def __init__(self, K: int, N: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(N, K))
        self.bias = nn.Parameter(torch.empty(N)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """A table of V rows. The model adds learned positions in the same pass."""

    def __init__(self, V: int, C: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(V, C))

    def forward(self, ids: Tensor, position_weight: Tensor | None = None, positions: Tensor | int = 0) -> Tensor:
        return embedding(ids, self.weight, position_weight, positions)


class LayerNorm(nn.Module):
    def __init__(self, C: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(C))
        self.bias = nn.Parameter(torch.empty(C))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    def __init__(self, C: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(C))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Rotary(nn.Module):
    """Tables of cosines and sines for given positions. Has no parameters; angles are computed in float64."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.frequencies = self._frequencies("cpu")  # a model on "meta" has real ones, too

    def _frequencies(self, device: torch.device | str) -> Tensor:
        c = self.config
        return rotary_frequencies(c.head_dim, c.rope_theta, c.rope_scaling, device)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions: (T,) or (B, T). Returns cos and sin, each (T, D/2) or (B, 1, T, D/2), in dtype."""
        if self.frequencies.device != positions.device:
            self.frequencies = self._frequencies(positions.device)
        return rotary_tables(positions, self.frequencies, dtype)


class Attention(nn.Module):
    """Causal self-attention with one fused projection for queries, keys and values."""

    def __init__(self, config: ModelConfig, layer: int, *, bias: bool) -> None:
        super().__init__()
        self.layer = layer
        self.heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
        self.head_dim = config.head_dim
        self.qkv = Linear(config.width, config.qkv_width, bias=bias)
        self.out = Linear(config.n_heads * config.head_dim, config.width, bias=bias)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: Cache | None) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, sum(self.heads), self.head_dim).transpose(1, 2)  # (B, H+2G, T, D)
        q, k, v = qkv.split(self.heads, dim=1)
        if rotary is not None:
            q, k = rope(q, *rotary), rope(k, *rotary)
        y = attention(q, k, v) if cache is None else cache.attend(self.layer, q, k, v)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))
