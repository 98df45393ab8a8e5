"""`python -m benchmarks training SUITE ...`: our training step beside a peer's, in turns, on the same tokens.

Steps are timed in rounds, the contenders one after the other; a figure is the median of the rounds. Memory is what a
contender adds at its peak, building and warming up included. Results go to training_SUITE.json.
Of several suites each is a process of its own. Those that are timed take turns on one GPU, or each has one (--gpus);
then come curves of several seeds (training_quality.py) and one model on two GPUs (training_parallel.py).
"""

import argparse
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import environment, head
from benchmarks.processes import Ended, Job, run_jobs, visible_gpus
from benchmarks.training_quality import (
    QUALITY,
    dataset_of,
    quality_table,
    run_round,
    same_seed,
    write_curves,
)
from fusedlm.data.rows import Batch
from fusedlm.hardware import GPU, detect
from fusedlm.models import PRESETS, ModelConfig, build_model
from fusedlm.planner import compute_mfu, flops_per_token
from fusedlm.training.config import ParallelConfig, TrainingConfig, make_config, model_config
from fusedlm.training.optimizer import Optimizer
from fusedlm.training.parallel import shard
from fusedlm.training.randomness import seed_step
from fusedlm.training.ranks import Ranks
from fusedlm.training.recompute import RecomputeCheap, recompute_blocks
from fusedlm.training.run import DTYPES
from fusedlm.training.step import CapturedStep, Step, forward_of

StepFunction = Callable[[Tensor, Tensor], Tensor]  # ids and targets, (B, T), to the loss
Maker = Callable[[torch.device], StepFunction]

OURS = "fusedlm"


@dataclass(frozen=True)
class Suite:
    """What is timed. steps: of a round. contenders: by name; the first is ours."""

    config: ModelConfig
    batch: int
    context: int
    contenders: Mapping[str, Maker]
    steps: int = 10
    warm_up: int = 4
    rounds: int = 5
    device: str = "cuda"
    precision: str = "bf16"


def ours(
    config: ModelConfig, *, ranks: Ranks | None = None, parallel: ParallelConfig | None = None, **settings: Any
) -> Maker:
    """Our step, as the trainer makes it. ranks: of several processes this one, by default alone."""

    def make(device: torch.device) -> StepFunction:
        training = TrainingConfig(**settings)
        precision = training.precision or "fp32"
        model = build_model(config, dropout=training.dropout, device=device, dtype=DTYPES[precision])
        model.init_weights(torch.Generator(device).manual_seed(1))
        if training.recompute == "blocks":
            recompute_blocks(model)
        cheap = RecomputeCheap(model) if training.recompute == "cheap" else None
        plain = forward_of(model, training)

        def forward(batch: Batch) -> Tensor:
            if cheap is None:
                return plain(batch)
            with cheap:
                return plain(batch)

        here = ranks or Ranks(0, 1, device)
        shard(model, parallel or ParallelConfig(), here)
        optimizer = Optimizer(model, training, pure=precision == "bf16-pure")
        step: Any = Step(forward, optimizer, training, here)
        if device.type == "cuda" and training.graph and here.size == 1:
            step = CapturedStep(step)
        done = 0

        def call(ids: Tensor, targets: Tensor) -> Tensor:
            nonlocal done
            seed_step(training.seed, done, here)
            optimizer.schedule(1.0)
            done += 1
            return step([Batch(ids, targets)])[0]

        return call

    return make


def nanogpt(config: ModelConfig, **options: Any) -> Maker:
    from benchmarks.peers.nanogpt import NanoGPTStep

    return lambda device: NanoGPTStep(config, device, **options)


def liger(config: Any) -> Maker:
    from benchmarks.peers.liger_llama import LigerLlamaStep

    return lambda device: LigerLlamaStep(config, device)


def suite_of(name: str) -> Suite:
    """A suite by its name. Raises ValueError for one that there is not."""
    adam: dict[str, Any] = {"lr": 6e-4, "betas": (0.9, 0.95), "precision": "bf16"}
    if name == "gpt2":
        config = changed(PRESETS["gpt2"], vocab_size=50304)
        return Suite(
            config,
            32,
            1024,
            {
                OURS: ours(config, **adam),
                "fusedlm, cheap": ours(config, **adam, recompute="cheap"),
                "nanoGPT": nanogpt(config),
            },
        )
    if name in ("llama-1b", "llama-1b-masters"):
        config = PRESETS["llama-3.2-1b"]
        precision = "bf16" if name.endswith("masters") else "bf16-pure"
        settings = {**adam, "lr": 3e-4, "precision": precision}
        return Suite(config, 4, 4096, {OURS: ours(config, **settings), "Liger": liger(config)}, steps=4, warm_up=3)
    chars = make_config("shakespeare-char")
    config = model_config(chars.model, 65)
    training: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "dropout": 0.2}
    if name == "shakespeare":
        contenders = {OURS: ours(config, **training, precision="bf16"), "nanoGPT": nanogpt(config, **training)}
        return Suite(config, 64, 256, contenders, steps=100, warm_up=10)
    if name == "shakespeare-cpu":
        return Suite(
            config,
            4,
            256,
            {
                OURS: ours(config, **training, precision="fp32"),
                "nanoGPT, eager": nanogpt(config, **training, compiled=False),
                "nanoGPT": nanogpt(config, **training),
            },
            steps=2,
            warm_up=2,
            rounds=7,
            device="cpu",
            precision="fp32",
        )
    raise ValueError(f"there is no suite {name!r}; expected one of {', '.join(TIMED)}")


TIMED = ("gpt2", "llama-1b", "llama-1b-masters", "shakespeare", "shakespeare-cpu")


def measure(suite: Suite, *, only: str | None = None, seed: int = 1) -> list[dict[str, Any]]:
    """A row for each contender: seconds a step, tokens a second, MFU, GiB, the loss after the same steps.

    only: one contender. seed: of the tokens.
    """
    device = torch.device(suite.device)
    cuda = device.type == "cuda"
    generator = torch.Generator().manual_seed(seed)
    sets = 8
    ids = torch.randint(suite.config.vocab_size, (sets, suite.batch, suite.context + 1), generator=generator)
    tokens, targets = ids[..., :-1].to(device), ids[..., 1:].contiguous().to(device)

    steps: dict[str, StepFunction] = {}
    peaks: dict[str, int] = {}
    took: dict[str, float] = {}
    names = [name for name in suite.contenders if only is None or name == only]
    for name in names:
        begin, before = time.perf_counter(), _allocated(cuda)
        step = suite.contenders[name](device)
        for i in range(suite.warm_up):
            step(tokens[i % sets], targets[i % sets])
        _wait(cuda)
        steps[name], took[name] = step, time.perf_counter() - begin
        peaks[name] = torch.cuda.max_memory_allocated() - before if cuda else 0
        print(f"{name}: ready after {took[name]:.1f} s", flush=True)

    seconds: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, float] = {}
    for _ in range(suite.rounds):
        for name, step in steps.items():
            _wait(cuda)
            begin = time.perf_counter()
            for i in range(suite.steps):
                loss = step(tokens[i % sets], targets[i % sets])
            _wait(cuda)
            seconds[name].append((time.perf_counter() - begin) / suite.steps)
            losses[name] = float(loss)
    gpu, size = detect() if cuda else None, suite.batch * suite.context
    flops = flops_per_token(suite.config, suite.context).total * size
    rows = []
    for name in names:
        median = statistics.median(seconds[name])
        rows.append(
            {
                "variant": name,
                "seconds": median,
                "rounds": seconds[name],
                "tokens_per_second": size / median,
                "mfu": _mfu(flops, median, gpu),
                "peak_bytes": peaks[name],
                "loss": losses[name],
                "ready_seconds": took[name],
            }
        )
    return rows


def _allocated(cuda: bool) -> int:
    if not cuda:
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def _mfu(flops: float, seconds: float, gpu: GPU | None) -> float | None:
    return compute_mfu(flops, seconds, gpu=gpu, dtype="bf16") if gpu is not None and "bf16" in gpu.flops else None


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown, the others against ours."""
    lines = ["| | ms a step | tokens/s | MFU | peak GiB | against ours |", "|---|---:|---:|---:|---:|---:|"]
    first = rows[0]["seconds"]
    for row in rows:
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        lines.append(
            f"| {row['variant']} | {row['seconds'] * 1e3:.2f} | {row['tokens_per_second']:,.0f} | {mfu} | "
            f"{row['peak_bytes'] / 2**30:.2f} | {row['seconds'] / first:.2f} |"
        )
    return "\n".join(lines)


def write_results(results: dict[str, Any], folder: Path) -> Path:
    """Results of a suite as training_SUITE.json, whole or not at all; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"training_{results['suite'].replace('-', '_')}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def _timed(options: argparse.Namespace, name: str) -> None:
    suite = suite_of(name)
    if suite.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no GPU here")
    suite = suite if options.rounds is None else changed(suite, rounds=options.rounds)
    # A graph cannot be captured on the default stream.
    with torch.cuda.stream(torch.cuda.Stream()) if suite.device == "cuda" else nullcontext():
        rows = measure(suite, only=options.only)
    facts = {"batch": suite.batch, "context": suite.context, "precision": suite.precision}
    write_results({"suite": name, **facts, "rows": rows, "environment": environment(options.commit)}, options.out)
    print(table(rows))


def _quality(options: argparse.Namespace, name: str) -> None:
    def write(results: dict[str, Any]) -> None:
        path = write_results({**results, "environment": results["rows"][0]["environment"]}, options.out)
        write_curves(results["rows"], path.with_suffix(".csv"))

    folder = options.out / name
    choices = {"seeds": options.seeds, "only": options.only, "overrides": options.set, "commit": options.commit}
    with dataset_of(name, options.file, options.data) as data:
        results = run_round(name, data, folder, write, gpus=visible_gpus()[: options.gpus], **choices)
    if results["rows"]:
        write(results)
        print(quality_table(results["rows"]), same_seed(results["rows"]), sep="\n")
    if "missing" in results:
        raise ValueError(f"{', '.join(results['missing'])} are missing: see {folder}, and run again for them alone")


def _parallel(options: argparse.Namespace, name: str) -> None:
    from benchmarks.training_parallel import compare, parallel_table  # which takes its steps from here

    results = compare(name, device="cuda", gpus=options.gpus or 2, rounds=options.rounds)
    write_results({**results, "environment": environment(options.commit)}, options.out)
    print(parallel_table(results["rows"]))


COMMANDS: Mapping[str, Callable[[argparse.Namespace, str], None]] = {
    **dict.fromkeys(TIMED, _timed),
    **dict.fromkeys(QUALITY, _quality),
    "llama-1b-fsdp": _parallel,
}


def _several(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    gpus = visible_gpus()[: options.gpus]
    failed: list[str] = []

    def ended(end: Ended) -> None:
        print(f"\n{end.job.name}, {end.seconds:.0f} s\n{end.log.read_text(encoding='utf-8')}", flush=True)
        if end.status:
            failed.append(end.job.name)

    rest = [argument for argument in arguments if argument not in options.suites]
    command = (sys.executable, "-m", "benchmarks", "training")
    jobs = [Job(name, (*command, name, *rest)) for name in options.suites]
    logs, patience = options.out / "logs", 30.0  # more than they have with processes of their own
    timed, others = ([job for job in jobs if (job.name in TIMED) == kind] for kind in (True, False))
    run_jobs(timed, gpus if options.gpus else gpus[:1], logs, ended, patience=patience)
    run_jobs(others, [",".join(gpus)] if gpus else [], logs, ended, patience=patience)
    if failed:
        raise ValueError(f"{', '.join(failed)} failed")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks training", description=__doc__)
    parser.add_argument("suites", nargs="+", choices=COMMANDS, metavar="SUITE", help=", ".join(COMMANDS))
    parser.add_argument("--only", help="one contender alone")
    parser.add_argument("--rounds", type=int, help="of each contender")
    parser.add_argument("--gpus", type=int, help="how many to use; by default all, of what is timed one, of FSDP two")
    parser.add_argument("--seeds", type=int, help="of quality; by default 5 of shakespeare, 3 of gpt2")
    parser.add_argument("--set", action="append", default=[], help="of quality: a setting, as `fusedlm train` takes it")
    parser.add_argument("--file", type=Path, help="tinyshakespeare, where it is not to be downloaded")
    parser.add_argument("--data", type=Path, help="the dataset of gpt2-quality")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the JSON")
    parser.add_argument("--commit", default=head(), help="of the code that runs, where it is not a git checkout")
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    # What was begun for this command must not go on after it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        if len(options.suites) > 1:
            _several(options, arguments)
        else:
            COMMANDS[options.suites[0]](options, options.suites[0])
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print(f"all: {time.perf_counter() - begin:.1f} s")
