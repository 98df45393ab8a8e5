"""Causal attention for transformers' models under torch.compile, where its own is slower than in eager mode.

While it is traced it cannot look at the positions, so it allows for sequences that are packed and gives torch's
attention a mask of (B, 1, T, T), for which there is no flash attention. Eager, and with this, torch is told "causal"
and no more.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

NAME = "causal_sdpa"  # transformers makes no mask for an implementation that it has none for


def _attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """q, k, v: (B, H, T, D). Returns (B, T, H, D), and no weights."""
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    return y.transpose(1, 2).contiguous(), None


def use_causal_attention(model: Any) -> None:
    """For a model of transformers that is given whole sequences without padding, and no dropout."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    model.set_attn_implementation(NAME)
