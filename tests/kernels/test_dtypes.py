"""Dtypes that the contract does not go through: parameters of others than x's, fp64, and integers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedlm.kernels import backend, cross_entropy, gelu, layer_norm, linear, mlp, rms_norm, softmax, swiglu

pytest.importorskip("triton", reason="the kernels need Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS: tuple[Any, ...] = ("torch", "triton")


def numbers(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(DEVICE, dtype).requires_grad_()


MIXED: dict[str, tuple[Callable[..., Tensor], int]] = {
    "layer_norm": (layer_norm, 2),
    "layer_norm without a bias": (layer_norm, 1),
    "rms_norm": (rms_norm, 1),
    "gelu": (lambda x, bias: gelu(x, bias=bias), 1),
}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("op", MIXED)
@pytest.mark.parametrize(("dtype", "other"), [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_parameters_of_another_dtype(op: str, name: Any, dtype: torch.dtype, other: torch.dtype) -> None:
    """The result has x's dtype and its precision, each gradient that of what it is of."""
    function, count = MIXED[op]
    inputs = [numbers(6, 48, seed=0, dtype=dtype), *(numbers(48, seed=i + 1, dtype=other) for i in range(count))]
    dy = numbers(6, 48, seed=9, dtype=dtype).detach()
    with backend(name):
        y = function(*inputs)
        gradients = torch.autograd.grad(y, inputs, dy)
    truths = [t.detach().double().requires_grad_() for t in inputs]
    with backend("torch"):
        truth = function(*truths)
    expected = torch.autograd.grad(truth, truths, dy.double())
    assert y.dtype == dtype
    for found, true in ((y, truth), *zip(gradients, expected, strict=True)):
        tolerance = 2e-3 if torch.float16 in (dtype, found.dtype) else 1e-6
        assert (found.double() - true).norm() < tolerance * true.norm()
    assert [g.dtype for g in gradients] == [t.dtype for t in inputs]


@pytest.mark.parametrize("of", ["weight", "bias", "residual"])
def test_products_of_several_dtypes(of: str) -> None:
    tensors = {"weight": torch.ones(8, 4), "bias": torch.ones(8), "residual": torch.ones(2, 8)}
    tensors[of] = tensors[of].half()
    with pytest.raises(ValueError, match=rf"{of} is torch\.float16; expected x's torch\.float32"):
        linear(torch.ones(2, 4), **tensors)


@pytest.mark.parametrize("of", ["up", "up_bias", "down", "down_bias"])
def test_a_block_of_several_dtypes(of: str) -> None:
    shapes = {"up": (8, 4), "up_bias": (8,), "down": (4, 8), "down_bias": (4,)}
    tensors = {name: torch.ones(shape, dtype=torch.half if name == of else None) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=rf"{of} is torch\.float16; expected x's torch\.float32"):
        mlp(torch.ones(2, 4), tensors["up"], tensors["up_bias"], tensors["down"], tensors["down_bias"], "gelu")


OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm": lambda x: layer_norm(x, torch.ones_like(x[0])),
    "rms_norm": lambda x: rms_norm(x, torch.ones_like(x[0])),
    "gelu": gelu,
    "swiglu": lambda x: swiglu(x, x),
    "softmax": softmax,
    "cross_entropy": lambda x: cross_entropy(x, torch.ones(len(x), dtype=torch.int64, device=x.device)),
}


@pytest.mark.parametrize("op", OPS)
def test_fp64_keeps_its_digits(op: str) -> None:
    """On a GPU too, where torch's ops serve; kernels that are asked for say what they need."""
    x = numbers(3, 16, seed=0, dtype=torch.float64)
    assert OPS[op](x).dtype == torch.float64
    assert torch.autograd.gradcheck(OPS[op], (x,))
    with backend("triton"), pytest.raises(ValueError, match=r"need torch\.float32, .*; got a tensor of torch\.float64"):
        OPS[op](x)


@pytest.mark.parametrize("name", ["auto", *BACKENDS])
def test_integers_are_refused(name: Any) -> None:
    with backend(name), pytest.raises((RuntimeError, ValueError), match=r"not implemented for 'Long'|of torch\.int64"):
        gelu(torch.ones(4, 4, dtype=torch.int64, device=DEVICE))
