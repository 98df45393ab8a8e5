"""GELU (Hendrycks and Gimpel 2016): y = x * Phi(x), or GPT-2's tanh approximation of it.

tanh: y = 0.5 * x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 * x^3))). Traffic: 2 elements per element forward.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from fusedlm.kernels._backend import torch_only


def gelu_ref(x: Tensor, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


def gelu(x: Tensor, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    """GELU of each element, exact ("none") or by the tanh approximation. Any shape. Raises ValueError for another."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate is {approximate!r}; expected 'none' or 'tanh'")
    torch_only("gelu")
    return gelu_ref(x, approximate)
