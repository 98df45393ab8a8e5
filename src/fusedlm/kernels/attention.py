"""Scaled dot-product attention (Vaswani et al. 2017): softmax(q @ k^T * scale + mask) @ v, for each head.

Grouped and multi-query attention (Ainslie et al. 2023): H query heads share G key/value heads, H/G to each.
Causal: query i of sequence b stands at position offset[b] + i and sees the keys up to there.
Traffic: q, k, v read and the output written once; 4*H*T*S*D floating-point operations, half of it where causal.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedlm.kernels._backend import torch_only


def attention_ref(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, offset: int | Tensor, scale: float, dropout_p: float = 0.0
) -> Tensor:
    B, H, T, D = q.shape
    G, S = k.shape[1], k.shape[2]
    square = False
    if causal and isinstance(offset, int) and offset == 0 and T == S:  # so, torch.compile decides and has no SymBool
        square = True
    mask = None
    if causal and not square and not (isinstance(offset, int) and offset + 1 >= S):  # else every query sees every key
        start = torch.as_tensor(offset, device=q.device).view(-1, 1, 1, 1)  # (B or 1, 1, 1, 1)
        position = start + torch.arange(T, device=q.device).view(-1, 1)
        mask = torch.arange(S, device=q.device) <= position  # (B or 1, 1, T, S)
    if T == 1 and H != G:  # one query a head: the heads of a group are the rows of one small product
        grouped = q.reshape(B, G, H // G, D)
        return F.scaled_dot_product_attention(grouped, k, v, mask, dropout_p, scale=scale).reshape(B, H, 1, -1)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, square, scale=scale, enable_gqa=H != G)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    offset: int | Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention of T queries over S keys.

    q: (B, H, T, D). k, v: (B, G, S, D), H a multiple of G. offset: the position of the first query among the keys, an
    int or one a sequence, (B,) int64; by default S - T, so that the last query sees every key. scale: 1/sqrt(D) by
    default. dropout_p: of the weights, its mask from torch's own generator. Returns (B, H, T, D) in q's dtype. Raises
    ValueError for shapes that do not fit.
    """
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; expected (B, H, T, D) and "
            "twice (B, G, S, D)"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key/value heads")
    if offset is None:
        offset = k.shape[2] - q.shape[2]
    torch_only("attention")
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    return attention_ref(q, k, v, causal=causal, offset=offset, scale=scale, dropout_p=dropout_p)
