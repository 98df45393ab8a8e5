"""What the norms do beyond the contract: their operators for torch.compile, and what they refuse."""

import os
import subprocess
import sys

import pytest
import torch

from fusedlm.kernels import add_layer_norm, backend, layer_norm, rms_norm
from fusedlm.kernels.norm import _norm_backward_op, _norm_op

pytest.importorskip("triton", reason="the kernels need Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_operators_for_compile_are_sound(mean: bool, residual: bool) -> None:
    """Shapes without data, autograd and aliasing are what torch.compile is told."""
    g = torch.Generator().manual_seed(0)
    x, r = (torch.randn(2, 3, 20, generator=g).to(DEVICE).requires_grad_() for _ in range(2))
    w, b = (torch.randn(20, generator=g).to(DEVICE).requires_grad_() for _ in range(2))
    arguments = (x, r if residual else None, w, b if mean else None, 1e-5, mean)
    torch.library.opcheck(_norm_op, arguments)
    with torch.no_grad():
        y, total, means, rstd = _norm_op(*arguments)
        saved = total if residual else x
        torch.library.opcheck(_norm_backward_op, (y, saved if residual else None, saved, w, means, rstd, mean))


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, w = torch.randn(4, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"weight has shape \(7,\), expected \(8,\)"):
        rms_norm(x, torch.ones(7))
    with pytest.raises(ValueError, match=r"bias has shape \(9,\), expected \(8,\)"):
        layer_norm(x, w, torch.ones(9))
    with pytest.raises(ValueError, match=r"residual is \(4, 7\)"):
        add_layer_norm(x, torch.randn(4, 7), w)


@pytest.mark.skipif(DEVICE == "cuda", reason="about CPU tensors")
def test_a_forced_backend_never_falls_back() -> None:
    """Compiled kernels cannot take CPU tensors; the interpreter, which tests use, is the only exception."""
    code = """
import torch
from fusedlm.kernels import backend, gelu, rms_norm
for op in (lambda x: rms_norm(x, torch.ones(8)), gelu):
    try:
        with backend("triton"):
            op(torch.randn(4, 8))
    except (ValueError, NotImplementedError) as error:
        print(error)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "need a CUDA tensor; got one on cpu" in done.stdout
    assert "gelu has no Triton kernel" in done.stdout
    with backend("torch"):
        assert rms_norm(torch.randn(4, 8), torch.ones(8)).shape == (4, 8)
