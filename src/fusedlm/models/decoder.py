"""What GPT-2 and Llama share: token ids in, blocks in a row, a last norm, a head that may be the embedding's matrix."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fusedlm.kernels import (
    Embedding,
    LayerNorm,
    RMSNorm,
    TiedGradient,
    dropout_seed,
    linear,
    linear_cross_entropy,
)
from fusedlm.models.config import ModelConfig
from fusedlm.models.layers import Cache, DropoutState, Linear


class DecoderModel(nn.Module):
    """A decoder-only transformer. Knows no cache, no trainer and no device.

    Parameters are not initialised as they should be: `init_weights` or a checkpoint fills them.
    dropout: the probability, in training mode alone, of embeddings, attention weights and what is added to the residual
    stream. It is a matter of training and no checkpoint holds it.
    """

    embedding: Embedding
    blocks: nn.ModuleList
    norm: LayerNorm | RMSNorm

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; expected 0 or more, and less than 1")
        self.config = config
        self.dropout = dropout
        self.embedding = Embedding(config.vocab_size, config.width)
        self.head = None if config.tied else Linear(config.width, config.vocab_size, bias=False)

    def hidden_states(self, ids: Tensor, cache: Cache | None = None, tied: TiedGradient | None = None) -> Tensor:
        """ids: (B, T) int64. tied: see there. Returns what the head takes, (B, T, C)."""
        raise NotImplementedError

    @property
    def head_weight(self) -> Tensor:
        """(V, C); the embedding's own matrix where the head is tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: (..., C). Returns (..., V) in the model's dtype."""
        return linear(hidden, self.head_weight)

    def loss(
        self,
        ids: Tensor,
        targets: Tensor,
        cache: Cache | None = None,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Tensor:
        """The mean cross-entropy of the tokens that follow, an fp32 scalar, without all logits in memory.

        ids: (B, T) int64. targets: (B, T) int64, of each token the one behind it, or ignore_index. cache: says which
        positions the tokens have and what they attend to, where that is not all before them. Other options are those
        of `linear_cross_entropy`.
        """
        tied = TiedGradient() if self.head is None else None
        hidden = self.hidden_states(ids, cache, tied)
        options = (ignore_index, "mean", label_smoothing, z_loss)
        shared: dict[str, Any] = {
            "tied": tied,
            "reuse_input": True,
        }  # the last norm's backward pass needs its sum alone
        return linear_cross_entropy(hidden, self.head_weight, targets, *options, **shared)  # type: ignore[arg-type]

    def dropout_state(self, device: torch.device) -> DropoutState:
        """That of one forward pass, with a new seed from torch's generator of the device; nothing in evaluation."""
        seed = dropout_seed(None, self.dropout, self.training, device)
        return DropoutState() if seed is None else DropoutState(self.dropout, seed)

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
                if isinstance(module, LayerNorm) and module.bias is not None:
                    module.bias.zero_()


def check_length(config: ModelConfig, T: int) -> None:
    """Raises ValueError where T tokens do not fit the context."""
    if config.context_length < T:
        raise ValueError(f"{T} tokens do not fit the model's context of {config.context_length}")
