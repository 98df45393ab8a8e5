"""Liger-Kernel's functions with our argument names. Needs `pip install liger-kernel==0.8.5`.

GEGLU is another function than GELU; LayerNorm behind a sum, dropout, AdamW and sampling it has none of.
"""

from typing import Any

import torch.nn.functional as F
from liger_kernel.ops import (
    LigerCrossEntropyFunction,
    LigerEmbeddingFunction,
    LigerFusedAddRMSNormFunction,
    LigerFusedGateUpSiLUMulFunction,
    LigerFusedLinearCrossEntropyFunction,
    LigerLayerNormFunction,
    LigerRMSNormFunction,
    LigerRopeFunction,
    LigerSiLUMulFunction,
    LigerSoftmaxFunction,
)
from torch import Tensor

from benchmarks.peers.peer import Peer


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Any:
    return LigerLayerNormFunction.apply(x, weight, bias, eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Any:
    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, dropout_p: float = 0.0, **_: Any
) -> Any:
    x = F.dropout(x, dropout_p, training=True) if dropout_p else x
    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "llama", False)


def _swiglu(gate: Tensor, up: Tensor) -> Any:
    return LigerSiLUMulFunction.apply(gate, up)


def _swiglu_halves(gate: Tensor, up: None = None) -> Any:
    return LigerFusedGateUpSiLUMulFunction.apply(gate)


def _softmax(x: Tensor) -> Any:
    return LigerSoftmaxFunction.apply(x)


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """It rotates queries and keys together, in place: two halves of the batch stand for them, so that it moves as much
    as we do. An odd batch comes with keys of one head, which adds 1/H.
    """
    B, _, T, D = x.shape
    half = B // 2
    q, k = (x, x.new_empty((B, T, 1, D)).transpose(1, 2)) if B % 2 else (x[:half], x[half:])
    cos, sin = cos.view(-1, T, D // 2), sin.view(-1, T, D // 2)
    rotated = LigerRopeFunction.apply(q, k, cos, sin, None, 1, D)
    return rotated[0] if B % 2 else rotated


def _embedding(
    ids: Tensor,
    weight: Tensor,
    position_weight: Tensor | None = None,
    positions: Tensor | int = 0,
    dropout_p: float = 0.0,
    **_: Any,
) -> Any:
    x = LigerEmbeddingFunction.apply(weight, ids)
    if isinstance(positions, Tensor) and position_weight is not None:
        x = x + LigerEmbeddingFunction.apply(position_weight, positions)
    elif position_weight is not None:
        x = x + position_weight[positions : positions + ids.shape[1]]
    return F.dropout(x, dropout_p, training=True) if dropout_p else x


def _cross_entropy(
    input: Tensor, target: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0, reduction: str = "mean"
) -> Any:
    return LigerCrossEntropyFunction.apply(input, target, None, ignore_index, 0.0, label_smoothing, reduction)[0]


def _linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Any:
    # The weight's gradient is summed in the weight's dtype, its default and its fastest.
    arguments = (input, weight, target, None, None, ignore_index, 0.0, label_smoothing, reduction)
    return LigerFusedLinearCrossEntropyFunction.apply(*arguments)[0]


LIGER: dict[str, Peer] = {
    "layer_norm": Peer(_layer_norm),
    "rms_norm": Peer(_rms_norm),
    "add_rms_norm": Peer(_add_rms_norm),
    "swiglu": Peer(_swiglu, writes_inputs=True),
    "swiglu_halves": Peer(_swiglu_halves),
    "softmax": Peer(_softmax, takes=lambda shape: shape["N"] <= 65536),
    "rope": Peer(_rope, writes_inputs=True, takes=lambda shape: "heads" not in shape),
    "embedding": Peer(_embedding, random=True),
    "cross_entropy": Peer(_cross_entropy, writes_inputs=True, waits=True),
    "linear_cross_entropy": Peer(_linear_cross_entropy, waits=True),
}
