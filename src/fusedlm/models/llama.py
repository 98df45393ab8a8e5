"""Llama (Touvron et al. 2023; Dubey et al. 2024): pre-norm blocks, rotary positions, RMSNorm, SwiGLU, no biases."""

import torch
from torch import Tensor, nn

from fusedlm.kernels import swiglu
from fusedlm.models.config import LlamaConfig
from fusedlm.models.decoder import DecoderModel, check_length
from fusedlm.models.layers import Attention, Cache, Linear, RMSNorm, Rotary


class GatedMLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.width, 2 * config.mlp_width, bias=False)
        self.down = Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # (B, T, F) each
        return self.down(swiglu(gate, up))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, layer, bias=False)
        self.norm2 = RMSNorm(config.width, config.norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: Cache | None) -> Tensor:
        x = x + self.attention(self.norm1(x), rotary, cache)
        return x + self.mlp(self.norm2(x))


class Llama(DecoderModel):
    """Llama of any size, and the models that share its architecture (SmolLM2)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.rotary = Rotary(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)

    def hidden_states(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        T = ids.shape[1]
        check_length(self.config, T)
        positions = torch.arange(T, device=ids.device) if cache is None else cache.positions(T)
        x = self.embedding(ids)  # (B, T, C)
        rotary = self.rotary(positions, torch.promote_types(x.dtype, torch.float32))
        for block in self.blocks:
            x = block(x, rotary, cache)
        return self.norm(x)
