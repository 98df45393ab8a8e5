"""The benchmark of training without a GPU: its peer, what it measures, and what it writes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the benchmarks need Triton")

from benchmarks import training
from benchmarks.peers.nanogpt import NanoGPT, NanoGPTStep
from benchmarks.training import OURS, SUITES, Suite, measure, nanogpt, ours, suite_of, table
from fusedlm.models import PRESETS, build_model

TINY = replace(PRESETS["tiny-gpt2"], context_length=32)


def test_the_peer_is_gpt2() -> None:
    """With its weights and no biases, our GPT-2 gives its loss; the forms of GELU differ by less than that."""
    theirs = NanoGPT(TINY)
    model = build_model(TINY)
    model.init_weights()
    names = {"embedding": "tokens", "positions": "positions", "norm": "norm"}
    with torch.no_grad():
        for name, p in model.named_parameters():
            part = name.removesuffix(".weight")
            part = names.get(part, part.replace("attention.", "").replace("mlp.", ""))
            if name.endswith(".weight"):
                p.copy_(theirs.get_parameter(f"{part}.weight"))
    ids = torch.randint(0, 512, (3, 33))
    assert theirs(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(model.loss(ids[:, :-1], ids[:, 1:]).item(), abs=1e-4)


def test_the_peer_learns() -> None:
    step = NanoGPTStep(TINY, torch.device("cpu"), lr=1e-2, compiled=False)
    ids = torch.randint(0, 512, (4, 33))
    losses = [step(ids[:, :-1], ids[:, 1:]).item() for _ in range(15)]
    assert losses[-1] < losses[0] - 1
    before = step.loss(ids[:, :-1], ids[:, 1:]).item()
    assert step.loss(ids[:, :-1], ids[:, 1:]).item() == before < losses[-1]


def test_a_suite_is_measured_in_turns() -> None:
    calls: list[str] = []

    def noted(name: str, make: Any) -> Any:
        def maker(device: torch.device) -> Any:
            step = make(device)

            def call(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
                calls.append(name)
                return step(ids, targets)

            return call

        return maker

    contenders = {OURS: ours(TINY, lr=1e-3, recompute="cheap"), "nanoGPT": nanogpt(TINY, compiled=False)}
    contenders = {name: noted(name, make) for name, make in contenders.items()}
    rows = measure(Suite(TINY, 2, 32, contenders, steps=3, warm_up=1, rounds=2, device="cpu"))
    assert calls == [OURS, "nanoGPT", *(3 * [OURS] + 3 * ["nanoGPT"]) * 2]
    for row in rows:
        assert len(row["rounds"]) == 2
        assert row["tokens_per_second"] == pytest.approx(64 / row["seconds"])
        assert 5 < row["loss"] < 7
    assert "| nanoGPT |" in table(rows)


@pytest.mark.parametrize("name", [name for name in SUITES if name != "shakespeare-quality"])
def test_every_suite_is_there(name: str) -> None:
    if name.startswith("llama"):
        pytest.importorskip("transformers")
    suite = suite_of(name)
    assert next(iter(suite.contenders)) == OURS
    assert len(suite.contenders) >= 2


def test_quality_and_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedlm.data.files import TextFile

    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat; it purred.\n" * 500)
    monkeypatch.setattr("benchmarks.training_quality.sources_of", lambda name, file: [TextFile(file)])
    small = [
        "model.n_layers=1",
        "model.width=16",
        "model.n_heads=2",
        "model.context_length=16",
        "training.batch_size=2",
    ]
    real = training.quality.__globals__["make_config"]
    monkeypatch.setattr(
        "benchmarks.training_quality.make_config", lambda name, file, given: real(name, file, [*given, *small])
    )
    monkeypatch.setattr(training, "environment", lambda commit: {"gpu": "none"})
    training.main(["shakespeare-quality", "--seeds", "2", "--steps", "3", "--file", str(text), "--out", str(tmp_path)])
    found = json.loads((tmp_path / "training_shakespeare_quality.json").read_text())
    assert [(row["variant"], row["seed"]) for row in found["rows"]] == [
        (name, seed) for seed in (1337, 1338) for name in ("fusedlm", "nanoGPT")
    ]
    assert all(row["curve"][-1][0] == 3 for row in found["rows"])
