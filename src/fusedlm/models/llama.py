"""Llama (Touvron et al. 2023; Dubey et al. 2024): pre-norm blocks, rotary positions, RMSNorm, SwiGLU, no biases."""

from typing import Any

import torch
from torch import Tensor, nn

from fusedlm.kernels import RMSNorm, RotaryEmbedding, SwiGLU, TiedGradient, mlp
from fusedlm.models.config import LlamaConfig
from fusedlm.models.decoder import DecoderModel, check_length
from fusedlm.models.layers import Attention, Block, Cache, Linear, add_norm


class GatedMLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.recompute: bool | None = None  # see `mlp`
        self.gate_up: nn.Module = Linear(config.width, 2 * config.mlp_width, bias=False)
        self.activation = SwiGLU()
        self.down: nn.Module = Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.gate_up, Linear) and isinstance(self.down, Linear):
            return mlp(x, self.gate_up.weight, None, self.down.weight, activation="swiglu", recompute=self.recompute)
        return self.down(self.activation(self.gate_up(x)))  # (B, T, 2F) to (B, T, F)


def block(config: LlamaConfig, layer: int) -> Block:
    return Block(
        RMSNorm(config.width, config.norm_eps),
        Attention(config, layer, bias=False),
        RMSNorm(config.width, config.norm_eps),
        GatedMLP(config),
    )


class Llama(DecoderModel):
    """Llama of any size, and the models that share its architecture (SmolLM2)."""

    def __init__(self, config: LlamaConfig, dropout: float = 0.0) -> None:
        super().__init__(config, dropout)
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta, config.rope_scaling)
        self.blocks = nn.ModuleList(block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)

    def hidden_states(self, ids: Tensor, cache: Cache | None = None, tied: TiedGradient | None = None) -> Tensor:
        T = ids.shape[1]
        check_length(self.config, T)
        positions = torch.arange(T, device=ids.device) if cache is None else cache.positions(T)
        dropout, residual = self.dropout_state(ids.device), None
        options: dict[str, Any] = {"seed": dropout.seed, "stream": 2 * len(self.blocks) + 1, "tied": tied}
        x = self.embedding(ids, dropout_p=dropout.p, **options)  # (B, T, C)
        rotary = self.rotary(positions, torch.promote_types(x.dtype, torch.float32))
        for block in self.blocks:
            x, residual = block(x, residual, rotary, cache, dropout)
        return add_norm(self.norm, x, residual, dropout, 2 * len(self.blocks))[0]
