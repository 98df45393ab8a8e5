"""What needs a GPU: a captured step beside an eager one, on our kernels beside torch's ops, saved, killed, resumed."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedlm.kernels import backend
from fusedlm.training.run import train
from fusedlm.training.step import CapturedStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

WIDE = ["model.width=128", "model.context_length=64", "training.steps=24", "training.lr=3e-3", "training.batch_size=16"]


@pytest.fixture
def on_gpu(configure: Any, tmp_path: Path, heard_of: Any) -> Callable[..., Any]:
    def on_gpu(name: str, *overrides: str, resume: bool = False) -> Any:
        heard = heard_of()
        train(configure(*WIDE, *overrides), tmp_path / name, resume=resume, device="cuda", observers=[heard])
        return heard

    return on_gpu


@pytest.mark.parametrize(
    "settings",
    [
        ["training.precision=bf16"],
        ["training.precision=bf16", "training.dropout=0.2"],
        ["training.precision=bf16-pure", "training.micro_batches=4"],
        ["training.precision=fp32", "training.recompute=cheap"],
        ["training.precision=fp16", "training.recompute=blocks"],
        ["training.precision=tf32", "training.optimizer=muon", "training.spike_sigmas=6.0"],
    ],
)
def test_captured_steps_are_the_eager_ones(on_gpu: Callable[..., Any], settings: list[str]) -> None:
    captured = on_gpu("captured", *settings)
    eager = on_gpu("eager", *settings, "training.graph=false")
    assert captured.losses == pytest.approx(eager.losses, abs=0.02)
    assert captured.losses[-1] < captured.losses[0] - 0.5
    assert captured.losses[0] == eager.losses[0]
    assert [r.lr for r in captured.records] == [r.lr for r in eager.records]


def test_steps_are_captured_and_each_has_dropout_of_its_own(
    on_gpu: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = []
    real = CapturedStep._capture
    monkeypatch.setattr(CapturedStep, "_capture", lambda self, batches: (captured.append(1), real(self, batches)))
    settings = ["training.dropout=0.3", "training.precision=fp32", "training.lr=1e-12", "training.weight_decay=0"]
    heard = on_gpu("run", *settings, "data.order=shuffled")
    assert captured == [1]
    # The weights stay as they are, so a second epoch of the same rows differs by its masks alone.
    again = on_gpu("again", *settings, "data.order=shuffled")
    assert heard.losses == again.losses
    assert len(set(heard.losses)) == len(heard.losses)


def test_our_kernels_and_torchs_ops_train_alike(on_gpu: Callable[..., Any]) -> None:
    ours = on_gpu("ours", "training.precision=fp32")
    with backend("torch"):
        theirs = on_gpu("theirs", "training.precision=fp32", "training.graph=false")
    assert ours.losses == pytest.approx(theirs.losses, abs=2e-3)


@pytest.mark.parametrize("settings", [["training.precision=bf16", "training.dropout=0.2"], ["training.precision=fp16"]])
def test_a_resumed_run_has_the_same_bits(on_gpu: Callable[..., Any], settings: list[str], tmp_path: Path) -> None:
    settings = [*settings, "training.deterministic=true", "checkpoints.interval=8", "checkpoints.keep=9"]
    whole = on_gpu("whole", *settings)
    parts = on_gpu("parts", *settings)
    (tmp_path / "parts" / "checkpoints" / "step-00000024" / "manifest.json").unlink()
    parts = on_gpu("parts", *settings, resume=True)
    assert parts.began == [16]
    assert parts.losses == whole.losses[16:]
    for name, p in whole.weights().items():
        assert torch.equal(p, parts.weights()[name]), name


def test_nan_is_skipped_in_a_graph(on_gpu: Callable[..., Any]) -> None:
    """The first update makes weights so large that activations overflow: from there on only the count changes."""
    heard = on_gpu("run", "training.precision=bf16", "training.steps=12", "training.lr=1e30")
    assert heard.records[-1].skipped >= 8
    assert all(p.isfinite().all() for p in heard.weights().values())


def test_kills(dataset_folder: Path, tmp_path: Path) -> None:
    """A process is killed by SIGKILL while it trains and goes on; five times."""
    code = f"""
import sys
from fusedlm.training.config import make_config
from fusedlm.training.run import train
from kills import SECTIONS
training = {{**SECTIONS["training"], "steps": 400, "precision": "bf16", "deterministic": True}}
sections = {{**SECTIONS, "training": training}}
sections["checkpoints"] = {{"interval": 10}}
config = make_config(None, None, (), **sections, data={{"sources": [{str(dataset_folder)!r}]}})
train(config, sys.argv[1], resume=len(sys.argv) > 2, device="cuda")
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment)

    assert start(str(tmp_path / "alone")).wait() == 0
    folder = tmp_path / "killed"
    for turn in range(5):
        process = start(str(folder), *(["again"] if turn else []))
        marks = 0
        while process.poll() is None and marks < 3:  # after a few checkpoints more, wherever it is then
            before = {path.name for path in folder.glob("checkpoints/step-*")}
            while process.poll() is None and {path.name for path in folder.glob("checkpoints/step-*")} == before:
                pass
            marks += 1
        process.kill()
        process.wait()
    assert start(str(folder), "again").wait() == 0
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "alone" / "model.safetensors").read_bytes()
