"""The two products of a transformer's MLP and the activation between them.

    h = x @ up^T + up_bias,  y = act(h) @ down^T + down_bias;   act: GELU, or SwiGLU of h's two halves
    dact = dy @ down,  dh = dact * act'(h),  ddown = dy^T @ act(h),  dup = dh^T @ x,  dx = dh @ up
Only h is kept: act(h) is written again by the product that makes dh, which has h at hand. Numerics: h, act(h) and dact
are summed in fp32 and rounded, as the unfused ops do.
Traffic, beside the products' own: forward h and act(h) are written; backward h is read, dh and act(h) are written.
Step by step it is two and three times that.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedlm.kernels._autocast import autocast
from fusedlm.kernels._backend import use_triton
from fusedlm.kernels._columns import column_sums
from fusedlm.kernels._launch import rows
from fusedlm.kernels._operator import operator
from fusedlm.kernels.gelu import gelu, gelu_backward_and_sums, gelu_ref
from fusedlm.kernels.linear import check_dtypes, linear, products_backward
from fusedlm.kernels.linear.launches import Product, kernel_for, product
from fusedlm.kernels.swiglu import swiglu, swiglu_backward, swiglu_ref

MLPActivation = Literal["gelu", "gelu_tanh", "swiglu"]


def _activation_ref(h: Tensor, activation: str) -> Tensor:
    return swiglu_ref(h) if activation == "swiglu" else gelu_ref(h, "tanh" if activation == "gelu_tanh" else "none")


def mlp_ref(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: MLPActivation,
) -> Tensor:
    return F.linear(_activation_ref(F.linear(x, up, up_bias), activation), down, down_bias)


def _fake_up(x: Tensor, up: Tensor, up_bias: Tensor | None, activation: str, keep: bool) -> tuple[Tensor, Tensor]:
    M, H = x.shape[0], up.shape[0]
    return x.new_empty(M, H // 2 if activation == "swiglu" else H), x.new_empty((M, H) if keep else 0)


@operator(fake=_fake_up)
def _mlp_up(x: Tensor, up: Tensor, up_bias: Tensor | None, activation: str, keep: bool) -> tuple[Tensor, Tensor]:
    """(act(h), h); h is empty unless it is to be kept. x: (M, K)."""
    H, K = up.shape
    gated, tanh = activation == "swiglu", activation == "gelu_tanh"
    if kernel_for(x, H, K) is not None:
        act, h, _ = product(x, up, up_bias, None, Product("swiglu" if gated else "gelu", tanh, keep))
    else:
        h = F.linear(x, up, up_bias)
        act = swiglu(h) if gated else gelu(h, "tanh" if tanh else "none")
    return act, h if keep and h is not None else x.new_empty(0)


def _fake_down(dy: Tensor, down: Tensor, h: Tensor, activation: str, sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(h.shape[0], down.shape[1]), h.new_empty(h.shape[1] if sums else 0)


@operator(fake=_fake_down)
def _mlp_down_backward(
    dy: Tensor, down: Tensor, h: Tensor, activation: str, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh, act(h), the sums of dh over rows, empty unless asked for). dy: (M, C), down: (C, F)."""
    N, K = down.shape[1], down.shape[0]
    gated, tanh = activation == "swiglu", activation == "gelu_tanh"
    if kernel_for(dy, N, K) is not None:
        what = Product("dswiglu" if gated else "dgelu", tanh, keep=True, totals=sums)
        dh, act, total = product(dy, down.T, None, h, what)
        assert act is not None
    elif not use_triton(h):
        dact = dy @ down
        if gated:
            gate, up = h.chunk(2, dim=-1)
            silu = F.silu(gate)
            dh, act = torch.cat((torch.ops.aten.silu_backward(dact * up, gate), dact * silu), -1), silu * up
        else:
            dh = torch.ops.aten.gelu_backward(dact, h, approximate="tanh" if tanh else "none")
            act = _activation_ref(h, activation)
        total = dh.sum(0) if sums else None
    elif gated:
        dh, act, total = swiglu_backward(dy @ down, h, None)[0], swiglu(h), None
    else:
        dh, total = gelu_backward_and_sums(dy @ down, h, None, tanh)
        act = gelu(h, "tanh" if tanh else "none")
    return dh, act, total if sums and total is not None else h.new_empty(0)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        up: Tensor,
        up_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        activation: str,
    ) -> Tensor:
        act, h = _mlp_up(x.reshape(-1, x.shape[-1]), up, up_bias, activation, True)
        ctx.save_for_backward(x, up, down, h)
        ctx.activation = activation
        return F.linear(act, down, down_bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, up, down, h = ctx.saved_tensors
        needs, dy2 = ctx.needs_input_grad, rows(dy)
        dh, act, dup_bias = _mlp_down_backward(dy2, down, h, ctx.activation, needs[2])
        ddown = dy2.T @ act if needs[3] else None
        del act
        ddown_bias = (column_sums(dy) if use_triton(dy) else dy2.sum(0)) if needs[4] else None
        dx, dup = products_backward(dh, x, up, needs[:2])
        return dx, dup, dup_bias if needs[2] else None, ddown, ddown_bias, None


def mlp(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None = None,
    activation: MLPActivation = "gelu_tanh",
    *,
    recompute: bool | None = None,
) -> Tensor:
    """act(x @ up^T + up_bias) @ down^T + down_bias.

    x: (..., K), up: (F, K), down: (N, F). activation: "gelu", exact, "gelu_tanh", or "swiglu", whose up is (2F, K),
    gate and then up, without a bias (Shazeer 2020). One dtype; weights may lie in memory transposed. Returns (..., N).
    recompute: whether the backward pass computes what act gives anew and does not keep it; by default on a GPU, where
    a product does so in passing.
    Raises ValueError for shapes or dtypes that do not fit, another activation, or a bias with "swiglu".
    """
    x, up, up_bias, down, down_bias = autocast(x, up, up_bias, down, down_bias)
    _check(x, up, up_bias, down, down_bias, activation)
    if recompute is None:
        recompute = use_triton(x)
    tensors = (x, up, up_bias, down, down_bias)
    if not x.numel():
        return mlp_ref(*tensors, activation)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        if recompute:
            return _MLP.apply(*tensors, activation)
        h = linear(x, up, up_bias)
        act = swiglu(h) if activation == "swiglu" else gelu(h, "tanh" if activation == "gelu_tanh" else "none")
        return linear(act, down, down_bias)
    act = _mlp_up(x.reshape(-1, x.shape[-1]), up, up_bias, activation, False)[0]
    return F.linear(act, down, down_bias).view(*x.shape[:-1], -1)


def _check(
    x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, activation: str
) -> None:
    if activation not in ("gelu", "gelu_tanh", "swiglu"):
        raise ValueError(f"activation is {activation!r}; expected 'gelu', 'gelu_tanh' or 'swiglu'")
    gated = activation == "swiglu"
    fits = up.ndim == down.ndim == 2 and x.shape[-1:] == up.shape[1:]
    if not fits or up.shape[0] != down.shape[1] * (2 if gated else 1):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, up {tuple(up.shape)} and down {tuple(down.shape)}; expected (..., K), "
            f"({'2F' if gated else 'F'}, K) and (N, F)"
        )
    if gated and up_bias is not None:
        raise ValueError("there is a bias before swiglu; expected None")
    for name, bias, weight in (("up_bias", up_bias, up), ("down_bias", down_bias, down)):
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(bias.shape)}; expected {tuple(weight.shape[:1])}")
    check_dtypes(x, up=up, up_bias=up_bias, down=down, down_bias=down_bias)
