"""A matrix that is both embedding and head: one gradient, to which the embedding adds in place."""

import sys

import pytest
import torch
from torch import Tensor

from fusedlm.kernels import TiedGradient, backend, embedding, linear_cross_entropy

pytest.importorskip("triton", reason="the kernels need Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V, C = 29, 20


def _given() -> tuple[Tensor, Tensor, Tensor]:
    """A table, ids that repeat within chunks of tokens and across them, and targets."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(V, C, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 7, (3, 11), generator=generator)
    ids[0, :2] = torch.tensor([28, 0])
    return table, ids, torch.randint(0, V, (3, 11), generator=generator)


def _gradient(dtype: torch.dtype, device: str, name: str, tied: TiedGradient | None, *, factor: float = 1.0) -> Tensor:
    table, ids, targets = (t.to(device) for t in _given())
    w = table.to(dtype).requires_grad_()
    with backend(name):  # type: ignore[arg-type]
        hidden = torch.tanh(embedding(ids, w, tied=tied) * 0.3)
        loss = linear_cross_entropy(hidden, w, targets, tied=tied) * factor
        loss.backward()  # type: ignore[no-untyped-call]
    assert w.grad is not None
    return w.grad.cpu().double()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-3)])
def test_the_gradient_is_the_sum_of_both(dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = _gradient(torch.float64, "cpu", "torch", None, factor=3.0)
    apart = _gradient(dtype, DEVICE, "triton", None, factor=3.0)
    refused = lambda *_: pytest.fail("a second matrix of gradients")  # noqa: E731
    monkeypatch.setattr(sys.modules["fusedlm.kernels.embedding"], "embedding_backward", refused)
    together = _gradient(dtype, DEVICE, "triton", TiedGradient(), factor=3.0)
    for found in (apart, together):
        assert (found - truth).norm() / truth.norm() < tolerance


def test_torchs_ops_need_none_of_it() -> None:
    truth = _gradient(torch.float64, "cpu", "torch", None)
    torch.testing.assert_close(_gradient(torch.float64, "cpu", "torch", TiedGradient()), truth)


def test_what_was_left_is_taken_once_and_several_shares_add_up() -> None:
    tied = TiedGradient()
    assert tied.take() is None
    tied.leave(torch.ones(2, 2))
    tied.leave(torch.ones(2, 2))
    taken = tied.take()
    assert taken is not None
    assert taken.tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert tied.take() is None


def test_a_head_that_does_not_train_leaves_the_embeddings_gradient_alone() -> None:
    """As with frozen copies of the matrix: the embedding makes a gradient of its own."""
    table, ids, targets = (t.to(DEVICE) for t in _given())
    w = table.float().requires_grad_()
    tied = TiedGradient()
    with backend("triton"):
        hidden = embedding(ids, w, tied=tied)
        linear_cross_entropy(hidden, w.detach(), targets, tied=tied).backward()  # type: ignore[no-untyped-call]
    frozen = table.double().cpu()
    wide = frozen.clone().requires_grad_()
    x = torch.nn.functional.embedding(ids.cpu(), wide) @ frozen.T
    torch.nn.functional.cross_entropy(x.flatten(0, 1), targets.cpu().flatten()).backward()
    assert w.grad is not None
    assert wide.grad is not None
    torch.testing.assert_close(w.grad.cpu().double(), wide.grad, rtol=1e-5, atol=1e-6)
