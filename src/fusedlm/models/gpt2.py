"""GPT-2 (Radford et al. 2019): pre-norm blocks, learned positions, biases everywhere or nowhere, tanh-GELU."""

from typing import Any

from torch import Tensor, nn

from fusedlm.kernels import GELU, Embedding, LayerNorm, TiedGradient, mlp
from fusedlm.models.config import GPT2Config
from fusedlm.models.decoder import DecoderModel, check_length
from fusedlm.models.layers import Attention, Block, Cache, Linear, add_norm


class MLP(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.recompute: bool | None = None  # see `mlp`
        self.up: nn.Module = Linear(config.width, config.mlp_width, bias=config.bias)
        self.activation = GELU(approximate="tanh")
        self.down: nn.Module = Linear(config.mlp_width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.up, Linear) and isinstance(self.down, Linear):
            return mlp(x, self.up.weight, self.up.bias, self.down.weight, self.down.bias, recompute=self.recompute)
        return self.down(self.activation(self.up.without_bias(x), self.up.bias))  # type: ignore[operator]


def block(config: GPT2Config, layer: int) -> Block:
    return Block(
        LayerNorm(config.width, config.norm_eps, bias=config.bias),
        Attention(config, layer, bias=config.bias),
        LayerNorm(config.width, config.norm_eps, bias=config.bias),
        MLP(config),
    )


class GPT2(DecoderModel):
    """GPT-2 of any size."""

    def __init__(self, config: GPT2Config, dropout: float = 0.0) -> None:
        super().__init__(config, dropout)
        self.positions = Embedding(config.context_length, config.width)
        self.blocks = nn.ModuleList(block(config, layer) for layer in range(config.n_layers))
        self.norm = LayerNorm(config.width, config.norm_eps, bias=config.bias)

    def hidden_states(self, ids: Tensor, cache: Cache | None = None, tied: TiedGradient | None = None) -> Tensor:
        T = ids.shape[1]
        check_length(self.config, T)
        positions = 0 if cache is None else cache.positions(T)
        dropout, residual = self.dropout_state(ids.device), None
        options: dict[str, Any] = {"seed": dropout.seed, "stream": 2 * len(self.blocks) + 1, "tied": tied}
        x = self.embedding(ids, self.positions.weight, positions, dropout.p, **options)  # (B, T, C)
        for block in self.blocks:
            x, residual = block(x, residual, None, cache, dropout)
        return add_norm(self.norm, x, residual, dropout, 2 * len(self.blocks))[0]
