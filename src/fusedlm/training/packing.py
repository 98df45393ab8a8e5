"""Attention within the documents of a batch: to a model it is a cache that has nothing of earlier tokens."""

from torch import Tensor

from fusedlm.data.rows import Batch
from fusedlm.kernels import attention


class PackedSequences:
    """The sequences of a batch of rows, laid end to end; none attends to another. A `models.Cache`.

    dropout_p: of the attention weights.
    """

    def __init__(self, batch: Batch, dropout_p: float = 0.0) -> None:
        assert batch.positions is not None
        assert batch.sequence_ends is not None
        self._positions, self._ends, self._dropout_p = batch.positions, batch.sequence_ends, dropout_p

    def positions(self, T: int) -> Tensor:
        """(B, T): of each token in its sequence."""
        return self._positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: (B, H, T, D), k and v: (B, G, T, D). Returns (B, H, T, D)."""
        B, H, T, D = q.shape
        rows = [t.transpose(1, 2).reshape(1, B * T, t.shape[1], D).transpose(1, 2) for t in (q, k, v)]
        y = attention(*rows, cu_seqlens=self._ends, dropout_p=self._dropout_p)  # (1, H, B * T, D)
        return y.transpose(1, 2).reshape(B, T, H, D).transpose(1, 2)
