"""The modules: torch's own with another forward, so torch's are the truth; and what they refuse."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedlm.kernels as kernels
from fusedlm.kernels import (
    GELU,
    CrossEntropyLoss,
    Dropout,
    Embedding,
    LayerNorm,
    LinearCrossEntropyLoss,
    RMSNorm,
    RotaryEmbedding,
    Softmax,
    SwiGLU,
)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def filled(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        p.data.normal_(generator=torch.Generator().manual_seed(p.numel()))
    return module.double()


@pytest.mark.parametrize(
    ("ours", "theirs", "x"),
    [
        (LayerNorm(12, eps=1e-3), nn.LayerNorm(12, eps=1e-3), randn(3, 5, 12)),
        (LayerNorm(12, bias=False), nn.LayerNorm(12, bias=False), randn(3, 5, 12)),
        (RMSNorm(12), nn.RMSNorm(12, eps=1e-6), randn(3, 5, 12)),
        (Embedding(9, 12), nn.Embedding(9, 12), torch.tensor([[0, 8, 3], [8, 8, 1]])),
        (GELU(), nn.GELU(), randn(4, 7)),
        (GELU(approximate="tanh"), nn.GELU(approximate="tanh"), randn(4, 7)),
        (Softmax(), nn.Softmax(-1), randn(4, 7)),
    ],
    ids=lambda value: repr(value) if isinstance(value, nn.Module) else "",
)
def test_a_module_of_torchs_is_replaced(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    filled(theirs)
    ours.double().load_state_dict(theirs.state_dict())
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for _ in range(2)]
    results = [module(given) for module, given in zip((ours, theirs), inputs, strict=True)]
    assert torch.allclose(*results, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(results[0])
    for y in results:
        y.backward(dy)
    assert inputs[0].grad is None or torch.allclose(inputs[0].grad, inputs[1].grad, rtol=1e-11, atol=1e-11)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-11, atol=1e-11), name  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", [LayerNorm(12), RMSNorm(12)], ids=["LayerNorm", "RMSNorm"])
def test_norms_take_a_residual_and_dropout(norm: Any) -> None:
    filled(norm)
    x, r = randn(2, 5, 12), randn(2, 5, 12) + 1
    y, total = norm(x, r)
    assert torch.equal(total, x + r)
    assert torch.allclose(y, norm(x + r), rtol=1e-12)
    seed = torch.tensor([3])
    y, total = norm(x, r, 0.5, seed=seed, stream=7)
    dropped = total - r
    assert torch.allclose(dropped[dropped != 0], (2 * x)[dropped != 0])
    assert 0.2 < (dropped == 0).double().mean() < 0.8
    assert torch.allclose(y, norm(total), rtol=1e-12)
    norm.eval()
    assert torch.equal(norm(x, r, 0.5, seed=seed, stream=7)[1], x + r)
    norm.train()


def test_dropout_and_embedding_drop_while_training_alone() -> None:
    x, ids, table = randn(50, 40), torch.arange(30).view(3, 10), filled(Embedding(30, 16))
    drop = Dropout(0.25)
    for module, given in ((drop, x), (lambda t: table(t, dropout_p=0.25), ids)):
        whole = x if module is drop else table(ids)
        zeros = (module(given) == 0).double().mean()
        assert abs(zeros - 0.25) < 0.1
        assert not torch.equal(module(given), module(given))
        for m in (drop, table):
            m.eval()
        assert torch.equal(module(given), whole)
        for m in (drop, table):
            m.train()
    positions = randn(10, 16)
    assert torch.equal(table(ids, positions), table(ids) + positions)


def test_losses_take_their_options() -> None:
    x, w, t = randn(6, 8), randn(20, 8), torch.tensor([1, 19, -1, 4, 0, 7])
    logits = x @ w.T
    want = F.cross_entropy(logits, t, ignore_index=-1, label_smoothing=0.1, reduction="sum")
    want += 0.01 * (logits.logsumexp(-1).square() * (t != -1)).sum()
    options: Any = {"ignore_index": -1, "reduction": "sum", "label_smoothing": 0.1, "z_loss": 0.01}
    assert torch.allclose(CrossEntropyLoss(**options)(logits, t), want)
    assert torch.allclose(LinearCrossEntropyLoss(**options)(x, w, t), want)
    assert "label_smoothing=0.1" in repr(CrossEntropyLoss(**options))


def test_swiglu_and_rotary_tables() -> None:
    gate, up = randn(4, 10), randn(4, 10) + 1
    assert torch.allclose(SwiGLU()(gate, up), F.silu(gate) * up)
    assert torch.allclose(SwiGLU()(torch.cat((gate, up), -1)), F.silu(gate) * up)
    cos, sin = RotaryEmbedding(8, theta=100.0)(torch.arange(5, 9), torch.float64)
    angles = torch.arange(5, 9, dtype=torch.float64)[:, None] * 100.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    assert torch.allclose(cos, angles.cos(), atol=1e-12)
    assert torch.allclose(sin, angles.sin(), atol=1e-12)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LayerNorm((3, 4)), r"LayerNorm: normalized_shape is \(3, 4\); expected one size"),
        (lambda: LayerNorm(4, elementwise_affine=False), "elementwise_affine is False; expected True"),
        (lambda: RMSNorm(4, elementwise_affine=False), "elementwise_affine is False; expected True"),
        (lambda: Embedding(4, 4, padding_idx=0), "Embedding: padding_idx is 0; expected None"),
        (lambda: Embedding(4, 4, sparse=True), "sparse is True; expected False"),
        (lambda: Dropout(0.1, inplace=True), "inplace is True; expected False"),
        (lambda: Softmax(0)(torch.ones(2, 2)), "only the last one is supported"),
    ],
)
def test_options_that_the_ops_lack_are_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_every_module_is_exported() -> None:
    modules = {name for name, value in vars(kernels.modules).items() if isinstance(value, type) and name[0] != "_"}
    assert {n for n in modules if vars(kernels.modules)[n].__module__ == "fusedlm.kernels.modules"} <= set(
        kernels.__all__
    )
