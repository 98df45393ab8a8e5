"""Inside torch.autocast: products take its dtype, whatever comes in, and a sum of two dtypes has the wider one.

Other ops keep their input's dtype and compute in fp32 by themselves, so there is nothing to widen as torch's do.
"""

from typing import Any

import torch
from torch import Tensor


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def autocast(x: Tensor, *others: Tensor | None) -> Any:
    """The operands of a product, each in autocast's dtype where it is on; fp64 stays, as in torch's own products."""
    if not autocasts(x):
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(
        t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype) for t in (x, *others)
    )


def one_dtype(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors whose sum autocast has in the wider dtype, both in that; elsewhere as they are."""
    if x.dtype == r.dtype or not autocasts(x):
        return x, r
    wide = torch.promote_types(x.dtype, r.dtype)
    return x.to(wide), r.to(wide)
