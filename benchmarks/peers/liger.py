"""Liger-Kernel's functions with our argument names. Needs `pip install liger-kernel`."""

from collections.abc import Callable
from typing import Any

from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
from liger_kernel.ops.layer_norm import LigerLayerNormFunction
from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from torch import Tensor


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Any:
    return LigerLayerNormFunction.apply(x, weight, bias, eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Any:
    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> Any:
    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "llama", False)


LIGER: dict[str, Callable[..., Any]] = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
}
