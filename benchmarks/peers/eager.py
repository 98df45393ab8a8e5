"""torch's own fused operators, where it has them; elsewhere the peer is the op's reference."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def _rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _rms_norm(total, weight, eps), total


EAGER: dict[str, Callable[..., Any]] = {"rms_norm": _rms_norm, "add_rms_norm": _add_rms_norm}
