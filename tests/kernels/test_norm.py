"""What the norms do beyond the contract: their operators for torch.compile, and what they refuse."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from fusedlm.kernels import add_layer_norm, add_rms_norm, backend, layer_norm, linear, norm, rms_norm
from fusedlm.kernels._columns import column_sums, remember_sums

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
from fusedlm.kernels import backend, rms_norm
try:
    with backend("triton"):
        rms_norm(torch.randn(4, 8), torch.ones(8))
except ValueError as error:
    print(error)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "need a CUDA tensor; got one on cpu" in done.stdout
    with backend("torch"):
        assert rms_norm(torch.randn(4, 8), torch.ones(8)).shape == (4, 8)


def test_partial_sums_of_many_programs_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """150 partial sums are three tiles of 64, the last of which is not full."""
    monkeypatch.setattr("fusedlm.kernels.norm.num_programs", lambda device, per_multiprocessor: 150)
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(170, 20, generator=generator, dtype=torch.float64) for _ in range(2))
    normal = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    weight, bias = (torch.ones(20, device=DEVICE, requires_grad=True) for _ in range(2))
    with backend("triton"):
        y = layer_norm(x.float().to(DEVICE), weight, bias, eps=1e-5)
        d_weight, d_bias = torch.autograd.grad(y, (weight, bias), dy.float().to(DEVICE))
    torch.testing.assert_close(d_weight.cpu().double(), (normal * dy).sum(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(d_bias.cpu().double(), dy.sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("add", "alone"), [(add_layer_norm, layer_norm), (add_rms_norm, rms_norm)])
def test_what_is_normalised_is_the_sum_as_it_is_stored(add: Any, alone: Any) -> None:
    """Rounded, that is: the backward pass, which reads the stored sum, is then the derivative of this."""
    generator = torch.Generator().manual_seed(0)
    x, residual, weight = (torch.randn(n, 24, generator=generator).half().to(DEVICE) for n in (9, 9, 1))
    with backend("triton"):
        y, total = add(x, residual, weight[0])
        assert torch.equal(total, (x.float() + residual.float()).half())
        assert torch.equal(y, alone(total, weight[0]))


def test_without_a_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(7, 20, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = 1 + torch.randn(20, generator=generator, dtype=torch.float64)
    normal = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    ours = [t.float().to(DEVICE).requires_grad_() for t in (x, weight)]
    with backend("triton"):
        y = layer_norm(*ours)
        _, d_weight = torch.autograd.grad(y, ours, dy.float().to(DEVICE))
    torch.testing.assert_close(y.cpu().double(), normal * weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d_weight.cpu().double(), (normal * dy).sum(0), rtol=1e-5, atol=1e-4)


def test_statistics_are_aligned_whatever_the_number_of_rows() -> None:
    """A launch whose addresses 16 does not divide takes four times as long on the host."""
    x = torch.randn(7, 24, device=DEVICE, requires_grad=True)
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch, backend("triton"):
        run = norm.launch

        def launch(kernel: Any, grid: Any, key: Any, tensors: Any, *rest: Any) -> None:
            seen.extend(t.data_ptr() % 16 for t in tensors if t is not None)
            run(kernel, grid, key, tensors, *rest)

        patch.setattr(norm, "launch", launch)
        layer_norm(x, torch.ones(24, device=DEVICE), torch.zeros(24, device=DEVICE)).sum().backward()
    assert len(seen) > 8
    assert not any(seen)


@pytest.mark.parametrize("used", [(True, False), (False, True)])
@pytest.mark.parametrize(("summed", "p"), [(False, 0.0), (True, 0.0), (True, 0.4)])
@pytest.mark.parametrize("add", [add_layer_norm, add_rms_norm])
def test_gradients_where_one_of_both_outputs_is_used(add: Any, summed: bool, p: float, used: tuple[bool, bool]) -> None:
    """What nobody used has no gradient, and no tensor of zeros is made and read in its place."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((7, 20), (7, 20), (20,))]
    upstream = torch.randn(7, 20, generator=generator, dtype=torch.float64)
    options = {"dropout_p": p, "seed": torch.tensor([3]) if p else None}

    def gradients(dtype: torch.dtype, device: str, name: str) -> list[torch.Tensor | None]:
        x, residual, weight = (t.to(device, dtype).requires_grad_() for t in given)
        more = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        with backend(name):  # type: ignore[arg-type]
            outputs = add(x, residual if summed else None, weight, **more)
            loss = sum((y * upstream.to(y)).sum() for y, wanted in zip(outputs, used, strict=True) if wanted)
            return list(torch.autograd.grad(loss, (x, residual, weight), allow_unused=True))  # type: ignore[arg-type]

    for ours, truth in zip(
        gradients(torch.float32, DEVICE, "triton"), gradients(torch.float64, "cpu", "torch"), strict=True
    ):
        if ours is None or truth is None:  # a weight that the outputs do not depend on
            assert truth is None or not truth.any()
            assert ours is None or not ours.any()
        else:
            torch.testing.assert_close(ours.cpu().double(), truth, rtol=1e-5, atol=1e-5)


def test_a_sum_is_handed_on_and_takes_no_dropout() -> None:
    x, weight = torch.randn(3, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    with backend("triton"):
        y, total = add_rms_norm(x, None, weight)
        assert total.data_ptr() == x.data_ptr()
        assert torch.equal(y, rms_norm(x, weight))
    with pytest.raises(ValueError, match=r"dropout_p is 0\.1 and residual is None; expected 0"):
        add_layer_norm(x, None, weight, dropout_p=0.1)


@pytest.mark.parametrize(("summed", "p"), [(False, 0.0), (True, 0.0), (True, 0.4)])
def test_the_bias_before_a_norm_has_its_gradient_from_it(
    summed: bool, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norm's backward pass sums what it writes, and nothing reads that again to sum it."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((7, 12), (20, 12), (20,), (7, 20), (20,), (20,))
    given = [torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes]
    upstream = [torch.randn(7, 20, generator=generator, dtype=torch.float64) for _ in range(2)]

    def gradients(dtype: torch.dtype, device: str, name: str) -> list[torch.Tensor]:
        leaves = [t.to(device, dtype).requires_grad_() for t in given]
        x, w, b, residual, weight, bias = leaves
        seed = torch.tensor([3], device=device) if p else None
        with backend(name):  # type: ignore[arg-type]
            z = linear(x, w, b, residual=None if summed else residual)
            outputs = add_layer_norm(z, residual if summed else None, weight, bias, dropout_p=p, seed=seed)
            return list(torch.autograd.grad(outputs, leaves, [u.to(device, dtype) for u in upstream]))

    truth = gradients(torch.float64, "cpu", "torch")
    monkeypatch.setattr("fusedlm.kernels._columns._column_sums", lambda x: pytest.fail("sums that were there"))
    for ours, theirs in zip(gradients(torch.float32, DEVICE, "triton"), truth, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-5, atol=1e-5)


def test_sums_that_are_kept_are_those_of_the_tensor_as_it_is() -> None:
    x = torch.arange(12.0, device=DEVICE).view(4, 3)
    known = torch.tensor([1.0, 2.0, 3.0], device=DEVICE)
    remember_sums(x, known)
    with backend("triton"):
        assert column_sums(x) is known
        assert column_sums(x.view(2, 2, 3)).tolist() == [18.0, 22.0, 26.0], "another tensor"
        x += 1
        assert column_sums(x).tolist() == [22.0, 26.0, 30.0], "written to since"
