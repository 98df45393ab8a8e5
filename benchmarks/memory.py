"""`python -m benchmarks memory`: the memory of training steps that is measured, beside what `fusedlm plan` says.

Every set-up is trained for two steps; the second one counts, for the first one makes the optimizer's state.
"""

import argparse
import gc
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment, head
from fusedlm.hardware import GPU, detect
from fusedlm.kernels import AdamW
from fusedlm.models import PRESETS, build_model
from fusedlm.planner import Training, training_memory
from fusedlm.training.recompute import RecomputeCheap, recompute_blocks

FARTHEST = 0.05  # of the measured peak, that a plan may be off
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DROPOUT = 0.1
SETUPS: list[dict[str, Any]] = [
    {"preset": "gpt2", "batch": 32, "context": 1024},
    {"preset": "gpt2", "batch": 32, "context": 1024, "dropout": True},
    {"preset": "gpt2", "batch": 8, "context": 1024, "dtype": "fp32"},
    {"preset": "gpt2", "batch": 8, "context": 1024, "dtype": "tf32"},
    {"preset": "gpt2", "batch": 16, "context": 512, "dtype": "fp16"},
    {"preset": "gpt2", "batch": 16, "context": 1024, "masters": False, "state_dtype": "bf16"},
    {"preset": "gpt2", "batch": 64, "context": 1024, "recompute": "blocks"},
    {"preset": "gpt2", "batch": 32, "context": 1024, "recompute": "cheap"},
    {"preset": "gpt2", "batch": 16, "context": 1024, "accumulate": True},
    {"preset": "gpt2-medium", "batch": 128, "context": 256},
    {"preset": "smollm2-135m", "batch": 16, "context": 2048},
    {"preset": "llama-3.2-1b", "batch": 2, "context": 4096},
    {"preset": "llama-3.2-1b", "batch": 4, "context": 4096, "masters": False, "state_dtype": "bf16"},
    {"preset": "llama-3.2-1b", "batch": 1, "context": 256},
]


def _train(preset: str, training: Training, device: torch.device) -> int:
    """Bytes at the peak of the second step, of the third where gradients are summed."""
    config, dtype = PRESETS[preset], DTYPES[training.dtype]
    torch.backends.cuda.matmul.allow_tf32 = training.dtype == "tf32"
    model = build_model(config, dropout=DROPOUT if training.dropout else 0.0, device=device, dtype=dtype)
    model.init_weights()
    if training.recompute == "blocks":
        recompute_blocks(model)
    cheap = RecomputeCheap(model) if training.recompute == "cheap" else nullcontext()
    states = DTYPES[training.state_dtype]
    optimizer = AdamW(model.parameters(), max_norm=1.0, master_weights=training.masters, state_dtype=states)
    for _ in range(3 if training.accumulate else 2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        shape = (training.batch, training.context)
        ids, targets = (torch.randint(config.vocab_size, shape, device=device) for _ in range(2))
        with cheap:
            loss = model.loss(ids, targets)
        loss.backward()
        del loss
        optimizer.step()
        if not training.accumulate:
            optimizer.zero_grad(set_to_none=True)
        del ids, targets
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def measure(preset: str, training: Training) -> dict[str, int]:
    """measured: bytes at the peak. left: what is still allocated afterwards, cuBLAS's workspaces.

    Measured from nothing: what earlier set-ups left to cuBLAS is freed first.
    """
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    peak = _train(preset, training, torch.device("cuda"))
    gc.collect()
    return {"measured": peak - before, "left": torch.cuda.memory_allocated() - before}


def row_of(setup: dict[str, Any], gpu: GPU, measured: dict[str, int]) -> dict[str, Any]:
    """A set-up, what was measured and what was planned; off: how far the plan is, as a share of the measured."""
    training = Training(**{name: value for name, value in setup.items() if name != "preset"})
    plan = training_memory(PRESETS[setup["preset"]], training, gpu)
    planned = {"planned": plan.total, "moment": plan.moment, "parts": dict(plan.parts)}
    return {"setup": setup, **measured, **planned, "off": plan.total / measured["measured"] - 1}


def memory_table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = ["| set-up | measured, GiB | planned, GiB | off |", "|---|---:|---:|---:|"]
    for row in rows:
        preset, batch, context = (row["setup"][name] for name in ("preset", "batch", "context"))
        rest = [f"{k}={v}" for k, v in row["setup"].items() if k not in ("preset", "batch", "context")]
        what = ", ".join((f"{preset}, {batch} x {context}", *rest))
        measured, planned = (row[name] / 2**30 for name in ("measured", "planned"))
        lines.append(f"| {what} | {measured:.2f} | {planned:.2f} | {row['off']:+.1%} |")
    return "\n".join(lines)


def memory_block(results: dict[str, Any]) -> str:
    """The table, and what was measured on."""
    about = results["environment"]
    return f"{memory_table(results['rows'])}\n\n{about['gpu']}, torch {about['torch']}, {about['date']}."


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for memory.json")
    parser.add_argument("--commit", default=head(), help="of the code that runs, where it is not a git checkout")
    options = parser.parse_args(arguments)
    gpu = detect()
    if gpu is None:
        parser.error("there is no GPU here")
    rows = []
    for setup in SETUPS:
        training = Training(**{name: value for name, value in setup.items() if name != "preset"})
        rows.append(row_of(setup, gpu, measure(setup["preset"], training)))
    options.out.mkdir(parents=True, exist_ok=True)
    results = {"environment": environment(options.commit), "rows": rows}
    (options.out / "memory.json").write_text(json.dumps(results, indent=1) + "\n")
    print(memory_table(rows))
    far = [row for row in rows if abs(row["off"]) > FARTHEST]
    if far:
        sys.exit(f"{len(far)} of {len(rows)} plans are more than {FARTHEST:.0%} off")
