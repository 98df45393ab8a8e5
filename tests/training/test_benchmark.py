"""The benchmark of training without a GPU: its peer, what it measures, and what it writes."""

import json
import math
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the benchmarks need Triton")

from benchmarks import training
from benchmarks.peers.nanogpt import NanoGPT, NanoGPTStep
from benchmarks.processes import Ended, Job, run_jobs
from benchmarks.training import OURS, TIMED, Suite, measure, nanogpt, ours, suite_of, table
from benchmarks.training_parallel import compare, parallel_table
from benchmarks.training_quality import TORCHS_OPS, runs_of
from benchmarks.training_report import BLOCKS, curves_figure
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


SMALL = [
    *("model.n_layers=1", "model.width=16", "model.n_heads=2", "model.n_kv_heads=2", "model.context_length=16"),
    *("training.batch_size=2", "training.steps=3", "evaluation.interval=2", "evaluation.batches=2"),
]


def test_a_round_goes_on_with_what_is_missing(
    dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*more: str) -> dict[str, Any]:
        overrides = [f"--set={setting}" for setting in SMALL]
        training.main(["gpt2-quality", "--data", str(dataset_folder), "--out", str(tmp_path), *overrides, *more])
        return json.loads((tmp_path / "training_gpt2_quality.json").read_text())

    found = command("--seeds", "1")
    assert [(row["variant"], row["seed"]) for row in found["rows"]] == [("fusedlm", 1337), ("nanoGPT", 1337)]
    for row in found["rows"]:
        assert [step for step, _ in row["curve"]] == [2, 3]
        assert row["best"] == min(loss for _, loss in row["curve"])
        assert row["best"] == pytest.approx(math.log(50304), abs=0.5)  # the head has all of GPT-2's ids
    lines = (tmp_path / "training_gpt2_quality.csv").read_text().splitlines()
    assert lines[0] == "step,fusedlm 1337,nanoGPT 1337"
    assert [line.split(",")[0] for line in lines[1:]] == ["2", "3"]

    (tmp_path / "gpt2-quality" / "nanogpt-1337.json").unlink()
    before = (tmp_path / "gpt2-quality" / "fusedlm-1337.json").stat().st_mtime_ns
    capsys.readouterr()
    again = command("--seeds", "1")
    assert "1 of 2 runs are there; 1 on " in capsys.readouterr().out
    assert (tmp_path / "gpt2-quality" / "fusedlm-1337.json").stat().st_mtime_ns == before
    assert again["rows"][1]["curve"] == found["rows"][1]["curve"]


def test_what_a_round_does_again(dataset_folder: Path, tmp_path: Path) -> None:
    """A curve of other settings, or of other data, is no curve of this round."""
    (run, *_) = runs_of("gpt2-quality", 1)
    wanted = run.decided_by(dataset_folder, SMALL)
    assert run.decided_by(dataset_folder, [*SMALL, "training.lr=1e-4"]) != wanted
    assert json.loads(json.dumps(wanted)) == wanted
    names = [run.name for run in runs_of("shakespeare-quality")]
    assert len(names) == len(set(names)) == 5 + 5 + 1
    assert "fusedlm-torch-s-ops-1337" in names
    with pytest.raises(ValueError, match=r"no contender 'nano' in gpt2-quality; expected one of fusedlm, nanoGPT"):
        runs_of("gpt2-quality", 3, "nano")


@pytest.mark.slow
def test_a_round_that_fails_says_so_and_keeps_the_rest(dataset_folder: Path, tmp_path: Path) -> None:
    """nanoGPT's heads must divide its width, and ours are told how wide they are."""
    arguments = ["gpt2-quality", "--data", str(dataset_folder), "--out", str(tmp_path), "--seeds", "1"]
    overrides = [
        f"--set={setting}" for setting in [*SMALL, "model.n_heads=3", "model.n_kv_heads=3", "model.head_dim=8"]
    ]
    with pytest.raises(SystemExit, match=r"nanogpt-1337 are missing: see .*, and run again for them alone"):
        training.main([*arguments, *overrides])
    found = json.loads((tmp_path / "training_gpt2_quality.json").read_text())
    assert [row["variant"] for row in found["rows"]] == ["fusedlm"]
    assert found["missing"] == ["nanogpt-1337"]


def test_jobs_are_spread_over_gpus(tmp_path: Path) -> None:
    """Each GPU has one at a time, the longest come first, and how each ends is told."""
    code = "import os, sys, time; print(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(1); sys.exit(int(sys.argv[1]))"
    jobs = [Job(f"job{i}", (sys.executable, "-c", code, str(i)), seconds=i) for i in range(5)]
    ends: list[Ended] = []
    run_jobs(jobs, ["5", "7"], tmp_path, ends.append)
    assert {end.job.name: end.status for end in ends} == {f"job{i}": i for i in range(5)}
    assert {end.job.name for end in ends[:2]} == {"job4", "job3"}
    assert {end.log.read_text().strip() for end in ends[:2]} == {"5", "7"}


def test_jobs_end_with_who_began_them(tmp_path: Path) -> None:
    """A round that is told to end takes its processes along."""
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 1.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_jobs([Job("sleeper", (sys.executable, "-c", code))], [], tmp_path, lambda end: None)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU they would be measured")
def test_several_suites(tmp_path: Path) -> None:
    """Each in a process of its own; one that fails does not keep the others from running."""
    with pytest.raises(SystemExit, match=r"^gpt2, llama-1b-fsdp failed$"):
        training.main(["gpt2", "llama-1b-fsdp", "--out", str(tmp_path)])
    for name in ("gpt2", "llama-1b-fsdp"):
        assert "GPU" in (tmp_path / "logs" / f"{name}.log").read_text().splitlines()[-1]


def test_one_gpu_beside_two() -> None:
    """By gloo. More processes do more tokens in a step; the loss of the first rank's rows is hardly another."""
    found = compare("llama-1b-fsdp", device="cpu", rounds=1, shape=("tiny-llama", 2, 32))
    assert [row["gpus"] for row in found["rows"]] == [1, 1, 2, 2, 2, 2, 2]
    for row in found["rows"]:
        assert row["tokens_per_second"] == pytest.approx(2 * 32 * row["gpus"] / row["seconds"])
    one, _, *two = (row["loss"] for row in found["rows"])
    assert two == pytest.approx([one] * 5, abs=0.3)
    assert "| FSDP2, kept | 2 |" in parallel_table(found["rows"])


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
    assert said == "Training steps: GPT-2 124M, 32 x 1024, a GPU: 1.50x nanoGPT's speed in 0.50 of its memory."
    table = BLOCKS["training steps"](MEASURED)
    assert "| **GPT-2 124M, 32 x 1024** | 655,360 | 50.0 | 800% | 10.0 |  |" in table
    assert "| nanoGPT | 436,907 | 75.0 | 533% | 20.0 | 1.50x |" in table
    assert "| nanoGPT | 59,578 | 550.0 |  |  | 1.10x |" in table
    assert "GPT-2 124M: a GPU, torch 2.11, 2026-01-01." in table
    assert "shakespeare-char on a CPU: a CPU, 2 threads, torch 2.13, 2026-01-02." in table
    assert BLOCKS["training steps"]({"gpt2": MEASURED["gpt2"]}).endswith("\na GPU, torch 2.11, 2026-01-01.")
    quality = BLOCKS["training shakespeare-quality"](MEASURED)
    assert "| fusedlm | 2 | 1.4750 | 1.4800 | 0.0071 |" in quality
    assert "From one seed" not in quality
    for axes, want in zip(
        curves_figure(MEASURED["shakespeare-quality"]["rows"], "title").axes, ([2.0, 1.475], [0.0, -0.01]), strict=True
    ):
        assert len(axes.lines) == 2 * (2 + 1)
        means = [line for line in axes.lines if not line.get_label().startswith("_")]
        assert [line.get_label() for line in means] == ["fusedlm, mean of 2", "nanoGPT, mean of 2"]
        assert list(means[0].get_ydata()) == pytest.approx(want)


def test_a_round_that_is_not_whole_says_so() -> None:
    results = MEASURED["shakespeare-quality"]
    pair = {"variant": TORCHS_OPS, "seed": 1, "best": 1.475, "curve": [[250, 2.004], [500, 1.475]]}
    part = {**results, "rows": [*results["rows"], pair], "missing": ["nanogpt-3"]}
    said = BLOCKS["training shakespeare-quality"]({"shakespeare-quality": part})
    assert "Not all runs are done; missing: nanogpt-3." in said
    # |2 - 2.004| and |1.47 - 1.475|; the seeds span 0 and 0.01
    assert "are 0.0045 apart in the median; the 2 seeds of ours span 0.0050." in said
    names = [line.get_label() for line in curves_figure(part["rows"], "title").axes[0].lines]
    assert f"{TORCHS_OPS}, one seed" in names
