"""LayerNorm (Ba et al. 2016): y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the last dimension.

Traffic: 2*M*N elements forward.
"""

import torch.nn.functional as F
from torch import Tensor

from fusedlm.kernels._backend import torch_only


def layer_norm_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Layer norm over the last dimension. x: (..., N); weight, bias: (N,). Returns x's shape and dtype.

    Raises ValueError where weight or bias does not have x's last dimension.
    """
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and p.shape != x.shape[-1:]:
            raise ValueError(f"{name} has shape {tuple(p.shape)}, expected {tuple(x.shape[-1:])}")
    torch_only("layer_norm")
    return layer_norm_ref(x, weight, bias, eps)
