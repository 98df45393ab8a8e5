"""Dtypes of parameters, states and gradients; masters against torch's AdamW; fp16's scale; options of the loss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fusedlm.kernels import join_master, split_master
from fusedlm.models import PRESETS, DecoderModel, build_model
from fusedlm.training.config import TrainingConfig
from fusedlm.training.guard import LossScale
from fusedlm.training.optimizer import Optimizer, parameter_groups


@pytest.mark.parametrize(
    ("precision", "parameters", "states", "masters"),
    [
        ("fp32", torch.float32, torch.float32, False),
        ("tf32", torch.float32, torch.float32, False),
        ("bf16", torch.bfloat16, torch.float32, True),
        ("bf16-pure", torch.bfloat16, torch.bfloat16, False),
        ("fp16", torch.float16, torch.float32, True),
    ],
)
def test_dtypes(
    run: Callable[..., Any], precision: str, parameters: torch.dtype, states: torch.dtype, masters: bool
) -> None:
    heard, _ = run("run", f"training.precision={precision}", "training.steps=30")
    assert heard.losses[-1] < heard.losses[0] - 0.5
    assert {p.dtype for p in heard.weights().values()} == {parameters}
    state = heard.trainer.optimizer.adamw.state
    for p, values in state.items():
        assert values["exp_avg"].dtype == values["exp_avg_sq"].dtype == states
        low = masters and parameters == torch.bfloat16
        assert ("master_low" in values, "master" in values) == (low, masters and not low)
        if masters:
            master = join_master(p.detach(), values["master_low"]) if low else values["master"]
            halfway = (
                (master.view(torch.int32) & 0xFFFF) == 0x8000 if low else torch.zeros_like(master, dtype=torch.bool)
            )
            assert torch.equal(master.to(parameters)[~halfway], p[~halfway])
            assert halfway.sum() < 10


def bf16_model() -> DecoderModel:
    model = build_model(PRESETS["tiny-llama"])
    model.init_weights(torch.Generator().manual_seed(1))
    return model.to(torch.bfloat16)


def test_masters_are_what_torchs_adamw_makes_of_fp32_copies() -> None:
    model = bf16_model()
    optimizer = Optimizer(model, TrainingConfig(lr=1e-3, max_norm=None), pure=False)
    copies = [p.detach().float().requires_grad_() for p in model.parameters()]
    truth = torch.optim.AdamW(parameter_groups(copies, 0.1), lr=1e-3, betas=(0.9, 0.95))
    for seed in range(5):
        ids = torch.randint(0, 512, (2, 9), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        for p, copy in zip(model.parameters(), copies, strict=True):
            assert p.grad is not None
            copy.grad = p.grad.float()
        optimizer.step()
        truth.step()
    for p, copy in zip(model.parameters(), copies, strict=True):
        master = join_master(p.detach(), optimizer.adamw.state[p]["master_low"])
        torch.testing.assert_close(master, copy, rtol=1e-5, atol=1e-7)
        assert torch.equal(p, split_master(master)[0])


def test_fp16_finds_its_scale_and_keeps_gradients_in_fp32() -> None:
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    p.grad_dtype = torch.float32
    scaling = LossScale(torch.device("cpu"), first=2.0**17)
    seen = []
    for _ in range(4):
        p.grad = None
        ((p * 1.5).float().sum() * scaling.scale).backward()  # 1.5 * 2^17 is beyond fp16's 65,504
        scaling.unscale([p])
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
        norm = p.grad.norm()
        seen.append((float(norm), float(scaling.scale)))
        scaling.update(norm)
    assert [scale for _, scale in seen] == [2.0**17, 2.0**16, 2.0**15, 2.0**15]
    assert seen[0][0] == seen[1][0] == float("inf")
    assert seen[2][0] == seen[3][0] == pytest.approx(1.5 * 3**0.5)
    scaling.good.fill_(1999)
    scaling.update(torch.tensor(1.0))
    assert (float(scaling.scale), float(scaling.good)) == (2.0**16, 0.0)


def test_gradients_are_summed_in_fp32_where_asked_for(run: Callable[..., Any]) -> None:
    settings = ["training.precision=bf16", "training.micro_batches=4", "training.steps=1", "training.batch_size=16"]

    def summed(name: str, *more: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum that a step leaves, and that of its micro-batches in float64."""
        heard, _ = run(name, *settings, *more)
        trainer, weight = heard.trainer, heard.trainer.model.blocks[0].mlp.up.weight
        trainer.optimizer.zero_grad()
        trainer.step.backward([trainer.loader.batch(1, i) for i in range(4)])
        found = weight.grad
        parts = torch.zeros_like(weight, dtype=torch.float64)
        for i in range(4):
            (part,) = torch.autograd.grad(trainer.forward(trainer.loader.batch(1, i)) / 4, weight)
            parts += part.double()
        return found, parts

    narrow, wide = summed("narrow"), summed("wide", "training.grad_dtype=fp32")
    assert (narrow[0].dtype, wide[0].dtype) == (torch.bfloat16, torch.float32)
    far, near = ((found.double() - want).norm() / want.norm() for found, want in (narrow, wide))
    assert near < 1e-6 < 1e-3 < far


def test_an_fp16_run_skips_until_its_scale_fits(run: Callable[..., Any]) -> None:
    heard, _ = run("run", "training.precision=fp16", "training.steps=12", "training.lr=1e-3")
    trainer = heard.trainer
    assert trainer.step.scaling is not None
    skipped = int(trainer.optimizer.skipped)
    assert float(trainer.step.scaling.scale) == 65536.0 / 2**skipped
    fp32, _ = run("fp32", "training.steps=12", "training.lr=1e-3")
    assert heard.losses[0] == pytest.approx(fp32.losses[0], abs=5e-3)


def test_the_losses_options_reach_the_loss(run: Callable[..., Any]) -> None:
    heard, _ = run("run", "training.steps=1", "training.label_smoothing=0.1", "training.z_loss=0.01")
    batch = heard.trainer.loader.batch(0)
    model = build_model(heard.trainer.model.config)
    model.init_weights(torch.Generator().manual_seed(1337))
    logits = model(batch.tokens).detach().double().flatten(0, 1)
    want = F.cross_entropy(logits, batch.targets.flatten(), label_smoothing=0.1)
    want = want + 0.01 * logits.logsumexp(-1).square().mean()
    assert heard.losses == [pytest.approx(float(want), abs=1e-5)]


def test_gradients_are_clipped(run: Callable[..., Any]) -> None:
    plain, _ = run("plain", "training.steps=2", "training.max_norm=none")
    small, _ = run("small", "training.steps=2", "training.max_norm=1e-3")
    assert plain.records[0].norm == small.records[0].norm
    assert plain.records[0].norm > 0.1
    moments = [
        {name: v for name, v in heard.trainer.state().items() if name.endswith("exp_avg")} for heard in (plain, small)
    ]
    sizes = [sum(float(v.square().sum()) for v in part.values()) ** 0.5 for part in moments]
    assert (0.1**2 + 0.09**2) ** 0.5 * 0.99e-3 < sizes[1] < (0.1 + 0.09) * 1.01e-3  # of two gradients of norm 1e-3
    assert sizes[0] > 50 * sizes[1]
