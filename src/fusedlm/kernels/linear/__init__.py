"""Linear layer: y = x @ weight^T + bias; behind it an activation, or dropout and a residual, before it is stored.

    y = activation(z)  or  y = residual + dropout(z),   z = x @ weight^T + bias
    dz = dy * activation'(z)  or  dz = dropout(dy),   dx = dz @ weight,  dweight = dz^T @ x,  dbias = sums of dz
Plain products go to the vendor's library. Numerics: z is summed in fp32 and rounded, as the unfused ops do.
Traffic: M*K + N*K + M*N elements, and M*N for z where it is kept or for the residual; at one token (M = 1) the weights'
N*K. Backward reads dy once more for dbias.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedlm.kernels._autocast import autocast, autocasts
from fusedlm.kernels._backend import use_triton
from fusedlm.kernels._columns import column_sums
from fusedlm.kernels._launch import rows
from fusedlm.kernels._operator import operator
from fusedlm.kernels._philox import dropout_seed
from fusedlm.kernels.dropout import dropout, dropout_ref
from fusedlm.kernels.gelu import gelu, gelu_backward_and_sums, gelu_ref
from fusedlm.kernels.linear.launches import Product, kernel_for, product

Activation = Literal["gelu", "gelu_tanh"]


def linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    y = F.linear(x, weight, bias)
    if activation is not None:
        return gelu_ref(y, "tanh" if activation == "gelu_tanh" else "none")
    if seed is not None:
        y = dropout_ref(y, dropout_p, seed, stream)
    return y if residual is None else y + residual


def check_dtypes(x: Tensor, **others: Tensor | None) -> None:
    """Raises ValueError where those of the others that there are have another dtype than x."""
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name} is {tensor.dtype}; expected x's {x.dtype}")


def products_backward(
    dz: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dweight) of z = x @ weight^T, by the vendor's library. dz: (M, N), x: (..., K), weight: (N, K)."""
    dx = (dz @ weight).view(x.shape) if needs[0] else None
    return dx, dz.T @ x.reshape(-1, x.shape[-1]) if needs[1] else None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return *products_backward(rows(dy), x, weight, needs[:2]), column_sums(dy) if needs[2] else None


def _fake_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, tanh: bool, keep: bool) -> tuple[Tensor, Tensor]:
    size = (x.shape[0], weight.shape[0])
    return x.new_empty(size), x.new_empty(size if keep else 0)


@operator(fake=_fake_linear_gelu)
def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, tanh: bool, keep: bool) -> tuple[Tensor, Tensor]:
    """(y, z); z is empty unless it is to be kept. x: (M, K)."""
    y, z, _ = product(x, weight, bias, None, Product("gelu", tanh, keep))
    return y, y.new_empty(0) if z is None else z


@operator(fake=lambda x, weight, bias, residual, seed, p, stream: x.new_empty(x.shape[0], weight.shape[0]))
def _linear_add(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor | None, p: float, stream: int
) -> Tensor:
    """x: (M, K), residual: (M, N), contiguous."""
    return product(x, weight, bias, residual, Product("add", seed=seed, p=p, stream=stream))[0]


class _LinearGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
        y, z = _linear_gelu(x.reshape(-1, x.shape[-1]), weight, bias, tanh, True)
        ctx.save_for_backward(x, weight, z)
        ctx.tanh = tanh
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, z = ctx.saved_tensors
        dz, dbias = gelu_backward_and_sums(dy.reshape(z.shape), z, None, ctx.tanh)
        dx, dweight = products_backward(dz, x, weight, ctx.needs_input_grad[:2])
        return dx, dweight, dbias if ctx.needs_input_grad[2] else None, None


class _LinearAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        seed: Tensor | None,
        p: float,
        stream: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, seed)
        ctx.p, ctx.stream = p, stream
        N = weight.shape[0]
        residual2 = None if residual is None else residual.reshape(-1, N).contiguous()
        y = _linear_add(x.reshape(-1, x.shape[-1]), weight, bias, residual2, seed, p, stream)
        return y.view(*x.shape[:-1], N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, seed = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dz = dy if seed is None else dropout(dy, ctx.p, seed=seed, stream=ctx.stream)
        dbias = column_sums(dz) if needs[2] else None
        return *products_backward(rows(dz), x, weight, needs[:2]), dbias, dy if needs[3] else None, None, None, None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """x @ weight^T + bias, and what follows it: activation(...), or residual + dropout(...).

    x: (..., K), weight: (N, K), bias: (N,), residual: (..., N), one dtype. The weight may lie in memory as (K, N), as
    GPT-2's files have it: pass its transposed view. activation: "gelu", exact, or "gelu_tanh". dropout_p, training,
    seed, stream: of a dropout before the residual, see `dropout`, whose mask it has. Returns (..., N).
    Without more than a bias it is the vendor library's product on every backend (cuBLAS, oneDNN); so it is where one
    of ours was not measured faster, and the rest a pass behind it.
    Raises ValueError for shapes or dtypes that do not fit, another activation, or one with dropout or a residual.
    """
    x, weight, bias = autocast(x, weight, bias)
    N, K = _check(x, weight, bias, activation, residual)
    seed = dropout_seed(seed, dropout_p, training, x.device)
    if activation is not None and (residual is not None or seed is not None):
        raise ValueError(f"activation is {activation!r}, and there is a residual or dropout; expected either")
    if not use_triton(x):
        return linear_ref(x, weight, bias, activation, residual, dropout_p, seed, stream)
    tensors = (x, weight, bias, residual)
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    epilogue = activation is not None or residual is not None or seed is not None
    x2 = x.reshape(-1, K)
    fits = (seed is None or N % 8 == 0) and (residual is None or residual.dtype == x.dtype)
    fused = epilogue and fits and x2.numel() > 0 and N > 0 and kernel_for(x2, N, K) is not None
    if fused and activation is not None:
        tanh = activation == "gelu_tanh"
        if trains:
            return _LinearGELU.apply(x, weight, bias, tanh)
        return _linear_gelu(x2, weight, bias, tanh, False)[0].view(*x.shape[:-1], N)
    if fused:
        return _LinearAdd.apply(x, weight, bias, residual, seed, dropout_p if seed is not None else 0.0, stream)
    own = trains and bias is not None and bias.requires_grad  # the sums of its gradient are a kernel of ours
    y = _Linear.apply(x, weight, bias) if own else linear_ref(x, weight, bias)
    if activation is not None:
        return gelu(y, "tanh" if activation == "gelu_tanh" else "none")
    if seed is not None:
        y = dropout(y, dropout_p, seed=seed, stream=stream)
    return y if residual is None else y + residual


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
) -> tuple[int, int]:
    """(N, K)."""
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; expected (..., K) and (N, K)")
    N, K = weight.shape
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected {(N,)}")
    if activation not in (None, "gelu", "gelu_tanh"):
        raise ValueError(f"activation is {activation!r}; expected None, 'gelu' or 'gelu_tanh'")
    if residual is not None and residual.shape != (*x.shape[:-1], N):
        raise ValueError(f"residual has shape {tuple(residual.shape)}; expected {(*x.shape[:-1], N)}")
    check_dtypes(x, weight=weight, bias=bias, residual=None if autocasts(x) else residual)
    return N, K
