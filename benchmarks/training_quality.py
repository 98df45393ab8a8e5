"""Runs to the end, several seeds: validation losses of ours and of nanoGPT under one evaluation, of fixed rows.

shakespeare-quality: the first 90 % of tinyshakespeare trains, the whole last 10 % evaluates every 250 steps.
gpt2-quality: GPT-2 124M for 2,000 steps on a prepared dataset, whose split val, held-out documents, evaluates.

Every run is a process of its own, on a GPU of its own, and leaves its curve in a file when it is done. A round that is
cut off loses what was under way; the same command goes on with what is missing or was made of something else.
`python -m benchmarks.training_quality SUITE CONTENDER SEED --data FOLDER --out FILE` is one run.
"""

import argparse
import csv
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.processes import Ended, Job, last_lines, run_jobs
from fusedlm.data.dataset import Dataset
from fusedlm.data.loader import Evaluation, Loader
from fusedlm.data.prefetch import Prefetch
from fusedlm.data.prepare import prepare
from fusedlm.data.sets import sources_of
from fusedlm.kernels import backend
from fusedlm.training.config import RunConfig, make_config, model_config
from fusedlm.training.metrics import Record
from fusedlm.training.run import train
from fusedlm.training.schedule import Schedule

Curve = list[tuple[int, float]]  # steps done, and a validation loss

FIRST_SEED = 1337
OURS, NANOGPT = "fusedlm", "nanoGPT"
TORCHS_OPS = "fusedlm, torch's ops"  # our trainer, every op by torch: what the kernels alone change


@dataclass(frozen=True)
class Quality:
    """preset, settings: of all runs. seeds: how many. seconds: about what a run of each contender takes on an H100, its
    start included. once: contenders that run with the first seed alone.
    """

    preset: str
    settings: tuple[str, ...]
    seeds: int
    seconds: Mapping[str, float]
    once: tuple[str, ...] = ()


QUALITY: Mapping[str, Quality] = MappingProxyType(
    {
        "shakespeare-quality": Quality(
            "shakespeare-char", (), 5, {OURS: 60, NANOGPT: 110, TORCHS_OPS: 150}, once=(TORCHS_OPS,)
        ),
        "gpt2-quality": Quality(
            "gpt2",
            (
                "model.vocab_size=50304",  # whatever the tokenizer
                *("training.steps=2000", "training.batch_size=32", "training.micro_batches=1", "training.warmup=200"),
                *("evaluation.interval=100", "evaluation.batches=32"),
            ),
            3,
            {OURS: 190, NANOGPT: 250},
        ),
    }
)


@dataclass(frozen=True)
class Run:
    """One curve."""

    suite: str
    contender: str
    seed: int

    @property
    def name(self) -> str:
        """Of its files, without a suffix."""
        return f"{re.sub('[^a-z]+', '-', self.contender.lower())}-{self.seed}"

    def config(self, data: Path, overrides: Sequence[str]) -> RunConfig:
        """The configuration, whoever trains. Raises ValueError for overrides that do not fit."""
        quality = QUALITY[self.suite]
        settings = [*quality.settings, "evaluation.sample_tokens=0", "checkpoints.interval=0", *overrides]
        settings += [f"training.seed={self.seed}", *(["training.graph=false"] if self.contender == TORCHS_OPS else [])]
        return make_config(quality.preset, None, settings, data={"sources": [str(data)]})

    def decided_by(self, data: Path, overrides: Sequence[str]) -> dict[str, Any]:
        """All that its curve depends on, the code aside; JSON."""
        config = self.config(data, overrides).model_dump(mode="json", include={"model", "training", "evaluation"})
        return {"suite": self.suite, "variant": self.contender, "dataset": Dataset(data).fingerprint, **config}


def runs_of(suite: str, seeds: int | None = None, only: str | None = None) -> list[Run]:
    """The runs of a suite. seeds: how many, by default the suite's. only: of one contender.

    Raises ValueError for one that there is not.
    """
    quality = QUALITY[suite]
    if only not in (None, *quality.seconds):
        raise ValueError(f"there is no contender {only!r} in {suite}; expected one of {', '.join(quality.seconds)}")
    return [
        Run(suite, name, seed)
        for seed in range(FIRST_SEED, FIRST_SEED + (seeds or quality.seeds))
        for name in quality.seconds
        if only in (None, name) and (seed == FIRST_SEED or name not in quality.once)
    ]


@contextmanager
def dataset_of(suite: str, file: Path | None, data: Path | None) -> Iterator[Path]:
    """The folder of a suite's dataset. file: tinyshakespeare, where it is not to be downloaded. data: the dataset of
    gpt2-quality. Raises ValueError where there is none."""
    if suite == "gpt2-quality":
        if data is None:
            raise ValueError("there is no --data; expected a dataset's folder: `fusedlm data prepare python-packages`")
        yield data.resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "data"
        prepare(sources_of("tinyshakespeare", file=file), prepared, "characters", val_fraction=0.1)
        yield prepared


def run_round(
    suite: str,
    data: Path,
    folder: Path,
    write: Callable[[dict[str, Any]], None],
    *,
    gpus: Sequence[str],
    seeds: int | None = None,
    only: str | None = None,
    overrides: Sequence[str] = (),
    commit: str | None = None,
) -> dict[str, Any]:
    """Do what is missing of a suite, on a dataset; returns its results.

    folder: where each run leaves its curve and what it printed. write: is given the results after every run, with the
    names of those that are missing. gpus: as `visible_gpus` names them. overrides: settings of the runs.
    """
    runs = runs_of(suite, seeds, only)
    wanted = {run: run.decided_by(data, overrides) for run in runs}
    found = {run: row for run in runs if (row := _finished(folder / f"{run.name}.json", wanted[run]))}
    jobs = {}
    for run in runs:
        if run not in found:
            command = [sys.executable, "-m", "benchmarks.training_quality", suite, run.contender, str(run.seed)]
            command += ["--data", str(data), "--out", str(folder.resolve() / f"{run.name}.json")]
            command += [f"--set={override}" for override in overrides] + ([f"--commit={commit}"] if commit else [])
            jobs[Job(run.name, tuple(command), QUALITY[suite].seconds[run.contender])] = run
    print(f"{suite}: {len(found)} of {len(runs)} runs are there; {len(jobs)} on {len(gpus) or 'no'} GPUs", flush=True)

    def results() -> dict[str, Any]:
        rows = [found[run] for run in runs if run in found]
        missing = [run.name for run in runs if run not in found]
        return {"suite": suite, "rows": rows, **({"missing": missing} if missing else {})}

    def ended(end: Ended) -> None:
        run = jobs[end.job]
        row = _finished(folder / f"{run.name}.json", wanted[run]) if end.status == 0 else None
        if row is None:
            print(f"{run.name} failed with status {end.status}:\n{last_lines(end.log)}", flush=True)
            return
        found[run] = row
        print(f"{run.name}: best {row['best']:.4f} in {end.seconds:.0f} s, {len(found)} of {len(runs)}", flush=True)
        write(results())

    run_jobs(list(jobs), gpus, folder, ended)
    return results()


def _finished(path: Path, decided_by: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row that a run has left, where it is the one that is wanted."""
    if not path.exists():
        return None
    left = json.loads(path.read_text(encoding="utf-8"))
    return left["row"] if left["decided_by"] == decided_by else None


class _Curve:
    """Validation losses of a run."""

    def __init__(self) -> None:
        self.curve: Curve = []

    def record(self, record: Record) -> None:
        if record.val_loss is not None:
            self.curve.append((record.step, record.val_loss))

    def __getattr__(self, name: str) -> Any:
        return lambda *given: None


def _ours(config: RunConfig, data: Path) -> Curve:
    heard = _Curve()
    with tempfile.TemporaryDirectory() as folder:
        result = train(config, Path(folder) / "run", observers=[heard])
    if result.interrupted:
        sys.exit(128 + result.interrupted)
    return heard.curve


def _by_torchs_ops(config: RunConfig, data: Path) -> Curve:
    with backend("torch"):
        return _ours(config, data)


def _nanogpt(config: RunConfig, data: Path) -> Curve:
    """Its own step and initialisation, on our batches, with our schedule, which is its own too."""
    from benchmarks.peers.nanogpt import NanoGPTStep

    training, dataset = config.training, Dataset(data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    described = model_config(config.model, dataset.vocab_size)
    dataset.check_vocabulary(described.vocab_size)
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


TRAINERS: Mapping[str, Callable[[RunConfig, Path], Curve]] = MappingProxyType(
    {OURS: _ours, NANOGPT: _nanogpt, TORCHS_OPS: _by_torchs_ops}
)


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


def same_seed(rows: Sequence[dict[str, Any]]) -> str:
    """How far our kernels' curve is from that of torch's ops with the same seed, beside how far seeds are apart; empty
    without such a pair. Medians over the evaluations: a curve's fast beginning would decide a maximum."""
    curves = {(row["variant"], row["seed"]): [loss for _, loss in row["curve"]] for row in rows}
    ours = [curve for (name, _), curve in curves.items() if name == OURS]
    pairs = [
        (curves[OURS, seed], curve)
        for (name, seed), curve in curves.items()
        if name == TORCHS_OPS and (OURS, seed) in curves
    ]
    if not pairs or len(ours) < 2:
        return ""
    apart = statistics.median(abs(a - b) for pair in pairs for a, b in zip(*pair, strict=True))
    seeds = statistics.median(max(losses) - min(losses) for losses in zip(*ours, strict=True))
    return (
        f"From one seed, our kernels' losses and those of torch's ops are {apart:.4f} apart in the median; the "
        f"{len(ours)} seeds of ours span {seeds:.4f}."
    )


def write_curves(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """As CSV: a line an evaluation, a column a run."""
    names = [f"{row['variant']} {row['seed']}" for row in rows]
    steps = sorted({step for row in rows for step, _ in row["curve"]})
    columns = [dict(map(tuple, row["curve"])) for row in rows]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", *names])
        writer.writerows([step, *(f"{c[step]:.5f}" if step in c else "" for c in columns)] for step in steps)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_quality", description="One run of a round.")
    parser.add_argument("suite", choices=QUALITY)
    parser.add_argument("contender", choices=TRAINERS)
    parser.add_argument("seed", type=int)
    parser.add_argument("--data", type=Path, required=True, help="the dataset's folder")
    parser.add_argument("--out", type=Path, required=True, help="the file to leave the curve in")
    parser.add_argument("--set", action="append", default=[], help="a setting of the run, as `fusedlm train` takes it")
    parser.add_argument("--commit")
    options = parser.parse_args(arguments)
    run, begin = Run(options.suite, options.contender, options.seed), time.perf_counter()
    curve = TRAINERS[run.contender](run.config(options.data, options.set), options.data)
    row = {
        "variant": run.contender,
        "seed": run.seed,
        "best": min(loss for _, loss in curve),
        "curve": curve,
        "seconds": time.perf_counter() - begin,
        "environment": environment(options.commit),
    }
    left = {"decided_by": run.decided_by(options.data, options.set), "row": row}
    partial = options.out.with_suffix(".partial")
    partial.write_text(json.dumps(left, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
