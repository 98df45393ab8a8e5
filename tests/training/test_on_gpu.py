"""What needs a GPU: a captured step beside an eager one, on our kernels beside torch's ops, saved, killed, resumed."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fusedlm.kernels import backend
from fusedlm.training.randomness import seed_step
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


def side_by_side(captured: Any, eager: Any) -> str:
    """What each step of two runs gave, for whoever has to find the one where they part."""
    lines = [f"captured beside eager; steps from {CapturedStep.EAGER_STEPS + 1} on are replays of the graph"]
    for ours, theirs in zip(captured.records, eager.records, strict=True):
        if ours.loss is not None:
            pairs = (f"{name} {getattr(ours, name):.6g} {getattr(theirs, name):.6g}" for name in ("loss", "norm", "lr"))
            lines.append(f"step {ours.step}: {', '.join(pairs)}, skipped {ours.skipped} {theirs.skipped}")
    return "\n".join(lines)


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
    told = side_by_side(captured, eager)
    assert captured.losses == pytest.approx(eager.losses, abs=0.02), told
    assert captured.losses[-1] < captured.losses[0] - 0.5, told
    assert captured.losses[0] == eager.losses[0]
    assert [r.lr for r in captured.records] == [r.lr for r in eager.records]


def test_replays_have_dropout_of_their_own(on_gpu: Callable[..., Any]) -> None:
    """The same rows again and again, with a learning rate of 0: losses differ by their masks, which a seed decides."""
    trainer = on_gpu("run", "training.dropout=0.3", "training.precision=fp32", "training.steps=1").trainer
    trainer.model.train()
    trainer.optimizer.schedule(0.0)
    batch = trainer.loader.batch(0).to("cuda")
    step, losses = CapturedStep(trainer.step), {}
    with torch.cuda.stream(torch.cuda.Stream()):
        for number in (0, 1, 2, 3, 4, 3, 2):
            seed_step(7, number, trainer.ranks)
            loss = float(step([batch])[0])
            assert losses.setdefault(number, loss) == loss
    assert step._graph is not None
    assert len(set(losses.values())) == 5


def test_a_graph_reads_its_batch_and_its_learning_rate(on_gpu: Callable[..., Any]) -> None:
    trainer = on_gpu("run", "training.precision=fp32", "training.steps=1").trainer
    step = CapturedStep(trainer.step)
    with torch.cuda.stream(torch.cuda.Stream()):
        for number in range(4):
            trainer.optimizer.schedule(0.0)
            step([trainer.loader.batch(number).to("cuda")])
        weights = [p.detach().clone() for p in trainer.model.parameters()]
        want = [float(trainer.forward(trainer.loader.batch(number).to("cuda"))) for number in (5, 6)]
        got = [float(step([trainer.loader.batch(number).to("cuda")])[0]) for number in (5, 6)]
        assert got == pytest.approx(want, abs=1e-5)
        assert all(torch.equal(p, w) for p, w in zip(trainer.model.parameters(), weights, strict=True))
        trainer.optimizer.schedule(1.0)
        before = float(step([batch := trainer.loader.batch(7).to("cuda")])[0])
        assert float(trainer.forward(batch)) < before
        assert not any(torch.equal(p, w) for p, w in zip(trainer.model.parameters(), weights, strict=True))


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
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]  # of kills, and of fusedlm
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}

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
    # The tensors and not the files: safetensors writes its metadata in an order of its own.
    killed, alone = (load_file(run / "model.safetensors") for run in (folder, tmp_path / "alone"))
    assert killed.keys() == alone.keys()
    assert all(torch.equal(killed[name], alone[name]) for name in alone)
