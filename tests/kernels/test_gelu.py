"""GELU far from zero, where the contract's inputs do not go: exponentials overflow there and must not show."""

from typing import Any

import pytest
import torch

from fusedlm.kernels import backend, gelu

pytest.importorskip("triton", reason="the kernels need Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_far_from_zero_it_is_zero_or_the_identity(dtype: torch.dtype, approximate: Any) -> None:
    """From 14 on, Phi is 0 or 1 to 43 digits; the approximation is closer still."""
    far = torch.tensor([14.0, 30.0, 100.0, 1e3, 1e4, 6e4], dtype=dtype, device=DEVICE)
    x = torch.cat((-far, far)).requires_grad_()
    dy = torch.linspace(-3, 2, len(x), dtype=dtype, device=DEVICE)
    with backend("triton"):
        y = gelu(x, approximate=approximate)
        (dx,) = torch.autograd.grad(y, x, dy)
    zeros = torch.zeros_like(far)
    torch.testing.assert_close(y, torch.cat((zeros, far)), rtol=0, atol=1e-20)
    torch.testing.assert_close(dx, torch.cat((zeros, dy[len(far) :])), rtol=0, atol=1e-20)
