"""What rope does beyond the contract: the order of memory, and what it refuses."""

import pytest
import torch

from fusedlm.kernels import backend, rope, rotary_frequencies, rotary_tables
from fusedlm.kernels.rope import rope_ref

pytest.importorskip("triton", reason="the kernels need Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_heads_inside_tokens_stay_there() -> None:
    """What a projection gives, (B, T, H, D) in memory, comes out in that order, with the same numbers."""
    x = torch.randn(2, 5, 3, 8, device=DEVICE).transpose(1, 2).requires_grad_()  # (B, H, T, D)
    cos, sin = rotary_tables(torch.arange(5, device=DEVICE), rotary_frequencies(8, 10000.0, device=DEVICE))
    with backend("triton"):
        y = rope(x, cos, sin)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y).transpose(1, 2).contiguous().transpose(1, 2))
    expected = rope_ref(x, cos, sin)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, torch.autograd.grad(expected.sum(), x)[0])
    assert y.stride(1) < y.stride(2)


def test_tables_that_do_not_fit_are_refused() -> None:
    x, table = torch.randn(1, 2, 3, 8), torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"expected \(B, H, T, D\) with an even D"):
        rope(x, table[:2], table[:2])
    with pytest.raises(ValueError, match=r"cos \(3, 4\) and sin \(3, 3\)"):
        rope(x, table, table[:, :3])
