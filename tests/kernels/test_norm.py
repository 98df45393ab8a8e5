"""What the norms do beyond the contract: their operators for torch.compile, and what they refuse."""

import os
import subprocess
import sys

import pytest
import torch

from fusedlm.kernels import add_layer_norm, backend, layer_norm, rms_norm

pytest.importorskip("triton", reason="the kernels need Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, w = torch.randn(4, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"weight has shape \(7,\); expected \(8,\)"):
        rms_norm(x, torch.ones(7))
    with pytest.raises(ValueError, match=r"weight has shape \(8,\), bias \(9,\); expected \(8,\)"):
        layer_norm(x, w, torch.ones(9))
    with pytest.raises(ValueError, match=r"residual is \(4, 7\)"):
        add_layer_norm(x, torch.randn(4, 7), w)


@pytest.mark.skipif(DEVICE == "cuda", reason="about CPU tensors")
def test_a_forced_backend_never_falls_back() -> None:
    """Compiled kernels cannot take CPU tensors; the interpreter, which tests use, is the only exception."""
    code = """
import torch
from fusedlm.kernels import attention, backend, rms_norm
for op in (lambda x: rms_norm(x, torch.ones(8)), lambda x: attention(*[x[None, None]] * 3)):
    try:
        with backend("triton"):
            op(torch.randn(4, 8))
    except (ValueError, NotImplementedError) as error:
        print(error)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "need a CUDA tensor; got one on cpu" in done.stdout
    assert "attention has no Triton kernel" in done.stdout
    with backend("torch"):
        assert rms_norm(torch.randn(4, 8), torch.ones(8)).shape == (4, 8)
