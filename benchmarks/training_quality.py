"""Runs to the end, several seeds: validation losses of ours and of nanoGPT under one evaluation, of fixed rows.

shakespeare-quality: the first 90 % of tinyshakespeare trains, the whole last 10 % evaluates every 250 steps.
gpt2-quality: GPT-2 124M for 2,000 steps on a prepared dataset, whose split val evaluates.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fusedlm.data.dataset import Dataset
from fusedlm.data.loader import Evaluation, Loader
from fusedlm.data.prefetch import Prefetch
from fusedlm.data.prepare import prepare
from fusedlm.data.sets import sources_of
from fusedlm.training.config import RunConfig, make_config, model_config
from fusedlm.training.metrics import Record
from fusedlm.training.run import train
from fusedlm.training.schedule import Schedule

Curve = list[tuple[int, float]]  # steps done, and a validation loss

FIRST_SEED = 1337
GPT2 = (
    *("training.steps=2000", "training.batch_size=32", "training.micro_batches=1", "training.warmup=200"),
    *("evaluation.interval=250", "evaluation.batches=100"),
)


def shakespeare_quality(seeds: int, file: Path | None, **options: Any) -> dict[str, Any]:
    """nanoGPT's own set-up, whole. file: tinyshakespeare, where it is not to be downloaded. options: see `quality`."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare(sources_of("tinyshakespeare", file=file), data, "characters", val_fraction=0.1)
        return quality("shakespeare-char", (), data, seeds, **options)


def gpt2_quality(seeds: int, data: Path | None, **options: Any) -> dict[str, Any]:
    """data: the folder of a dataset of GPT-2's tokens. Raises ValueError without one."""
    if data is None:
        raise ValueError("there is no --file; expected the folder of a dataset prepared with GPT-2's tokenizer")
    return quality("gpt2", GPT2, data, seeds, **options)


def quality(
    preset: str,
    settings: Sequence[str],
    data: Path,
    seeds: int,
    *,
    only: str | None = None,
    steps: int | None = None,
) -> dict[str, Any]:
    """Curves of every seed. only: "fusedlm" or "nanoGPT" alone. steps: fewer, to try it out."""
    rows: list[dict[str, Any]] = []
    overrides = [*settings, f"data.sources=['{data}']", "evaluation.sample_tokens=0", "checkpoints.interval=0"]
    overrides += [f"training.steps={steps}"] if steps else []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            config = make_config(preset, None, [*overrides, f"training.seed={seed}"])
            for name in ("fusedlm", "nanoGPT"):
                if only not in (None, name):
                    continue
                begin = time.perf_counter()
                curve = _ours(config, Path(folder) / f"run-{seed}") if name == "fusedlm" else _nanogpt(config, data)
                took, best = time.perf_counter() - begin, min(loss for _, loss in curve)
                rows.append({"variant": name, "seed": seed, "best": best, "curve": curve, "seconds": took})
                print(f"{name}, seed {seed}: best {best:.4f} in {took:.0f} s", flush=True)
    return {"rows": rows}


class _Curve:
    """Validation losses of a run."""

    def __init__(self) -> None:
        self.curve: Curve = []

    def record(self, record: Record) -> None:
        if record.val_loss is not None:
            self.curve.append((record.step, record.val_loss))

    def __getattr__(self, name: str) -> Any:
        return lambda *given: None


def _ours(config: RunConfig, folder: Path) -> Curve:
    heard = _Curve()
    train(config, folder, observers=[heard])
    return heard.curve


def _nanogpt(config: RunConfig, data: Path) -> Curve:
    """Its own step and initialisation, on our batches, with our schedule, which is its own too."""
    from benchmarks.peers.nanogpt import NanoGPTStep

    training, dataset = config.training, Dataset(data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    described = model_config(config.model, dataset.vocab_size)
    torch.manual_seed(training.seed)
    options: dict[str, Any] = {"dropout": training.dropout, "lr": training.lr, "betas": training.betas}
    step = NanoGPTStep(described, device, **options, compiled=device.type == "cuda")
    schedule, context = Schedule.of(training), min(described.context_length, 1024)
    loader = Loader(dataset, batch_size=training.batch_size, context=context, seed=training.seed)
    rows = Evaluation(dataset, batch_size=training.batch_size, context=context)
    curve: Curve = []
    with Prefetch(loader.batches(0, training.steps), device) as batches:
        for done, batch in enumerate(batches, 1):
            for group in step.optimizer.param_groups:
                group["lr"] = training.lr * schedule(done - 1)
            step(batch.tokens, batch.targets)
            if done % config.evaluation.interval == 0 or done == training.steps:
                curve.append((done, _evaluated(step, rows, config.evaluation.batches, device)))
    return curve


def _evaluated(step: Any, rows: Evaluation, batches: int | None, device: torch.device) -> float:
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    for number, batch in enumerate(rows):
        if number == batches:
            break
        n = int((batch.targets != -100).sum())
        if n:
            there = batch.to(device)
            total += step.loss(there.tokens, there.targets).double() * n
            count += n
    return float(total) / count


def quality_table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown: the best losses of the seeds of each."""
    lines = ["| | seeds | mean of best losses | worst | deviation |", "|---|---:|---:|---:|---:|"]
    for name in dict.fromkeys(row["variant"] for row in rows):
        best = [row["best"] for row in rows if row["variant"] == name]
        deviation = f"{statistics.stdev(best):.4f}" if len(best) > 1 else ""
        mean = math.fsum(best) / len(best)
        lines.append(f"| {name} | {len(best)} | {mean:.4f} | {max(best):.4f} | {deviation} |")
    return "\n".join(lines)
