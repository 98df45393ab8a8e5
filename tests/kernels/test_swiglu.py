"""SwiGLU of gates far from zero, where the contract's do not go: exponentials overflow there and must not show."""

import pytest
import torch

from fusedlm.kernels import backend, swiglu

pytest.importorskip("triton", reason="the kernels need Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gates_far_from_zero_are_shut_or_open(dtype: torch.dtype) -> None:
    """From 100 on, the sigmoid is 0 or 1 to 43 digits."""
    far = torch.tensor([100.0, 1e3, 1e4, 6e4], dtype=dtype, device=DEVICE)
    gate = torch.cat((-far, far)).requires_grad_()
    up = torch.linspace(-0.9, 1, len(gate), dtype=dtype, device=DEVICE).requires_grad_()
    with backend("triton"):
        y = swiglu(gate, up)
        d_gate, d_up = torch.autograd.grad(y, (gate, up), torch.ones_like(gate))
    opened = gate.detach() > 0
    torch.testing.assert_close(y, torch.where(opened, gate * up, 0), atol=1e-20, rtol=1e-3)
    torch.testing.assert_close(d_gate, torch.where(opened, up, 0), atol=1e-20, rtol=1e-6)
    torch.testing.assert_close(d_up, torch.where(opened, gate, 0), atol=1e-20, rtol=1e-6)
