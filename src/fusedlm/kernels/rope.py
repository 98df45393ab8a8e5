"""Rotary position embedding (Su et al. 2021), in the half-split layout of Llama checkpoints.

With x1, x2 the halves of the last dimension and an angle a for each position and frequency:
y1 = x1 * cos(a) - x2 * sin(a),  y2 = x2 * cos(a) + x1 * sin(a). Traffic: 2 elements per element.
"""

import torch
from torch import Tensor

from fusedlm.kernels._backend import torch_only


def rope_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    x1, x2 = x.to(wide).chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of x's last dimension against each other.

    x: (B, H, T, D), any strides, D even. cos, sin: broadcastable to (B, H, T, D/2), fp32 (fp64 for fp64 x).
    Returns x's shape and dtype. Raises ValueError where D is odd or cos and sin are not D/2 wide.
    """
    if x.shape[-1] % 2 or cos.shape[-1] * 2 != x.shape[-1] or cos.shape != sin.shape:
        raise ValueError(
            f"x is {x.shape[-1]} wide, cos has shape {tuple(cos.shape)} and sin {tuple(sin.shape)}; "
            "expected an even width and tables of half of it"
        )
    torch_only("rope")
    return rope_ref(x, cos, sin)
