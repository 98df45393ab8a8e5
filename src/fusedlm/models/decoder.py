"""What GPT-2 and Llama share: token ids in, blocks in a row, a last norm, a head that may be the embedding's matrix."""

import math

import torch
from torch import Tensor, nn

from fusedlm.kernels import linear
from fusedlm.models.config import ModelConfig
from fusedlm.models.layers import Cache, Embedding, LayerNorm, Linear, RMSNorm


class DecoderModel(nn.Module):
    """A decoder-only transformer. Knows no cache, no trainer and no device.

    Parameters are left uninitialised: `init_weights` or a checkpoint fills them.
    """

    embedding: Embedding
    blocks: nn.ModuleList
    norm: nn.Module

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width)
        self.head = None if config.tied else Linear(config.width, config.vocab_size, bias=False)

    def hidden_states(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """ids: (B, T) int64. Returns what the head takes, (B, T, C)."""
        raise NotImplementedError

    @property
    def head_weight(self) -> Tensor:
        """(V, C); the embedding's own matrix where the head is tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: (..., C). Returns (..., V) in the model's dtype."""
        return linear(hidden, self.head_weight)

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """ids: (B, T) int64. Returns logits, (B, T, V)."""
        return self.logits(self.hidden_states(ids, cache))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """GPT-2's initialisation: normal of 0.02, projections into the residual stream by 1/sqrt(2 * n_layers) less."""
        residual = 0.02 / math.sqrt(2 * self.config.n_layers)
        for name, module in self.named_modules():
            if isinstance(module, Linear | Embedding):
                into_residual = name.endswith(("attention.out", "mlp.down"))
                module.weight.normal_(0, residual if into_residual else 0.02, generator=generator)
                if isinstance(module, Linear) and module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, LayerNorm | RMSNorm):
                module.weight.fill_(1)
                if isinstance(module, LayerNorm):
                    module.bias.zero_()


def check_length(config: ModelConfig, T: int) -> None:
    """Raises ValueError where T tokens do not fit the context."""
    if config.context_length < T:
        raise ValueError(f"{T} tokens do not fit the model's context of {config.context_length}")
