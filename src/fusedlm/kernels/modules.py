"""The ops as `nn.Module`s: those torch has too are its own with another forward, so they take its arguments and states.

Where torch's has an option that the op lacks, asking for it is an error and nothing is left out silently.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fusedlm.kernels._tied import TiedGradient
from fusedlm.kernels.cross_entropy import Reduction, cross_entropy
from fusedlm.kernels.dropout import dropout
from fusedlm.kernels.embedding import embedding
from fusedlm.kernels.gelu import gelu
from fusedlm.kernels.linear_cross_entropy import linear_cross_entropy
from fusedlm.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from fusedlm.kernels.rope import RopeScaling, rotary_frequencies, rotary_tables
from fusedlm.kernels.softmax import softmax
from fusedlm.kernels.swiglu import swiglu


def _only(module: nn.Module, **expected: Any) -> None:
    """Raises ValueError for an option of torch's that the op does not have."""
    for name, value in expected.items():
        given = getattr(module, name)
        if given != value:
            raise ValueError(f"{type(module).__name__}: {name} is {given!r}; expected {value!r}")


class _Norm(nn.Module):
    """What both norms share: the check of their size, and that a residual is added on the way."""

    normalized_shape: tuple[int, ...]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _only(self, elementwise_affine=True)
        if len(self.normalized_shape) != 1:
            raise ValueError(
                f"{type(self).__name__}: normalized_shape is {tuple(self.normalized_shape)}; expected one size, that "
                "of the last dimension"
            )

    def _ops(self) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]], tuple[Any, ...]]:
        """The op alone, the op behind a sum, and what both take of the module: parameters and eps."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        dropout_p: float = 0.0,
        *,
        seed: Tensor | None = None,
        stream: int = 0,
        give_sum: bool = False,
    ) -> Any:
        """norm(x); with a residual (norm(s), s), s = dropout(x) + residual. All are (..., N).

        give_sum: (norm(x), x) where there is no residual, because x is the sum already.
        """
        norm, add_norm, own = self._ops()
        if residual is None and not give_sum:
            return norm(x, *own)
        return add_norm(x, residual, *own, dropout_p, self.training, seed=seed, stream=stream)


class LayerNorm(_Norm, nn.LayerNorm):
    """`layer_norm` with its parameters; given a residual, `add_layer_norm`. Arguments are torch's."""

    weight: nn.Parameter

    def _ops(self) -> Any:
        return layer_norm, add_layer_norm, (self.weight, self.bias, self.eps)


class RMSNorm(_Norm, nn.RMSNorm):
    """`rms_norm` with its parameter; given a residual, `add_rms_norm`. Arguments are torch's, eps 1e-6 by default."""

    weight: nn.Parameter

    def __init__(self, normalized_shape: Any, eps: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(normalized_shape, eps, **kwargs)
        self.eps: float = eps

    def _ops(self) -> Any:
        return rms_norm, add_rms_norm, (self.weight, self.eps)


class Embedding(nn.Embedding):
    """`embedding` with its table. Arguments are torch's, as far as the table's size, dtype and device."""

    def __init__(self, num_embeddings: int, embedding_dim: int, **kwargs: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, **kwargs)
        _only(self, padding_idx=None, max_norm=None, scale_grad_by_freq=False, sparse=False)

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # where there is nothing to fill, and torch would import its compiler to say so
            super().reset_parameters()

    def forward(
        self,
        ids: Tensor,
        position_weight: Tensor | None = None,
        positions: Tensor | int = 0,
        dropout_p: float = 0.0,
        *,
        seed: Tensor | None = None,
        stream: int = 0,
        tied: TiedGradient | None = None,
    ) -> Tensor:
        """ids: (B, T) int64. position_weight: (S, C), whose rows are added. Returns (B, T, C)."""
        options = (dropout_p, self.training)
        return embedding(ids, self.weight, position_weight, positions, *options, seed=seed, stream=stream, tied=tied)


class GELU(nn.GELU):
    """`gelu`, of the input plus a bias where one is given."""

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        return gelu(input, self.approximate, bias)  # type: ignore[arg-type]


class SwiGLU(nn.Module):
    """`swiglu`: of gate and up, or of one tensor that holds both."""

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return swiglu(gate, up)


class Softmax(nn.Softmax):
    """`softmax`, over the last dimension."""

    def __init__(self, dim: int = -1) -> None:
        super().__init__(dim)

    def forward(self, input: Tensor) -> Tensor:
        assert self.dim is not None
        return softmax(input, self.dim)


class Dropout(nn.Dropout):
    """`dropout` while training."""

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        super().__init__(p, inplace)
        _only(self, inplace=False)

    def forward(self, input: Tensor, *, seed: Tensor | None = None, stream: int = 0) -> Tensor:
        return dropout(input, self.p, self.training, seed=seed, stream=stream)


class RotaryEmbedding(nn.Module):
    """`rotary_tables` for given positions. Has no parameters and no state; angles are computed in float64."""

    def __init__(self, head_dim: int, theta: float = 10000.0, scaling: RopeScaling | None = None) -> None:
        super().__init__()
        self.options = (head_dim, theta, scaling)
        self.frequencies = rotary_frequencies(*self.options, "cpu")  # a model on "meta" has real ones, too

    def forward(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """positions: (T,) or (B, T). Returns cos and sin, each (T, D/2) or (B, 1, T, D/2), in dtype, for `rope`."""
        if self.frequencies.device != positions.device:
            self.frequencies = rotary_frequencies(*self.options, positions.device)
        return rotary_tables(positions, self.frequencies, dtype)


class _Loss(nn.Module):
    def __init__(
        self,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        self.options: tuple[int, Reduction, float, float] = (ignore_index, reduction, label_smoothing, z_loss)

    def extra_repr(self) -> str:
        names = ("ignore_index", "reduction", "label_smoothing", "z_loss")
        return ", ".join(f"{name}={value}" for name, value in zip(names, self.options, strict=True))


class CrossEntropyLoss(_Loss):
    """`cross_entropy` with its options."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(input, target, *self.options)


class LinearCrossEntropyLoss(_Loss):
    """`linear_cross_entropy` with its options. The weight comes with the call, for it is the head's."""

    def forward(self, input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(input, weight, target, *self.options)
