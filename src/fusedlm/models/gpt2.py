"""GPT-2 (Radford et al. 2019): pre-norm blocks, learned positions, biases everywhere, tanh-GELU."""

from torch import Tensor, nn

from fusedlm.kernels import gelu
from fusedlm.models.config import GPT2Config
from fusedlm.models.decoder import DecoderModel, check_length
from fusedlm.models.layers import Attention, Cache, Embedding, LayerNorm, Linear


class MLP(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.up = Linear(config.width, config.mlp_width, bias=True)
        self.down = Linear(config.mlp_width, config.width, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.width, config.norm_eps)
        self.attention = Attention(config, layer, bias=True)
        self.norm2 = LayerNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        x = x + self.attention(self.norm1(x), None, cache)
        return x + self.mlp(self.norm2(x))


class GPT2(DecoderModel):
    """GPT-2 of any size."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.positions = Embedding(config.context_length, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = LayerNorm(config.width, config.norm_eps)

    def hidden_states(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        T = ids.shape[1]
        check_length(self.config, T)
        positions = 0 if cache is None else cache.positions(T)
        x = self.embedding(ids, self.positions.weight, positions)  # (B, T, C)
        for block in self.blocks:
            x = block(x, cache)
        return self.norm(x)
