"""`python -m benchmarks training SUITE ...`: our training step beside a peer's, in turns, on the same tokens.

Steps are timed in rounds, the contenders one after the other; a figure is the median of the rounds. Memory is what a
contender adds at its peak, building and warming up included. Results go to training_SUITE.json.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import environment, head
from benchmarks.training_quality import gpt2_quality, quality_table, shakespeare_quality
from fusedlm.data.rows import Batch
from fusedlm.hardware import GPU, detect
from fusedlm.models import PRESETS, ModelConfig, build_model
from fusedlm.planner import compute_mfu, flops_per_token
from fusedlm.training.config import TrainingConfig, make_config, model_config
from fusedlm.training.optimizer import Optimizer
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


def ours(config: ModelConfig, **settings: Any) -> Maker:
    """Our step, as the trainer makes it."""

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

        ranks = Ranks(0, 1, device)
        optimizer = Optimizer(model, training, pure=precision == "bf16-pure")
        step: Any = Step(forward, optimizer, training, ranks)
        if device.type == "cuda" and training.graph:
            step = CapturedStep(step)
        done = 0

        def call(ids: Tensor, targets: Tensor) -> Tensor:
            nonlocal done
            seed_step(training.seed, done, ranks)
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
QUALITY = {"shakespeare-quality": shakespeare_quality, "gpt2-quality": gpt2_quality}
SUITES = (*TIMED, *QUALITY)


def measure(suite: Suite, *, only: str | None = None) -> list[dict[str, Any]]:
    """A row for each contender: seconds a step, tokens a second, MFU, GiB, the loss after the same steps."""
    device = torch.device(suite.device)
    cuda = device.type == "cuda"
    generator = torch.Generator().manual_seed(1)
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


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks training", description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--only", help="one contender alone")
    parser.add_argument("--rounds", type=int, help="of each contender")
    parser.add_argument("--seeds", type=int, default=5, help="of quality")
    parser.add_argument("--steps", type=int, help="of quality: fewer, to try it out")
    parser.add_argument(
        "--file", type=Path, help="tinyshakespeare, where it is not to be downloaded; of gpt2-quality, a dataset"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the JSON")
    parser.add_argument("--commit", default=head(), help="of the code that runs, where it is not a git checkout")
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    results: dict[str, Any]
    if options.suite in QUALITY:
        found = QUALITY[options.suite](options.seeds, options.file, only=options.only, steps=options.steps)
        results, text = {"suite": options.suite, **found}, quality_table(found["rows"])
    else:
        suite = suite_of(options.suite)
        if suite.device == "cuda" and not torch.cuda.is_available():
            parser.error("there is no GPU here")
        suite = suite if options.rounds is None else changed(suite, rounds=options.rounds)
        stream = torch.cuda.stream(torch.cuda.Stream()) if suite.device == "cuda" else None
        if stream is not None:  # a graph cannot be captured on the default one
            stream.__enter__()
        rows = measure(suite, only=options.only)
        facts = {"batch": suite.batch, "context": suite.context, "precision": suite.precision}
        results, text = {"suite": options.suite, **facts, "rows": rows}, table(rows)
    results["environment"] = environment(options.commit) if torch.cuda.is_available() else _cpu(options.commit)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"training_{options.suite.replace('-', '_')}.json").write_text(json.dumps(results, indent=1) + "\n")
    print(text)
    print(f"all: {time.perf_counter() - begin:.1f} s")


def _cpu(commit: str | None) -> dict[str, Any]:
    import platform

    return {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }
