"""Linear layer: y = x @ weight^T + bias. Matrix products, so on every device they go to the vendor's library.

    dx = dy @ weight,  dweight = dy^T @ x,  dbias = the sums of dy over rows
Traffic: M*K + N*K + M*N elements; at one token (M = 1) it is the weights' N*K. dbias reads dy once more.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedlm.kernels._backend import use_triton
from fusedlm.kernels._columns import column_sums


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        dy2 = dy.reshape(-1, dy.shape[-1])
        if dy2.stride(1) != 1:
            dy2 = dy2.contiguous()
        needs = ctx.needs_input_grad
        dx = (dy2 @ weight).view(x.shape) if needs[0] else None
        dweight = dy2.T @ x.reshape(-1, x.shape[-1]) if needs[1] else None
        return dx, dweight, column_sums(dy2) if needs[2] else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias. x: (..., K), weight: (N, K), bias: (N,). Returns (..., N).

    Products are the vendor library's on every backend (cuBLAS, oneDNN), `backend("triton")` included; the gradient of
    the bias is a kernel of ours on a GPU.
    """
    if bias is None or not bias.requires_grad or not torch.is_grad_enabled() or not use_triton(x):
        return linear_ref(x, weight, bias)
    return _Linear.apply(x, weight, bias)
