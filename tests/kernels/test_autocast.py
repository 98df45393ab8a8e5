"""Inside torch.autocast: products in its dtype, sums of two dtypes in the wider one, all else as without it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedlm.kernels import (
    TiedGradient,
    add_layer_norm,
    add_rms_norm,
    attention,
    backend,
    embedding,
    linear,
    linear_cross_entropy,
    mlp,
)

pytest.importorskip("triton", reason="the kernels need Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter rounds bf16 wrongly.
DTYPE, TOLERANCE = (torch.float16, 3e-3) if DEVICE == "cpu" else (torch.bfloat16, 2e-2)
BACKENDS: tuple[Any, ...] = ("torch", "triton")


def numbers(*shape: int, seed: int) -> Tensor:
    made = 0.4 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(DEVICE, torch.float32).requires_grad_()


TARGETS = torch.tensor([1, 5, 0, -100, 7, 2, 2, 3], device=DEVICE)
# The op, the shapes of its tensors, and the dtype of its result (None: autocast's).
PRODUCTS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]], torch.dtype | None]] = {
    "linear": (linear, [(8, 32), (16, 32), (16,)], None),
    "linear, gelu": (lambda *t: linear(*t, activation="gelu"), [(8, 32), (16, 32), (16,)], None),
    "linear, residual": (lambda x, w, r: linear(x, w, residual=r), [(8, 32), (16, 32), (8, 16)], torch.float32),
    "mlp": (lambda *t: mlp(*t, "gelu_tanh"), [(8, 32), (64, 32), (64,), (32, 64), (32,)], None),
    "swiglu": (lambda x, u, d: mlp(x, u, None, d, None, "swiglu"), [(8, 32), (128, 32), (32, 64)], None),
    "attention": (attention, [(1, 2, 8, 16)] * 3, None),
    "loss": (lambda x, w: linear_cross_entropy(x, w, TARGETS), [(8, 32), (16, 32)], torch.float32),
}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("first", [torch.float32, DTYPE])
@pytest.mark.parametrize("op", PRODUCTS)
def test_products_take_its_dtype(op: str, first: torch.dtype, name: Any) -> None:
    """fp32 operands, of which the first may be another product's result; gradients of their dtypes."""
    function, shapes, expected = PRODUCTS[op]
    inputs = [numbers(*shape, seed=i) for i, shape in enumerate(shapes)]
    inputs[0] = inputs[0].detach().to(first).requires_grad_()
    with torch.autocast(DEVICE, DTYPE), backend(name):
        y = function(*inputs)
    assert y.dtype == (expected or DTYPE)
    gradients = torch.autograd.grad(y.float().square().sum(), inputs)
    truths = [t.detach().double().requires_grad_() for t in inputs]
    with backend("torch"):
        truth = function(*truths)
    true = torch.autograd.grad(truth.square().sum(), truths)
    for found, right in ((y, truth), *zip(gradients, true, strict=True)):
        assert (found.double() - right).norm() < TOLERANCE * right.norm()
    assert [g.dtype for g in gradients] == [t.dtype for t in inputs]
    with backend(name):  # nothing of it stays
        assert function(*(t.float() for t in inputs)).dtype == torch.float32


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("op", [add_layer_norm, add_rms_norm])
def test_a_product_beside_a_residual_in_fp32(op: Callable[..., Any], name: Any) -> None:
    """As torch adds them. Without autocast it is an error."""
    x, residual, weight = numbers(8, 32, seed=0), numbers(8, 32, seed=1), numbers(32, seed=2)
    narrow = x.detach().to(DTYPE).requires_grad_()
    with torch.autocast(DEVICE, DTYPE), backend(name):
        y, total = op(narrow, residual, weight)
    assert y.dtype == total.dtype == torch.float32
    torch.testing.assert_close(total, narrow.float() + residual)
    (gradient,) = torch.autograd.grad(y.sum() + total.sum(), narrow)
    assert gradient.dtype == DTYPE
    with backend(name), pytest.raises(ValueError, match=r"residual is \(8, 32\) torch\.float32; expected x's"):
        op(narrow, residual, weight)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_tied_matrix_gets_both_gradients(name: Any) -> None:
    """Though its two parts have two dtypes; the sum has the digits of the wider."""
    ids, weight = TARGETS.clamp(min=0).view(2, 4), numbers(16, 32, seed=0)
    targets = TARGETS.roll(1).view(2, 4)
    tied = TiedGradient()
    with torch.autocast(DEVICE, DTYPE), backend(name):
        loss = linear_cross_entropy(embedding(ids, weight, tied=tied), weight, targets, tied=tied)
        (found,) = torch.autograd.grad(loss, weight)
    truth = weight.detach().double().requires_grad_()
    loss = F.cross_entropy(F.embedding(ids, truth).view(8, 32) @ truth.t(), targets.flatten())
    (right,) = torch.autograd.grad(loss, truth)
    assert (found.double() - right).norm() < TOLERANCE * right.norm()
    assert not torch.equal(found, found.to(DTYPE).float())


def test_fp64_stays() -> None:
    x, weight = numbers(4, 8, seed=0).double(), numbers(6, 8, seed=1).double()
    with torch.autocast(DEVICE, DTYPE):
        assert linear(x, weight).dtype == F.linear(x, weight).dtype == torch.float64


def test_compiled() -> None:
    def work(x: Tensor, residual: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        with torch.autocast(DEVICE, DTYPE):
            return add_rms_norm(linear(x, weight), residual, scale)[0]

    inputs = [numbers(*shape, seed=i) for i, shape in enumerate([(8, 32), (16, 32), (16, 32), (16,)])]
    x, _, weight, scale = inputs
    residual = numbers(8, 16, seed=9)
    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, residual, weight, scale), work(x, residual, weight, scale))
