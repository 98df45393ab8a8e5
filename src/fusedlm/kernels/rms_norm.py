"""RMSNorm (Zhang and Sennrich 2019): y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

Numerics: at least fp32 inside, one rounding at the end. Traffic: 2*M*N elements forward.
"""

import torch
from torch import Tensor

from fusedlm.kernels._backend import torch_only


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Root-mean-square norm over the last dimension. x: (..., N), weight: (N,). Returns x's shape and dtype.

    Raises ValueError where weight does not have x's last dimension.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected {tuple(x.shape[-1:])}")
    torch_only("rms_norm")
    return rms_norm_ref(x, weight, eps)
