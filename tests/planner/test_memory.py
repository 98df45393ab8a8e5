"""Memory against every allocation of a real training step, whose tensors have sizes and no data: step_on_meta.py."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.training_parallel import CONTENDERS, Contender
from fusedlm.hardware import GPUS
from fusedlm.models import PRESETS
from fusedlm.planner import (
    PARTS,
    Training,
    blas_workspace,
    count_parameters,
    fixed_bytes,
    largest_batch,
    training_memory,
)
from fusedlm.planner.step import Ledger

pytest.importorskip("triton", reason="the kernels are asked for what they allocate")

SHORT = {"n_layers": 3}
# Attention is the widest here, so its backward pass decides.
GPT2_HEADS = {"n_layers": 2, "mlp_width": 64, "n_heads": 48, "n_kv_heads": 48, "vocab_size": 512}
NARROW = {"n_layers": 1, "mlp_width": 64, "n_heads": 2, "n_kv_heads": 2, "vocab_size": 512}  # and here the last norm's
WIDE_MLP = {"n_layers": 1, "mlp_width": 12288, "vocab_size": 512, "bias": False}  # sums of biases would show
LLAMA_HEADS = {"n_layers": 1, "mlp_width": 64, "n_heads": 36, "n_kv_heads": 9}
CASES: list[dict[str, Any]] = [
    {"preset": "gpt2", "batch": 32, "context": 1024},
    {"preset": "gpt2", "batch": 32, "context": 1024, "recompute": "cheap", "dropout": 0.1},
    {"preset": "gpt2", "batch": 32, "context": 1024, "recompute": "blocks"},
    {"preset": "gpt2", "batch": 4, "context": 1024, "dtype": "fp32", "dropout": 0.1},
    {"preset": "gpt2", "batch": 1, "context": 64},
    {"preset": "gpt2", "batch": 32, "context": 1024, "config": {"bias": False}},
    {"preset": "gpt2", "batch": 4, "context": 1024, "dtype": "fp32", "config": {"bias": False, "n_layers": 2}},
    {"preset": "gpt2", "batch": 8, "context": 1024, "accumulate": True},
    {"preset": "gpt2", "batch": 8, "context": 1024, "dtype": "fp16"},
    {"preset": "gpt2", "batch": 1, "context": 64, "dtype": "fp16"},
    {"preset": "gpt2", "batch": 8, "context": 1024, "dtype": "fp16", "accumulate": True},
    {"preset": "smollm2-135m", "batch": 4, "context": 2048, "grad_dtype": "fp32", "accumulate": True},
    {"preset": "smollm2-135m", "batch": 1, "context": 64, "dtype": "fp16", "recompute": "blocks"},
    {"preset": "llama-3.1-8b", "batch": 1, "context": 128, "config": SHORT, "dtype": "fp16"},
    {"preset": "llama-3.1-8b", "batch": 1, "context": 128, "config": SHORT, "dtype": "fp16", "accumulate": True},
    {"preset": "gpt2-medium", "batch": 128, "context": 1024, "config": SHORT},
    {"preset": "gpt2-xl", "batch": 512, "context": 512, "config": SHORT, "recompute": "cheap"},
    {"preset": "smollm2-135m", "batch": 64, "context": 2048, "dropout": 0.1, "config": SHORT},
    {"preset": "smollm2-135m", "batch": 64, "context": 2048, "recompute": "blocks", "dropout": 0.1},
    {"preset": "smollm2-135m", "batch": 64, "context": 2048, "recompute": "cheap"},
    {"preset": "llama-3.2-1b", "batch": 4, "context": 4096, "masters": False, "state_dtype": "bf16"},
    {"preset": "llama-3.1-8b", "batch": 1, "context": 2048, "config": SHORT},
    {"preset": "llama-3.1-8b", "batch": 1, "context": 128, "config": SHORT},
    {"preset": "llama-3.1-8b", "batch": 1, "context": 128, "config": SHORT, "accumulate": True},
    {"preset": "gpt2", "batch": 64, "context": 1024, "config": GPT2_HEADS, "recompute": "cheap"},
    {"preset": "gpt2", "batch": 64, "context": 1024, "config": GPT2_HEADS, "recompute": "blocks", "dropout": 0.1},
    {"preset": "smollm2-135m", "batch": 64, "context": 2048, "config": LLAMA_HEADS},
    {"preset": "gpt2", "batch": 64, "context": 1024, "config": NARROW},
    {"preset": "gpt2", "batch": 64, "context": 1024, "config": {**NARROW, "bias": False}},
    {"preset": "gpt2", "batch": 64, "context": 1024, "config": WIDE_MLP},
    {"preset": "gpt2", "batch": 64, "context": 1024, "config": NARROW, "dropout": 0.1},
]


def planned(case: dict[str, Any], **more: Any) -> Any:
    options = {name: value for name, value in case.items() if name not in ("preset", "config")}
    options["dropout"] = options.get("dropout", 0) > 0
    config = replace(PRESETS[case["preset"]], **case.get("config", {}))
    return training_memory(config, Training(**{**options, **more}), "h100")


def test_a_step_needs_what_is_planned() -> None:
    script = Path(__file__).parent / "step_on_meta.py"
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script, json.dumps(CASES)], capture_output=True, text=True, env=plain)
    assert done.returncode == 0, done.stderr[-3000:]
    moments = set()
    for case, bytes_needed in zip(CASES, json.loads(done.stdout), strict=True):
        memory = planned(case)
        total = memory.total - 2 * blas_workspace(GPUS["h100"])
        assert total == pytest.approx(bytes_needed, rel=2e-4), (case, memory)
        moments.add(memory.moment.split(" of block")[0])
    assert moments >= {"the loss", "backward", "backward of the loss", "backward of the embedding"}


GPT2: dict[str, Any] = {"preset": "gpt2", "batch": 8, "context": 1024}


def test_parts_are_all_there_is() -> None:
    memory, n = planned(GPT2), count_parameters(PRESETS["gpt2"])
    assert memory.parts.keys() == memory.most.keys() == set(PARTS)
    assert all(memory.most[part] >= size for part, size in memory.parts.items())
    sizes = {"weights": 2 * n, "masters": 2 * n, "optimizer": 8 * n}
    assert {part: memory.parts[part] for part in sizes} == pytest.approx(sizes, abs=512)
    # Of the tied table there is one gradient: the embedding adds its rows to the head's.
    assert memory.most["gradients"] == pytest.approx(2 * n, rel=0.001)


def masters(parts: Any) -> dict[str, int]:
    return {"masters": parts["masters"]}


def test_precisions() -> None:
    fp32, bf16, pure = (
        planned(GPT2, dtype="fp32"),
        planned(GPT2),
        planned(GPT2, masters=False, state_dtype="bf16"),
    )
    assert planned(GPT2, dtype="tf32") == fp32
    fp16 = planned(GPT2, dtype="fp16")  # with gradients in fp32
    wide = planned(GPT2, grad_dtype="fp32")
    assert fp16 == replace(wide, parts={**wide.parts, **masters(fp16.parts)}, most={**wide.most, **masters(fp16.most)})
    assert fp16.parts["weights"] == bf16.parts["weights"]
    assert fp16.parts["masters"] == pytest.approx(2 * bf16.parts["masters"], abs=512)
    summed = [planned(GPT2, dtype=dtype, accumulate=True).parts["gradients"] for dtype in ("fp16", "bf16")]
    assert summed[0] == pytest.approx(2 * summed[1], abs=512)
    assert fp32.parts["masters"] == pure.parts["masters"] == 0
    assert fp32.parts["weights"] == pytest.approx(2 * bf16.parts["weights"], abs=512)
    assert bf16.parts["optimizer"] == fp32.parts["optimizer"] == pytest.approx(2 * pure.parts["optimizer"], abs=512)
    fp8, layers = planned(GPT2, dtype="fp8"), PRESETS["gpt2"].n_layers
    # Half of each product's input is saved, but attention's output stays in bf16 too; weights have copies of a byte.
    kept = 8 * 1024 * 768 * layers * (2 * (1 + 1) // 2 - 1)
    assert bf16.parts["activations"] - fp8.parts["activations"] == pytest.approx(kept, rel=0.02)
    assert fp8.parts["weights"] - bf16.parts["weights"] == pytest.approx(12 * 768**2 * layers, abs=512)


def test_states_are_divided_among_gpus() -> None:
    one, four = (fixed_bytes(PRESETS["gpt2"], Training(batch=1, context=8, gpus=n)) for n in (1, 4))
    assert four == pytest.approx({part: size / 4 for part, size in one.items()}, abs=1)
    memory = planned(GPT2, gpus=4)
    assert memory.parts["activations"] == planned(GPT2).parts["activations"]
    assert memory.most["gradients"] == pytest.approx(2 * count_parameters(PRESETS["gpt2"]) / 4, rel=0.001)
    assert memory.total < planned(GPT2).total


FSDP = json.loads((Path(__file__).parents[2] / "benchmarks/results/training_llama_1b_fsdp.json").read_text())


@pytest.mark.parametrize("contender", [c for c in CONTENDERS if c.several], ids=lambda c: c.name)
def test_two_gpus_take_what_was_measured(contender: Contender) -> None:
    """Of `python -m benchmarks training llama-1b-fsdp`, within half a hundredth."""
    row = next(row for row in FSDP["rows"] if row["variant"] == contender.name)
    parallel = contender.parallel
    training = Training(
        batch=FSDP["batch"],
        context=FSDP["context"],
        gpus=row["gpus"],
        reshard=parallel.reshard_after_forward,
        direct=parallel.direct,
    )
    assert training_memory(PRESETS[FSDP["model"]], training, "h200").total == pytest.approx(
        row["peak_bytes"], rel=0.005
    )


@pytest.mark.parametrize("recompute", ["none", "cheap", "blocks"])
def test_the_largest_batch_fits_and_one_more_does_not(recompute: Any) -> None:
    config, training = PRESETS["gpt2"], Training(batch=1, context=1024, recompute=recompute)
    limit = 10 * 2**30
    most = largest_batch(config, training, "h100", limit)
    fits, one_more = (training_memory(config, replace(training, batch=most + i), "h100").total for i in (0, 1))
    assert fits <= limit < one_more
    assert largest_batch(config, training, "h100", 2**30) == 0


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("batch", 0, "batch is 0; expected a whole number, 1 or more"),
        ("context", 2.0, "context is 2.0; expected a whole number"),
        ("gpus", True, "gpus is True; expected a whole number"),
        ("dtype", "int8", "dtype is 'int8'; expected one of fp32, tf32, bf16, fp16, fp8"),
        ("grad_dtype", "bf16", "grad_dtype is 'bf16'; expected one of same, fp32"),
        ("state_dtype", "fp16", "state_dtype is 'fp16'; expected one of fp32, bf16"),
        ("recompute", "all", "recompute is 'all'; expected one of none, cheap, blocks"),
    ],
)
def test_settings_that_cannot_be_are_refused(name: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        planned(GPT2, **{name: value})


def test_a_context_longer_than_the_models_is_refused() -> None:
    with pytest.raises(ValueError, match="context is 1025; the model's is 1024"):
        planned(GPT2, context=1025)


def test_the_ledger() -> None:
    ledger = Ledger()
    ledger.moment = "first"
    a = ledger.take("weights", 1)
    b = ledger.take("logits", 513)
    ledger.give(b, None)
    ledger.moment = "second"
    ledger.take("logits", 600)
    assert (ledger.total, ledger.peak, ledger.peak_moment) == (1536, 1536, "first")
    assert ledger.at_peak["weights"] == a[1] == 512
    with pytest.raises(AssertionError, match="more logits freed than there were"):
        ledger.give(b, b)
