"""FSDP2 with two gloo processes on the CPU: what one process computes, two do, and each goes on where the other was."""

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fusedlm.models import build_model
from fusedlm.training import collectives
from fusedlm.training.ranks import Ranks
from fusedlm.training.saved import saved_model


def torchrun(argument: str, script: str = "two_processes.py") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = str(Path(__file__).with_name(script))
    return subprocess.run([*command, path, argument], capture_output=True, text=True, timeout=120)


OPTIMIZERS = ("adamw", "muon")
VARIANTS = {
    "stage 3": ["parallel.reshard_after_forward=true"],
    "stage 2": ["parallel.reshard_after_forward=false", "training.micro_batches=2"],
    "replicas": ["parallel.replicas=2", "training.recompute=cheap"],
    "muon, blocks": ["training.optimizer=muon", "training.recompute=blocks"],
    "lora": ["lora.rank=2", "parallel.reshard_after_forward=true"],
    "torch's collectives": ["parallel.direct=false"],
    "chats": ["data.documents=separate", "training.spike_sigmas=9"],
    # The first save without an evaluation right before it, the last one after one.
    "evaluations": ["evaluation.interval=8"],
    "evaluations, stage 2": ["evaluation.interval=8", "parallel.reshard_after_forward=false"],
}


BF16 = {
    f"bf16, {optimizer}": ["training.precision=bf16", f"training.optimizer={optimizer}"] for optimizer in OPTIMIZERS
} | {"bf16, torch's collectives": ["training.precision=bf16", "parallel.direct=false"]}
SCALED = "training.precision=fp16"
FP32_GRADIENTS = {
    "fp16": [SCALED],
    "fp16, torch's collectives": [SCALED, "parallel.direct=false", "training.micro_batches=2"],
    "fp16, muon": [SCALED, "training.optimizer=muon"],
    "gradients in fp32": ["training.precision=bf16", "training.grad_dtype=fp32", "training.micro_batches=2"],
}


@pytest.fixture(scope="module")
def two(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of two processes, in one launch: its start takes longer than they do."""
    from tests.training.conftest import TINY

    folder = tmp_path_factory.mktemp("two")
    sections = {**TINY, "data": {"sources": [str(dataset_folder)]}, "checkpoints": {"interval": 4, "keep": 2}}
    specs = [
        {"folder": str(folder / name), "overrides": overrides, "sections": sections}
        for name, overrides in {**VARIANTS, **BF16, **FP32_GRADIENTS}.items()
    ]
    done = torchrun(json.dumps(specs))
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def told(folder: Path) -> dict[str, Any]:
    return json.loads(folder.with_name(f"{folder.name}.json").read_text())


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_are_one(two: Path, run: Callable[..., Any], name: str, tmp_path: Path) -> None:
    one, _ = run("one", *(o for o in VARIANTS[name] if "replicas" not in o))
    assert told(two / name)["losses"] == pytest.approx(one.losses, abs=2e-5)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "one", two / name))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert (tensor - theirs[key]).norm() <= 2e-3 * tensor.norm() + 1e-5, key
    manifest = json.loads((two / name / "checkpoints" / "step-00000008" / "manifest.json").read_text())
    assert manifest["world_size"] == 2
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata"} <= manifest["files"].keys()


@pytest.mark.parametrize("name", BF16)
def test_masters_of_two_processes(two: Path, run: Callable[..., Any], name: str, tmp_path: Path) -> None:
    """Their lower halves are sharded as parameters are; and one goes on with what two have saved."""
    one, _ = run("one", *BF16[name])
    assert told(two / name)["losses"] == pytest.approx(one.losses, abs=0.02)  # gradients are rounded to bf16
    wide = [saved_model(folder, masters=True).model for folder in (tmp_path / "one", two / name)]
    first = build_model(wide[0].config)
    first.init_weights(torch.Generator().manual_seed(1337))
    ours, theirs, begin = (nn.utils.parameters_to_vector(model.parameters()) for model in (*wide, first))
    assert (ours - theirs).norm() < 0.2 * (ours - begin).norm()
    assert (theirs == theirs.bfloat16()).double().mean() < 0.1
    shutil.copytree(two / name, tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000008")
    resumed, _ = run("two", *BF16[name], resume=True)
    assert resumed.began == [4]
    assert resumed.losses == pytest.approx(told(two / name)["losses"][4:], abs=0.02)


@pytest.mark.parametrize("name", FP32_GRADIENTS)
def test_gradients_in_fp32_of_two_processes(two: Path, run: Callable[..., Any], name: str, tmp_path: Path) -> None:
    """FSDP makes them in their parameters' dtype. An fp16 loss is scaled alike, and what two saved one goes on with."""
    one, _ = run("one", *FP32_GRADIENTS[name])
    assert told(two / name)["gradients"] == ["torch.float32"]
    assert told(two / "bf16, adamw")["gradients"] == ["torch.bfloat16"]
    assert told(two / name)["losses"] == pytest.approx(one.losses, abs=0.02)
    shutil.copytree(two / name, tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000008")
    resumed, _ = run("two", *FP32_GRADIENTS[name], resume=True)
    assert resumed.began == [4]
    assert resumed.losses == pytest.approx(told(two / name)["losses"][4:], abs=0.02)


def test_weights_are_gathered_no_more_often_than_they_must(two: Path) -> None:
    """Before each block's forward and backward pass; what backward begins with stays, and so does what no block has."""
    blocks = 2
    assert told(two / "stage 3")["gathers"] == 1 + blocks + (blocks - 1)
    assert told(two / "stage 2")["gathers"] == 2 * (1 + blocks)  # of each micro-batch, for they let go after it


def test_gradients_are_exchanged_unless_told_otherwise(two: Path) -> None:
    """Once for each block and for the rest; torch's own sums where they are asked for, and between replicas."""
    blocks = 2
    assert told(two / "stage 3")["exchanges"] == told(two / "bf16, adamw")["exchanges"] == 1 + blocks
    for name in ("torch's collectives", "bf16, torch's collectives", "replicas"):
        assert told(two / name)["exchanges"] == 0, name


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")),
]


@pytest.mark.parametrize("device", DEVICES)
def test_two_hundred_steps(device: str, configure: Callable[..., Any], heard_of: Any, tmp_path: Path) -> None:
    """Two processes, each with half of every batch, give one's losses; what they saved half way, one goes on with."""
    from fusedlm.training.run import train

    settings = ["training.steps=200", "training.precision=fp32", "training.lr=3e-3", "checkpoints.interval=100"]
    settings += ["model.width=64", "training.batch_size=8", "evaluation.interval=200"]  # the last save follows one
    stages = {
        f"reshard {again}, direct {direct}": [f"parallel.reshard_after_forward={again}", f"parallel.direct={direct}"]
        for again in ("true", "false")
        for direct in ("true", "false")
    }
    specs = []
    for name, more in stages.items():
        sections = configure(*settings, *more).model_dump(exclude_none=True)
        specs.append({"folder": str(tmp_path / name), "overrides": [], "sections": sections, "device": device})
    done = torchrun(json.dumps(specs))
    assert done.returncode == 0, done.stderr[-5000:]
    one = heard_of()
    train(configure(*settings), tmp_path / "one", device=device, observers=[one])
    assert one.losses[-1] < one.losses[0] - 1
    for name in stages:
        losses = told(tmp_path / name)["losses"]
        assert len(losses) == 200
        assert losses == pytest.approx(one.losses, abs=1e-3), name
        shutil.rmtree(tmp_path / name / "checkpoints" / "step-00000200")
        resumed = heard_of()
        train(configure(*settings), tmp_path / name, device=device, resume=True, observers=[resumed])
        assert resumed.began == [100]
        assert resumed.losses == pytest.approx(losses[100:], abs=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_are_one(configure: Callable[..., Any], heard_of: Any, tmp_path: Path) -> None:
    """What two processes on a CPU are held to, on GPUs that write to each other's memory; and gradients of 16 bits."""
    from fusedlm.training.run import train

    variants = {name: ["training.precision=fp32", *overrides] for name, overrides in VARIANTS.items()}
    specs = []
    for name, overrides in (variants | BF16).items():
        sections = configure(*overrides).model_dump(exclude_none=True)
        specs.append({"folder": str(tmp_path / name), "overrides": [], "sections": sections, "device": "cuda"})
    done = torchrun(json.dumps(specs))
    assert done.returncode == 0, done.stderr[-5000:]
    for name, overrides in (variants | BF16).items():
        one = heard_of()
        alone = [o for o in overrides if "replicas" not in o]
        train(configure(*alone), tmp_path / "one" / name, device="cuda", observers=[one])
        assert told(tmp_path / name)["losses"] == pytest.approx(one.losses, abs=0.02 if name in BF16 else 1e-4), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_direct_collectives_overlap() -> None:
    done = torchrun("", "direct_collectives.py")
    assert done.returncode == 0, done.stderr[-5000:]


def test_gpus_that_cannot_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning that says why, and NCCL's own collectives; on every rank, also where only another one failed."""

    class Unshared:
        def __init__(self, *given: Any) -> None:
            raise RuntimeError("no peer access\nat 0x1234")

    class Shared:
        def __init__(self, *given: Any) -> None:
            self.sizes: list[int] = []

        def buffer(self, count: int) -> None:
            self.sizes.append(count)

    class Others(Ranks):
        def any(self, flag: int) -> int:
            return 1

    one = Ranks(0, 1, torch.device("cpu"))
    monkeypatch.setattr(collectives, "SharedMemory", Unshared)
    with pytest.warns(UserWarning, match=r"each other's memory \(no peer access\); NCCL's own collectives take over"):
        assert collectives.shared_memory(None, one) is None
    monkeypatch.setattr(collectives, "SharedMemory", Shared)
    assert collectives.shared_memory(None, one).sizes == [16], "it was tried out"
    with pytest.warns(UserWarning, match="other ranks failed"):
        assert collectives.shared_memory(None, Others(0, 2, torch.device("cpu"))) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert collectives.shared_memory(None, Others(1, 2, torch.device("cpu"))) is None, "the first says it for all"


def test_a_checkpoint_goes_on_with_another_number_of_processes(
    two: Path, run: Callable[..., Any], tmp_path: Path, dataset_folder: Path
) -> None:
    from tests.training.conftest import TINY, make_masters_whole

    whole, _ = run("whole")
    shutil.copytree(two / "stage 3", tmp_path / "one")
    (tmp_path / "one" / "checkpoints" / "step-00000008" / "__1_0.distcp").unlink()
    parts, result = run("one", resume=True)  # of two, with one
    assert "__1_0.distcp is missing" in parts.said[0]
    assert (parts.began, result.steps) == ([4], 8)
    assert parts.losses == pytest.approx(whole.losses[4:], abs=2e-5)

    shutil.copytree(tmp_path / "whole", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000008")
    sections = {**TINY, "data": {"sources": [str(dataset_folder)]}}
    spec = {"folder": str(tmp_path / "two"), "overrides": [], "sections": sections, "resume": True}
    broken = {**spec, "overrides": ["training.seed=3"]}
    narrow, _ = run("bf16", "training.precision=bf16")
    shutil.rmtree(tmp_path / "bf16" / "checkpoints" / "step-00000008")
    make_masters_whole(tmp_path / "bf16", 4)  # which two take apart
    former = {**spec, "folder": str(tmp_path / "bf16"), "overrides": ["training.precision=bf16"]}
    lost = {"folder": str(tmp_path / "lost"), "sections": sections}
    lost["overrides"] = ["training.lr=1e30", "training.max_skipped=3"]  # the first update makes products overflow
    done = torchrun(json.dumps([lost, spec, former, broken]))
    assert done.returncode != 0
    assert "was made with seed 1337, and the run has 3" in done.stderr
    assert told(tmp_path / "two")["losses"] == pytest.approx(whole.losses[4:], abs=2e-5)
    assert told(tmp_path / "bf16")["losses"] == pytest.approx(narrow.losses[4:], abs=0.02)
    assert (tmp_path / "lost.error").read_text().startswith("step 4, micro-batch 1 of 1: the output of blocks.")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "two"))
    assert all((tensor - theirs[key]).norm() <= 2e-3 * tensor.norm() + 1e-5 for key, tensor in ours.items())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured by Linux")
def test_a_rank_never_holds_the_whole_model(tmp_path: Path) -> None:
    done = torchrun(str(tmp_path), "memory_of_ranks.py")
    assert done.returncode == 0, done.stderr[-5000:]
    for rank in range(2):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert told["parts"] > 70e6
        assert told["parts"] * 0.9 < told["peak"] < told["parts"] * 1.5  # the whole would be 2, beside its part 3
