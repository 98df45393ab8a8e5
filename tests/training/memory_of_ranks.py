"""For tests/training/test_parallel.py, under torchrun: how much memory a rank takes for its part of a model, as JSON.

FOLDER: rank N writes N.json there: {"parts", "peak"}, in bytes: of its parameters, and by how much the process grew.
"""

import ctypes
import json
import sys
from pathlib import Path

import torch

from fusedlm.models import DecoderModel, GPT2Config, build_model
from fusedlm.training.config import ParallelConfig
from fusedlm.training.parallel import fill, shard
from fusedlm.training.ranks import join_ranks, local

SIZES = GPT2Config(
    vocab_size=64,
    context_length=8,
    n_layers=12,
    n_heads=8,
    n_kv_heads=8,
    head_dim=64,
    width=512,
    mlp_width=2048,
    norm_eps=1e-5,
    tied=True,
)


def resident(what: str) -> int:
    """VmRSS or VmHWM (the highest VmRSS) of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def drawn() -> DecoderModel:
    model = build_model(SIZES)
    model.init_weights(torch.Generator().manual_seed(1))
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    with join_ranks("cpu") as ranks:
        for counts in (False, True):  # the first time loads what of torch is loaded late
            whole, model = drawn() if ranks.first else None, build_model(SIZES, device="meta")
            shard(model, ParallelConfig(), ranks)
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
            before = resident("VmRSS")
            fill(model, whole, ranks)
            peak = resident("VmHWM") - before
            parts = sum(local(p).nbytes for p in model.parameters())
            if whole is not None:
                for p, q in zip(model.parameters(), whole.parameters(), strict=True):
                    assert torch.equal(local(p), q[: len(local(p))])  # the first rank's rows are the first ones
            if counts:
                told = {"parts": parts, "peak": peak}
                Path(sys.argv[1], f"{ranks.rank}.json").write_text(json.dumps(told))
            del model
