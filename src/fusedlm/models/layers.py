"""The layers both architectures are built of. They know no cache: attention asks whoever holds one through `Cache`."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fusedlm.kernels import LayerNorm, RMSNorm, attention, linear, rope, split_heads
from fusedlm.models.config import ModelConfig


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

    def without_bias(self, x: Tensor) -> Tensor:
        """For an activation that adds it."""
        return linear(x, self.weight)


@dataclass(frozen=True)
class DropoutState:
    """The dropout of one forward pass. Every place in the model has a stream of its own of the one seed."""

    p: float = 0.0
    seed: Tensor | None = None  # (1,) int64, on the model's device


def add_norm(
    norm: LayerNorm | RMSNorm, x: Tensor, residual: Tensor | None, dropout: DropoutState, stream: int
) -> tuple[Tensor, Tensor]:
    """(norm(s), s), s = dropout(x) + residual, in one pass; s = x where there is no residual yet. All are (B, T, C)."""
    if residual is None:
        return norm(x, give_sum=True)
    return norm(x, residual, dropout.p, seed=dropout.seed, stream=stream)


class Attention(nn.Module):
    """Causal self-attention with one fused projection for queries, keys and values."""

    def __init__(self, config: ModelConfig, layer: int, *, bias: bool) -> None:
        super().__init__()
        self.layer = layer
        self.heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
        self.head_dim = config.head_dim
        self.qkv = Linear(config.width, config.qkv_width, bias=bias)
        self.out = Linear(config.n_heads * config.head_dim, config.width, bias=bias)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: Cache | None, dropout_p: float = 0.0
    ) -> Tensor:
        """x: (B, T, C). dropout_p: of the attention weights, without a cache. Returns (B, T, C)."""
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, sum(self.heads), self.head_dim).transpose(1, 2)  # (B, H+2G, T, D)
        if rotary is not None:
            qkv = rope(qkv, *rotary, heads=self.heads[0] + self.heads[1])
        q, k, v = split_heads(qkv, self.heads)
        # (B, H, T, D)
        y = attention(q, k, v, dropout_p=dropout_p) if cache is None else cache.attend(self.layer, q, k, v)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class Block(nn.Module):
    """A pre-norm block of the parts that an architecture gives it: attention and an MLP, each behind a norm."""

    def __init__(
        self, norm1: LayerNorm | RMSNorm, attention: Attention, norm2: LayerNorm | RMSNorm, mlp: nn.Module
    ) -> None:
        super().__init__()
        self.norm1 = norm1
        self.attention = attention
        self.norm2 = norm2
        self.mlp = mlp

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
        cache: Cache | None,
        dropout: DropoutState,
    ) -> tuple[Tensor, Tensor]:
        """What the block before it gave and the residual stream before that; so the sum and the norm are one pass."""
        layer = self.attention.layer
        x, residual = add_norm(self.norm1, x, residual, dropout, 2 * layer)
        x = self.attention(x, rotary, cache, dropout.p)
        x, residual = add_norm(self.norm2, x, residual, dropout, 2 * layer + 1)
        return self.mlp(x), residual
