"""SwiGLU (Shazeer 2020): y = silu(gate) * up = gate * sigmoid(gate) * up. Traffic: 3 elements per element forward."""

import torch.nn.functional as F
from torch import Tensor

from fusedlm.kernels._backend import torch_only


def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape; either may be a strided view. Raises ValueError where the shapes differ."""
    if gate.shape != up.shape:
        raise ValueError(f"gate has shape {tuple(gate.shape)} and up {tuple(up.shape)}; expected one shape")
    torch_only("swiglu")
    return swiglu_ref(gate, up)
