"""One model on several GPUs by FSDP2, the same batch a GPU, beside one GPU.

`python -m benchmarks.training_parallel MODEL BATCH CONTEXT --out FILE`, alone or under torchrun, measures what is for
so many processes; `compare` starts it both ways.
"""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.processes import Ended, Job, last_lines, run_jobs, visible_gpus
from benchmarks.training import Suite, measure, ours
from fusedlm.models import PRESETS
from fusedlm.training.config import ParallelConfig
from fusedlm.training.ranks import join_ranks


@dataclass(frozen=True)
class Contender:
    """several: for more than one GPU. parallel: settings of FSDP2. graph: a step is one CUDA graph."""

    name: str
    several: bool
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    graph: bool = True


def _sharded(again: bool, **settings: Any) -> ParallelConfig:
    return ParallelConfig(reshard_after_forward=again, **settings)


CONTENDERS = (
    Contender("one GPU", False),
    Contender("one GPU, without a graph", False, graph=False),
    Contender("FSDP2, gathered twice", True, _sharded(True)),
    Contender("FSDP2, kept", True, _sharded(False)),
    Contender("FSDP2, gathered twice, NCCL's kernels", True, _sharded(True, direct=False)),
    Contender("FSDP2, kept, NCCL's kernels", True, _sharded(False, direct=False)),
    Contender("FSDP2, kept, NCCL's kernels, sums in bf16", True, _sharded(False, direct=False, reduce_dtype="same")),
)

# By suite: a model, rows a GPU, tokens a row.
SHAPES: Mapping[str, tuple[str, int, int]] = MappingProxyType({"llama-1b-fsdp": ("llama-3.2-1b", 4, 4096)})


def compare(
    suite: str,
    *,
    device: str,
    gpus: int = 2,
    rounds: int | None = None,
    shape: tuple[str, int, int] | None = None,
) -> dict[str, Any]:
    """A row for each contender; the first is one GPU. shape: in place of the suite's own.

    Raises ValueError where there are not so many GPUs, or a process fails.
    """
    cuda, names = device == "cuda", visible_gpus()
    if gpus < 2 or (cuda and len(names) < gpus):
        raise ValueError(f"there are {len(names)} GPUs for {gpus} processes; expected two or more")
    model, batch, context = shape or SHAPES[suite]
    rows: list[dict[str, Any]] = []

    def ended(end: Ended) -> None:
        if end.status:
            raise ValueError(f"{end.job.name} ended with status {end.status}:\n{last_lines(end.log, 40)}")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        for number in (1, gpus):
            torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={number}", "-m"]
            command = [sys.executable, "-m", *(torchrun if number > 1 else []), "benchmarks.training_parallel"]
            command += [model, str(batch), str(context), "--device", device, "--out", str(path)]
            command += ["--rounds", str(rounds)] if rounds else []
            job = Job(f"processes-{number}", command)
            run_jobs([job], [",".join(names[:number])] if cuda else [], Path(folder), ended)
            rows += json.loads(path.read_text(encoding="utf-8"))
    return {"suite": suite, "model": model, "batch": batch, "context": context, "precision": "bf16", "rows": rows}


def parallel_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown, against one GPU."""
    lines = [
        "| | GPUs | tokens/s | against one | MFU | ms a step | peak GiB a GPU |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        against = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        lines.append(
            f"| {row['variant']} | {row['gpus']} | {row['tokens_per_second']:,.0f} | {against:.2f}x | {mfu} | "
            f"{row['seconds'] * 1e3:.1f} | {row['peak_bytes'] / 2**30:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_parallel", description=__doc__)
    parser.add_argument("model", choices=PRESETS)
    parser.add_argument("batch", type=int, help="rows a GPU")
    parser.add_argument("context", type=int, help="tokens a row")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="the file for the rows, which the first rank writes")
    options = parser.parse_args(arguments)
    config, rows = PRESETS[options.model], []
    settings: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "precision": "bf16"}
    with join_ranks(options.device) as ranks:
        cuda = ranks.device.type == "cuda"
        for contender in (c for c in CONTENDERS if c.several == (ranks.size > 1)):
            make = ours(config, ranks=ranks, parallel=contender.parallel, graph=contender.graph, **settings)
            shape: tuple[Any, ...] = (config, options.batch, options.context, {contender.name: make})
            suite = Suite(*shape, steps=8, warm_up=8, rounds=options.rounds, device=str(ranks.device))
            with torch.cuda.stream(torch.cuda.Stream()) if cuda else nullcontext():
                (row,) = measure(suite, seed=1 + ranks.rank)
            gc.collect()  # modules and their hooks hold each other, and the next contender's memory is measured
            row["gpus"] = ranks.size
            row["tokens_per_second"] *= ranks.size
            row["peak_bytes"] = max(ranks.gather(row["peak_bytes"]))
            rows.append(row)
        if ranks.first:
            options.out.write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
