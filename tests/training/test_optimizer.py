"""Groups, schedules, and a step against torch's AdamW over one large batch."""

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fusedlm.kernels import backend, join_master
from fusedlm.models import PRESETS, DecoderModel, build_model
from fusedlm.training.config import RunConfig, TrainingConfig, make_config
from fusedlm.training.muon import Muon, orthogonalized
from fusedlm.training.optimizer import Optimizer, parameter_groups
from fusedlm.training.schedule import Schedule


def model_of(name: str = "tiny-gpt2") -> DecoderModel:
    model = build_model(PRESETS[name])
    model.init_weights(torch.Generator().manual_seed(3))
    return model


def test_only_matrices_are_decayed() -> None:
    model = model_of()
    decayed, others = parameter_groups(model.parameters(), 0.3)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    names = {p: name for name, p in model.named_parameters()}
    assert {names[p] for p in decayed["params"]} == {n for n, p in model.named_parameters() if p.ndim == 2}
    assert all(names[p].endswith((".bias", "norm1.weight", "norm2.weight", "norm.weight")) for p in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def schedule(kind: str, **more: Any) -> list[float]:
    training = TrainingConfig(schedule=kind, steps=100, warmup=10, lr=1.0, min_lr=0.1, **more)  # type: ignore[arg-type]
    found = Schedule.of(training)
    return [found(step) for step in range(100)]


def test_schedules() -> None:
    for kind in ("cosine", "linear", "wsd", "constant"):
        shares = schedule(kind)
        assert shares[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
        assert shares[10] == 1
        assert shares[99] == pytest.approx(1.0 if kind == "constant" else 0.1)
    assert schedule("cosine")[10 + 89 // 3] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * (89 // 3) / 89)) / 2)
    assert schedule("linear")[10 + 30] == pytest.approx(1 - 0.9 * 30 / 89)
    wsd = schedule("wsd", decay=0.3)
    assert wsd[10:71] == [1.0] * 61
    assert wsd[85] == pytest.approx(1 - 0.9 * 15 / 29)
    assert Schedule("cosine", 5, 10, 0.1, 0.2)(4) == 0.5  # warm-up alone
    assert Schedule.of(TrainingConfig(lr=3e-4)).floor == 0.1  # whatever the highest one is
    assert Schedule.of(TrainingConfig(lr=3e-4, min_lr=3e-4)).floor == 1.0


def test_steps_equal_torchs_adamw() -> None:
    training = TrainingConfig(lr=3e-3, betas=(0.8, 0.9), weight_decay=0.2, max_norm=0.5, eps=1e-6)
    ours, theirs = model_of(), model_of()
    optimizer = Optimizer(ours, training, pure=False)
    groups = parameter_groups(theirs.parameters(), 0.2)
    truth = torch.optim.AdamW(groups, lr=3e-3, betas=(0.8, 0.9), eps=1e-6)
    for seed in range(4):
        ids = torch.randint(0, 512, (2, 9), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        truth.zero_grad()
        for model in (ours, theirs):
            model.loss(ids[:, :-1], ids[:, 1:]).backward()
        share = (seed + 1) / 4
        optimizer.schedule(share)
        for group in truth.param_groups:
            group["lr"] = 3e-3 * share
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        truth.step()
        assert float(optimizer.norm) == pytest.approx(float(norm), rel=1e-5)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_orthogonalized_matrices_have_singular_values_near_one() -> None:
    for shape in ((8, 40), (40, 8), (16, 16)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        found = orthogonalized(matrix)
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.3
        assert values.max() < 1.3
        aligned = u.mT @ found @ vh.mT  # of the same singular vectors
        assert (aligned - torch.diag(torch.diagonal(aligned))).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_muon_takes_the_blocks_matrices_and_learns(name: str) -> None:
    model = model_of(name)
    optimizer = Optimizer(model, TrainingConfig(optimizer="muon", lr=1e-3, muon_lr=0.02), pure=False)
    assert optimizer.muon is not None
    assert set(optimizer.muon.param_groups[0]["names"]) == {
        n for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2
    }
    ids = torch.randint(0, 512, (4, 33), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1.5
    before = [p.detach().clone() for p in model.parameters()]
    model.blocks[0].mlp.down.weight.grad[0, 0] = torch.inf  # type: ignore[union-attr]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert int(optimizer.skipped) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_capture_finds_a_place_for_its_tables(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that dies with a call is refused while a graph is captured. Here the capture is pretended."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model_of().to(device)
    made = Optimizer(model, TrainingConfig(optimizer=optimizer), pure=False)  # type: ignore[arg-type]
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    monkeypatch.setattr(sys.modules["fusedlm.kernels.adamw.workspace"], "_capturing", lambda device: True)
    with backend("triton"):
        made.step()
    assert float(made.norm) == pytest.approx(1e-3 * math.sqrt(sum(p.numel() for p in model.parameters())), rel=1e-5)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_muon_is_torchs() -> None:
    """Of matrices that are one; torch's iteration is in bf16, so its updates are near and not equal."""
    generator = torch.Generator().manual_seed(4)
    first = [torch.randn(shape, generator=generator) * 0.1 for shape in ((24, 12), (12, 24))]
    ours, theirs = ([nn.Parameter(w.clone()) for w in first] for _ in range(2))
    named = [("blocks.0.mlp.up.weight", ours[0]), ("blocks.0.mlp.down.weight", ours[1])]
    optimizer = Muon(named, lr=torch.tensor(0.02), weight_decay=0.3)
    truth = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.3, momentum=0.95, nesterov=True)
    for _ in range(6):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        optimizer.step(torch.tensor(1.0))
        truth.step()
    for p, q, w in zip(ours, theirs, first, strict=True):
        assert (p - q).norm() < 0.02 * (q - w).norm()


def test_muons_masters_are_the_weights_of_a_run_in_fp32() -> None:
    """Bit for bit, over steps below bf16's resolution; a step that is skipped leaves both halves as they are."""
    generator = torch.Generator().manual_seed(4)
    p = nn.Parameter(torch.randn(24, 12, generator=generator).bfloat16())
    wide = nn.Parameter(p.detach().float())
    first = p.detach().clone()
    narrow, truth = (Muon([("blocks.0.mlp.up.weight", w)], lr=torch.tensor(1e-5), weight_decay=0.3) for w in (p, wide))
    for norm in (1.0, 1.0, math.inf, 1.0):
        p.grad = torch.randn(p.shape, generator=generator).bfloat16()
        wide.grad = p.grad.float()
        for optimizer in (narrow, truth):
            optimizer.step(torch.tensor(norm))
        low = narrow.state[p]["master_low"]
        assert low.dtype == torch.int16
        assert torch.equal(join_master(p.detach(), low), wide.detach())
    assert (p == first).double().mean() > 0.9
    assert not torch.equal(wide, first.float())


def test_muon_splits_what_is_several_in_one() -> None:
    for name, rows in (("attention.qkv", [8, 4, 4]), ("mlp.gate_up", [8, 8]), ("mlp.up", [16])):
        w = nn.Parameter(torch.zeros(16, 8))
        optimizer = Muon([(f"blocks.0.{name}.weight", w)], lr=torch.tensor(1.0), weight_decay=0.0)
        w.grad = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
        optimizer.step(torch.tensor(1.0))
        parts = [orthogonalized(g) * max(1, g.shape[0] / 8) ** 0.5 for g in w.grad.split(rows)]
        torch.testing.assert_close(-w, torch.cat(parts), rtol=1e-5, atol=1e-6)


def test_micro_batches_are_one_large_batch(run: Callable[..., Any]) -> None:
    """With documents apart, micro-batches have different numbers of targets."""
    whole, _ = run("whole", "training.steps=4", "training.max_norm=none")
    parts, _ = run("parts", "training.steps=4", "training.micro_batches=4", "training.max_norm=none")
    assert parts.losses == pytest.approx(whole.losses, abs=1e-5)
    for p, q in zip(parts.weights().values(), whole.weights().values(), strict=True):
        assert (p - q).norm() < 1e-3 * q.norm()


def test_presets_are_what_nanogpt_has() -> None:
    config: RunConfig = make_config("shakespeare-char")
    training = config.training
    assert (training.lr, training.warmup, training.steps) == (1e-3, 100, 5000)
    assert Schedule.of(training).floor * training.lr == pytest.approx(1e-4)
    assert (training.batch_size, training.dropout, training.betas, training.weight_decay) == (64, 0.2, (0.9, 0.99), 0.1)
