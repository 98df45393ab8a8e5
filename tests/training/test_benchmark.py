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
from benchmarks.training import OURS, TIMED, Suite, measure, nanogpt, ours, suite_of, table
from benchmarks.training_report import BLOCKS, curves_figure
from fusedlm.models import PRESETS, build_model
from fusedlm.training.config import make_config

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
    logits, loss = theirs(ids[:, :-1], ids[:, 1:])
    assert loss.item() == pytest.approx(model.loss(ids[:, :-1], ids[:, 1:]).item(), abs=1e-4)
    torch.testing.assert_close(logits, model(ids[:, :-1]), atol=2e-3, rtol=0)


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


@pytest.mark.parametrize("name", TIMED)
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
    real = make_config
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


def row(variant: str, seconds: float, peak: float) -> dict[str, Any]:
    speed = {"tokens_per_second": 32768 / seconds, "mfu": 0.4 / seconds if peak else None}
    return {"variant": variant, "seconds": seconds, "peak_bytes": int(peak * 2**30), **speed}


GPU = {"gpu": "a GPU", "torch": "2.11", "date": "2026-01-01"}
MEASURED: dict[str, Any] = {
    "gpt2": {
        "rows": [row(OURS, 0.05, 10), row("fusedlm, cheap", 0.06, 8), row("nanoGPT", 0.075, 20)],
        "environment": GPU,
    },
    "shakespeare-cpu": {
        "rows": [row(OURS, 0.5, 0), row("nanoGPT", 0.55, 0)],
        "environment": {"cpu": "a CPU", "threads": 2, "torch": "2.13", "date": "2026-01-02"},
    },
    "shakespeare-quality": {
        "rows": [
            {"variant": name, "seed": seed, "best": best, "curve": [[250, 2.0], [500, best]]}
            for seed in (1, 2)
            for name, best in ((OURS, 1.46 + seed / 100), ("nanoGPT", 1.47 + seed / 100))
        ],
        "environment": GPU,
    },
}


def test_the_report() -> None:
    said = BLOCKS["training"](MEASURED)
    assert said == "Training steps: GPT-2 124M, 32 x 1024: 1.50x nanoGPT's speed in 0.50 of its memory."
    table = BLOCKS["training steps"](MEASURED)
    assert "| **GPT-2 124M, 32 x 1024** | 655,360 | 50.0 | 800% | 10.0 |  |" in table
    assert "| nanoGPT | 436,907 | 75.0 | 533% | 20.0 | 1.50x |" in table
    assert "| nanoGPT | 59,578 | 550.0 |  |  | 1.10x |" in table
    assert "a CPU, 2 threads, torch 2.13, 2026-01-02." in table
    quality = BLOCKS["training shakespeare-quality"](MEASURED)
    assert "| fusedlm | 2 | 1.4750 | 1.4800 | 0.0071 |" in quality
    axes = curves_figure(MEASURED["shakespeare-quality"]["rows"], "title").axes[0]
    means = [line for line in axes.lines if not line.get_label().startswith("_")]
    assert [line.get_label() for line in means] == ["fusedlm, mean of 2", "nanoGPT, mean of 2"]
    assert list(means[0].get_ydata()) == pytest.approx([2.0, 1.475])
