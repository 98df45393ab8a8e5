"""Attention by others: each of torch's own implementations by name, and its compiler's flex attention."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.peers.peer import Peer
from fusedlm.testing import Shape


def _sdpa(implementation: SDPBackend) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, dropout_p: float = 0.0, **_: Any) -> Tensor:
        with sdpa_kernel(implementation):
            return F.scaled_dot_product_attention(q, k, v, None, dropout_p, causal, enable_gqa=q.shape[1] != k.shape[1])

    return attention


_masks: dict[tuple[int, int], Any] = {}
_compiled_flex: Any = torch.compile(flex_attention, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, **_: Any) -> Tensor:
    """The mask is made outside of what is compiled, which would take minutes for it at 16,384 tokens."""
    size = (q.shape[2], k.shape[2])
    if causal and size not in _masks:
        _masks[size] = create_block_mask(lambda b, h, i, j: i >= j, None, None, *size, device=q.device)
    mask = _masks[size] if causal else None
    return _compiled_flex(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def _square(shape: Shape) -> bool:
    return not {"S", "packed", "each"} & shape.keys()


FLASH = Peer(_sdpa(SDPBackend.FLASH_ATTENTION), takes=_square)
CUDNN = Peer(_sdpa(SDPBackend.CUDNN_ATTENTION), takes=lambda shape: _square(shape) and shape["D"] <= 128)
FLEX = Peer(_flex, takes=lambda shape: _square(shape) and not shape.get("p"))
