"""Queries, keys and values of one projection: parts of it, and their gradients as one."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedlm.kernels import attention, backend, rope, rotary_frequencies, rotary_tables, split_heads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS = (4, 2, 2)


class Called(TorchDispatchMode):
    """Names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def projected(dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 19, 8 * 16, generator=g, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()


def gradient(x: Tensor, split: Any, tables: tuple[Tensor, Tensor] | None = None) -> Tensor:
    heads = x.view(2, 19, 8, 16).transpose(1, 2)
    if tables is not None:
        heads = rope(heads, *tables, heads=6)
    y = attention(*split(heads, HEADS, dim=1) if split is torch.split else split(heads, HEADS))
    weights = torch.arange(y.numel(), device=DEVICE, dtype=y.dtype).view(y.shape).sin()
    return torch.autograd.grad((y * weights).sum(), x)[0]


@pytest.mark.parametrize("rotates", [False, True])
def test_gradients_are_one_tensor_without_a_copy(rotates: bool) -> None:
    tables = None
    if rotates:
        tables = rotary_tables(torch.arange(19, device=DEVICE), rotary_frequencies(16, 1e4, device=DEVICE))
    with backend("torch"):
        wide = None if tables is None else (tables[0].double(), tables[1].double())
        truth = gradient(projected(torch.float64), torch.split, wide)
    with backend("triton"), Called() as called:
        ours = gradient(projected(), split_heads, tables)
    torch.testing.assert_close(ours.double(), truth, atol=2e-5, rtol=1e-4)
    assert not [name for name in called.names if name.startswith(("cat", "clone"))]


def test_gradients_that_lie_apart_are_joined() -> None:
    x = torch.randn(2, 5, 8, 16, device=DEVICE).transpose(1, 2).requires_grad_()
    q, k, v = split_heads(x, HEADS)
    assert [t.shape[1] for t in (q, k, v)] == list(HEADS)
    assert v.data_ptr() == x[:, 6:].data_ptr()
    (found,) = torch.autograd.grad((q.square().sum() + 3 * k.sum() - v.exp().sum()), x)
    a, b, c = x.detach().split(HEADS, dim=1)
    torch.testing.assert_close(found, torch.cat((2 * a, torch.full_like(b, 3.0), -c.exp()), dim=1))


class Backward(torch.autograd.Function):
    """Has the gradients that it is given."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, gradients: tuple[Tensor, ...]) -> Tensor:
        ctx.gradients = gradients
        return q.sum() + k.sum() + v.sum()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        return *ctx.gradients, None


@pytest.mark.parametrize("apart", ["in another order", "in other tensors", "with a gap"])
def test_slices_that_are_not_side_by_side_are_not_taken_for_one(apart: str) -> None:
    def whole(first: int, heads: int = 8) -> Tensor:
        numbers = torch.arange(2 * 5 * heads * 16.0, device=DEVICE) + first
        return numbers.view(2, 5, heads, 16).transpose(1, 2)

    if apart == "in another order":
        v, k, q = whole(0).split((2, 2, 4), dim=1)
    elif apart == "in other tensors":
        q, k, v = (whole(1000 * i).split(HEADS, dim=1)[i] for i in range(3))
    else:
        q, k, _, v = whole(0, 9).split((*HEADS[:2], 1, 2), dim=1)
    x = torch.zeros(2, 8, 5, 16, device=DEVICE, requires_grad=True)
    (found,) = torch.autograd.grad(Backward.apply(*split_heads(x, HEADS), (q, k, v)), x)
    torch.testing.assert_close(found, torch.cat((q, k, v), dim=1))


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="sum of heads"):
        split_heads(torch.zeros(1, 7, 2, 4), HEADS)
