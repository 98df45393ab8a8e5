"""Softmax where the contract does not go: numbers whose exponentials overflow, and long rows with gaps between them."""

import pytest
import torch
from torch import Tensor

from fusedlm.kernels import backend, softmax

pytest.importorskip("triton", reason="the kernels need Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Rows that fit a program and longer ones; the longest are read backwards the second time.
LENGTHS = (100, 40000, 70000) if DEVICE == "cuda" else (100, 200, 300)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("N", LENGTHS)
@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_a_number_added_to_all_changes_nothing(N: int, shift: float) -> None:
    x = (numbers(3, N) * 64).round() / 64 + shift  # exact in fp32
    with backend("triton"):
        y = softmax(x.float().to(DEVICE))
    torch.testing.assert_close(y.cpu().double(), x.softmax(-1), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("N", LENGTHS)
def test_rows_with_gaps_between_them(N: int) -> None:
    """Of x and of the gradient that comes in, each with a gap of its own."""
    x, dy = numbers(3, N), numbers(3, N, seed=1)
    truth = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(truth.softmax(-1), truth, dy)
    wide_x, wide_dy = torch.full((3, N + 5), torch.nan), torch.full((3, N + 16), torch.nan)
    wide_x[:, :N], wide_dy[:, :N] = x, dy
    leaf = wide_x.to(DEVICE)[:, :N].requires_grad_()
    with backend("triton"):
        y = softmax(leaf)
        (dx,) = torch.autograd.grad(y, leaf, wide_dy.to(DEVICE)[:, :N])
    torch.testing.assert_close(y.detach().cpu().double(), x.softmax(-1), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(dx.cpu().double(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("N", [20000, 32768] if DEVICE == "cuda" else [100, 128])
def test_rows_that_wait_in_bf16(N: int) -> None:
    """They are widened by their bits, unlike fp16. The interpreter rounds bf16 towards 0: 1 % to spare."""
    x, dy = numbers(3, N).bfloat16(), numbers(3, N, seed=1).bfloat16()
    truth = x.double().requires_grad_()
    y = truth.softmax(-1)
    (expected,) = torch.autograd.grad(y, truth, dy.double())
    leaf = x.to(DEVICE).requires_grad_()
    with backend("triton"):
        found = softmax(leaf)
        (dx,) = torch.autograd.grad(found, leaf, dy.to(DEVICE))
    for value, true in ((found, y), (dx, expected)):
        assert (value.cpu().double() - true).norm() < 0.01 * true.norm()
