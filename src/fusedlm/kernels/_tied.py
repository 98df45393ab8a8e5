"""The gradient of a matrix that is both a model's embedding and its head."""

from torch import Tensor


class TiedGradient:
    """Of one forward pass: where the head's backward pass, which comes first, leaves its gradient of the matrix.

    The embedding's adds its rows to that in place. Otherwise it makes a gradient of its own, zeros but for the rows of
    a batch's tokens, and autograd adds up two whole matrices. Only for a head whose input depends on the embedding's
    output: where the embedding's backward pass does not run, the head's share is lost.
    """

    def __init__(self) -> None:
        self._gradient: Tensor | None = None

    def leave(self, gradient: Tensor) -> None:
        """gradient: (V, C), of nobody else."""
        self._gradient = gradient if self._gradient is None else self._gradient + gradient

    def take(self) -> Tensor | None:
        """What was left, once."""
        gradient, self._gradient = self._gradient, None
        return gradient
