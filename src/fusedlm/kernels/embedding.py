"""Token embedding, with learned positions added where a model has them: y[b, t] = weight[ids[b, t]] + pos[p[b, t]].

Traffic: B*T*C elements read from each table and B*T*C written.
"""

import torch.nn.functional as F
from torch import Tensor

from fusedlm.kernels._backend import torch_only


def embedding_ref(ids: Tensor, weight: Tensor, position_weight: Tensor | None, positions: Tensor | None) -> Tensor:
    x = F.embedding(ids, weight)
    if position_weight is not None and positions is not None:
        x = x + F.embedding(positions, position_weight)
    return x


def _check_range(name: str, index: Tensor, rows: int) -> None:
    # Only on the CPU: on a GPU reading the extremes would wait for the device.
    if index.is_cpu and index.numel() and (int(index.min()) < 0 or int(index.max()) >= rows):
        raise ValueError(f"{name} must lie in [0, {rows}); got {int(index.min())} to {int(index.max())}")


def embedding(
    ids: Tensor, weight: Tensor, position_weight: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """Rows of `weight`, plus rows of `position_weight` where one is given.

    ids: (B, T) int64 in [0, V). weight: (V, C). position_weight: (S, C). positions: (T,) or (B, T) int64 in [0, S).
    Returns (B, T, C) in weight's dtype. Raises ValueError for an id or position out of range (on the CPU, where
    looking costs nothing), and where only one of position_weight and positions is given.
    """
    if (position_weight is None) != (positions is None):
        raise ValueError("position_weight and positions go together; got only one of them")
    _check_range("token ids", ids, weight.shape[0])
    if position_weight is not None and positions is not None:
        _check_range("positions", positions, position_weight.shape[0])
    torch_only("embedding")
    return embedding_ref(ids, weight, position_weight, positions)
