"""shakespeare-char to the end, several seeds: the best validation loss of ours and of nanoGPT under one evaluation.

The first 90 % of tinyshakespeare trains; the whole last 10 % evaluates, in fixed rows, every 250 steps.
"""

import math
import statistics
import tempfile
import time
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

Curve = list[tuple[int, float]]


def quality(seeds: int, file: Path | None, *, only: str | None = None, steps: int | None = None) -> dict[str, Any]:
    """Curves of every seed, the mean of their best losses, and a table."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare(sources_of("tinyshakespeare", file=file), data, "characters", val_fraction=0.1)
        overrides = [f"data.sources=['{data}']", "evaluation.sample_tokens=0", "checkpoints.interval=0"]
        overrides += [f"training.steps={steps}"] if steps else []
        for seed in range(1337, 1337 + seeds):
            config = make_config("shakespeare-char", None, [*overrides, f"training.seed={seed}"])
            for name in ("fusedlm", "nanoGPT"):
                if only in (None, name):
                    begin = time.perf_counter()
                    curve = _ours(config, Path(folder) / f"run-{seed}") if name == "fusedlm" else _nanogpt(config, data)
                    best = min(loss for _, loss in curve)
                    took = time.perf_counter() - begin
                    rows.append({"variant": name, "seed": seed, "best": best, "curve": curve, "seconds": took})
                    print(f"{name}, seed {seed}: best {best:.4f} in {took:.0f} s", flush=True)
    return {"suite": "shakespeare-quality", "rows": rows, "table": _table(rows)}


class _Curve:
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
    step = NanoGPTStep(
        described,
        device,
        dropout=training.dropout,
        lr=training.lr,
        betas=training.betas,
        compiled=device.type == "cuda",
    )
    schedule, context = Schedule.of(training), described.context_length
    loader = Loader(dataset, batch_size=training.batch_size, context=context, seed=training.seed)
    rows = Evaluation(dataset, batch_size=training.batch_size, context=context)
    curve: Curve = []
    with Prefetch(loader.batches(0, training.steps), device) as batches:
        for done, batch in enumerate(batches, 1):
            for group in step.optimizer.param_groups:
                group["lr"] = training.lr * schedule(done - 1)
            step(batch.tokens, batch.targets)
            if done % config.evaluation.interval == 0 or done == training.steps:
                total, count = torch.zeros((), dtype=torch.float64, device=device), 0
                for part in rows:
                    n = int((part.targets != -100).sum())
                    if n:
                        there = part.to(device)
                        total += step.loss(there.tokens, there.targets).double() * n
                        count += n
                curve.append((done, float(total) / count))
    return curve


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | seeds | mean best | worst | deviation |", "|---|---:|---:|---:|---:|"]
    for name in dict.fromkeys(row["variant"] for row in rows):
        best = [row["best"] for row in rows if row["variant"] == name]
        deviation = statistics.stdev(best) if len(best) > 1 else math.nan
        lines.append(f"| {name} | {len(best)} | {statistics.mean(best):.4f} | {max(best):.4f} | {deviation:.4f} |")
    return "\n".join(lines)
