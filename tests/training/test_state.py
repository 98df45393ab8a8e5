"""A run's state: it goes on as if nothing had happened, and what is damaged is named."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from fusedlm.data.documents import find_sources
from fusedlm.data.errors import DataError
from fusedlm.data.prepare import prepare
from fusedlm.training import checkpoints as module
from fusedlm.training.checkpoints import Checkpoints, StateError
from fusedlm.training.config import override_config
from fusedlm.training.metrics import read_metrics
from fusedlm.training.ranks import Ranks
from fusedlm.training.run import read_run, train
from fusedlm.training.saved import saved_model
from fusedlm.training.saver import Saver, load_state

VARIANTS = {
    "adamw": [],
    "dropout and a guard": ["training.dropout=0.2", "training.spike_sigmas=8.0"],
    "bf16": ["training.precision=bf16", "training.micro_batches=2"],
    "pure": ["training.precision=bf16-pure"],
    "fp16": ["training.precision=fp16"],
    "muon": ["training.optimizer=muon"],
    "muon, bf16": ["training.optimizer=muon", "training.precision=bf16"],
    "shuffled, recomputed": ["data.order=shuffled", "training.recompute=blocks", "training.dropout=0.1"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_resumed_run_ends_with_the_same_bits(run: Callable[..., Any], name: str, tmp_path: Path) -> None:
    settings = [*VARIANTS[name], "checkpoints.keep=3"]
    whole, _ = run("whole", *settings)
    run("parts", *settings, "training.steps=4", "training.schedule=constant")
    run("other", *settings)
    last = tmp_path / "other" / "checkpoints" / "step-00000008"
    (last / "manifest.json").unlink()  # so the one of step 4 is the last good one
    parts, result = run("other", *settings, resume=True)
    assert parts.began == [4]
    assert "step-00000008/manifest.json is missing" in parts.said[0]
    assert result.steps == 8
    assert parts.losses == whole.losses[4:]
    assert all(torch.equal(p, parts.weights()[key]) for key, p in whole.weights().items())
    if name == "dropout and a guard":
        assert {"guard.mean", "guard.variance", "guard.count"} <= whole.trainer.state().keys()
        assert float(whole.trainer.state()["guard.count"]) == 8
    for key, value in whole.trainer.state().items():
        assert torch.equal(value, parts.trainer.state()[key]), key
    rows = [r.step for r in read_metrics(tmp_path / "other" / "metrics.csv") if r.loss is not None]
    assert rows == list(range(1, 9))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_with_masters_whole_goes_on(run: Callable[..., Any], optimizer: str, tmp_path: Path) -> None:
    """As if they had been taken apart when it was written; also what is exported of it."""
    from tests.training.conftest import make_masters_whole

    settings = ["training.precision=bf16", f"training.optimizer={optimizer}"]
    whole, _ = run("run", *settings)
    (tmp_path / "run" / "checkpoints" / "step-00000008" / "manifest.json").unlink()
    wide = saved_model(tmp_path / "run", step=4, masters=True).model
    make_masters_whole(tmp_path / "run", 4)
    again = saved_model(tmp_path / "run", step=4, masters=True).model
    assert all(torch.equal(p, q) for p, q in zip(wide.parameters(), again.parameters(), strict=True))
    parts, _ = run("run", *settings, resume=True)
    assert parts.began == [4]
    assert parts.losses == whole.losses[4:]
    for key, value in whole.trainer.state().items():
        assert torch.equal(value, parts.trainer.state()[key]), key
    assert any(key.endswith("mlp.up.weight.master_low") for key in parts.trainer.state())


def test_a_model_without_biases_has_none_when_it_goes_on(run: Callable[..., Any], tmp_path: Path) -> None:
    """Though the model that is written at the end has some, of 0, as Hugging Face's form wants."""
    whole, _ = run("run", "model.bias=false")
    (tmp_path / "run" / "checkpoints" / "step-00000008" / "manifest.json").unlink()
    saved = saved_model(tmp_path / "run", step=4).model
    assert not [name for name, _ in saved.named_parameters() if name.endswith("bias")]
    parts, _ = run("run", "model.bias=false", resume=True)
    assert parts.began == [4]
    assert parts.losses == whole.losses[4:]
    tensors = load_file(tmp_path / "run" / "model.safetensors")
    biases = [tensor for name, tensor in tensors.items() if name.endswith("bias")]
    assert len(biases) == 2 * 6 + 1
    assert not any(tensor.any() for tensor in biases)


def test_a_run_that_is_done_has_nothing_to_do(run: Callable[..., Any]) -> None:
    run("run")
    again, result = run("run", resume=True)
    assert (again.began, again.losses, result.steps) == ([8], [], 8)
    more, result = run("run", "training.steps=10", resume=True)
    assert (more.began, len(more.losses), result.steps) == ([8], 2, 10)


def test_time_goes_on_and_one_process_trains(run: Callable[..., Any], tmp_path: Path) -> None:
    run("run", "training.steps=4")
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(ValueError, match="another process trains in"):
        run("run", resume=True)
    run("run", resume=True)
    seconds = [r.seconds for r in read_metrics(tmp_path / "run" / "metrics.csv")]
    assert len(seconds) == 8
    assert seconds == sorted(seconds)


def test_checkpoints_rotate(run: Callable[..., Any], tmp_path: Path) -> None:
    run("two", "checkpoints.interval=2", "checkpoints.keep=2")
    assert Checkpoints(tmp_path / "two" / "checkpoints").steps() == [6, 8]
    run("one", "checkpoints.interval=3", "checkpoints.keep=1")
    assert Checkpoints(tmp_path / "one" / "checkpoints").steps() == [8]
    run("end", "checkpoints.interval=0")
    assert Checkpoints(tmp_path / "end" / "checkpoints").steps() == [8]


def test_a_checkpoint_is_of_the_moment_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on, and changes the tensors, before anything is written."""
    changed = threading.Event()
    prepare_folder = Checkpoints.prepare

    def late(self: Checkpoints, step: int, needed: int) -> Path:
        assert changed.wait(10)
        return prepare_folder(self, step, needed)

    monkeypatch.setattr(Checkpoints, "prepare", late)
    ranks = Ranks(0, 1, torch.device("cpu"))
    saver = Saver(Checkpoints(tmp_path), ranks, run={}, model={})
    state = {"a": torch.arange(6.0), "b": torch.tensor(3)}
    saver.save(5, state)
    state["a"].zero_()
    state["b"].add_(1)
    changed.set()
    saver.close()
    found = {name: torch.full_like(t, 9) for name, t in state.items()}
    load_state(Checkpoints(tmp_path).verify(5), found, ranks)
    assert torch.equal(found["a"], torch.arange(6.0))
    assert int(found["b"]) == 3


class Interrupting:
    """Sends this process a signal after a step."""

    def __init__(self, number: int, at: int) -> None:
        self.number, self.at = number, at

    def record(self, record: Any) -> None:
        if record.step == self.at:
            os.kill(os.getpid(), self.number)

    def __getattr__(self, name: str) -> Any:
        return lambda *given: None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first(run: Callable[..., Any], configure: Any, tmp_path: Path, number: int) -> None:
    from fusedlm.training.run import train

    whole, _ = run("whole")
    before = signal.getsignal(number)
    result = train(configure(), tmp_path / "run", device="cpu", observers=[Interrupting(number, 3)])
    assert (result.interrupted, result.steps) == (number, 3)
    assert signal.getsignal(number) is before
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [3]
    parts, _ = run("run", resume=True)
    assert parts.losses == whole.losses[3:]
    assert all(torch.equal(p, parts.weights()[key]) for key, p in whole.weights().items())


def damage(kind: str, folder: Path) -> str:
    data, manifest = folder / "__0_0.distcp", folder / "manifest.json"
    if kind == "truncated":
        os.truncate(data, 1000)
        return "__0_0.distcp has 1,000 bytes; expected"
    if kind == "bit flipped":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 4
        data.write_bytes(content)
        return "__0_0.distcp has SHA-256"
    if kind == "file missing":
        data.unlink()
        return "__0_0.distcp is missing; expected a file of"
    if kind == "manifest cut":
        os.truncate(manifest, 100)
        return "manifest.json is damaged"
    assert kind == "wrong step"
    manifest.write_text(manifest.read_text().replace('"step": 8', '"step": 9'))
    return "says step 9; expected 8"


@pytest.mark.parametrize("kind", ["truncated", "bit flipped", "file missing", "manifest cut", "wrong step"])
def test_damage_is_named_and_the_last_good_one_found(run: Callable[..., Any], kind: str, tmp_path: Path) -> None:
    whole, _ = run("run")
    folder = tmp_path / "run" / "checkpoints"
    said = damage(kind, folder / "step-00000008")
    again, _ = run("run", resume=True)
    assert said in again.said[0]
    assert "an earlier checkpoint is tried" in again.said[0]
    assert again.began == [4]
    assert all(torch.equal(p, again.weights()[key]) for key, p in whole.weights().items())
    assert Checkpoints(folder).verify(8)

    damage(kind, folder / "step-00000008")
    (folder / "step-00000004" / "__0_0.distcp").unlink()
    both = r"all 2 checkpoints in .* are damaged: .*step-00000008/.*; .*step-00000004/__0_0\.distcp is missing"
    with pytest.raises(StateError, match=both):
        run("run", resume=True)


def test_another_dataset_tokenizer_or_model_is_refused(run: Callable[..., Any], tmp_path: Path, text: Path) -> None:
    run("run")
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[:-50], encoding="utf-8")
    prepare(find_sources([other]), tmp_path / "data", "characters")
    with pytest.raises(DataError, match="is not the one this run began with"):
        run("run", f"data.sources=['{tmp_path}/data']", resume=True)
    with pytest.raises(StateError, match="was made with batch_size 4, and the run has 8"):
        run("run", "training.batch_size=8", resume=True)
    with pytest.raises(StateError, match="is of another model: n_embd 32, now 64"):
        run("run", "model.width=64", resume=True)
    assert read_run(tmp_path / "run").training.batch_size == 4  # what was refused is not kept
    with pytest.raises(StateError, match=r"has no optimizer\.blocks\.0.*momentum; it is of a run with other settings"):
        run("run", "training.optimizer=muon", resume=True)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.tokenizer=gpt2", "data.tokenizer is 'gpt2', and .*run began with 'characters'"),
        ("data.chat=true", "data.chat is True, and .*run began with False"),
        ("data.sources=['elsewhere']", r"data.sources is \('elsewhere',\), and .*run began with .*text.txt"),
        ("lora.rank=2", "lora.rank is 2, and .*run began with 0"),
        ("model.init=elsewhere", "model.init is 'elsewhere', and .*run began with None"),
    ],
)
def test_what_a_run_began_from_stays(
    run: Callable[..., Any], tmp_path: Path, text: Path, override: str, said: str
) -> None:
    given = [f"data.sources=['{text}']", "data.tokenizer=characters"]
    run("run", *given, "training.steps=4")
    before = (tmp_path / "run" / "run.toml").read_text()
    with pytest.raises(ValueError, match=said):
        run("run", *given, "training.steps=6", override, resume=True)
    assert (tmp_path / "run" / "run.toml").read_text() == before


def test_a_run_goes_on_from_another_folder(
    run: Callable[..., Any], tmp_path: Path, dataset_folder: Path, heard_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was given as a relative path; and a prepared dataset that has moved may be named anew."""
    shutil.copytree(dataset_folder, tmp_path / "data")
    run("first")
    monkeypatch.chdir(tmp_path)
    run("run", "data.sources=['data']", "model.init=first", "training.steps=4", "training.warmup=0")
    config = read_run(tmp_path / "run")
    assert (config.data.sources, config.model.init) == ((str(tmp_path / "data"),), str(tmp_path / "first"))
    monkeypatch.chdir("/")
    heard = heard_of()
    train(config, tmp_path / "run", resume=True, device="cpu", observers=[heard])
    assert heard.began == [4]
    (tmp_path / "data").rename(tmp_path / "moved")
    overrides = [f"data.sources=['{tmp_path}/moved']", "training.steps=6"]
    train(override_config(config, overrides), tmp_path / "run", resume=True, device="cpu", observers=[heard])
    assert heard.began == [4, 4]
    assert len(heard.losses) == 2


def test_a_fine_tuned_model_goes_on_without_the_one_it_began_with(run: Callable[..., Any], tmp_path: Path) -> None:
    """Its checkpoints hold every weight."""
    run("first")
    settings = [f"model.init={tmp_path}/first", "training.dropout=0.1"]
    whole, _ = run("run", *settings)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    shutil.rmtree(tmp_path / "first")
    later, _ = run("run", *settings, resume=True)
    assert later.began == [4]
    assert later.losses == whole.losses[4:]


@pytest.mark.parametrize("content", ["", "a,b\n", None])
def test_a_damaged_log_is_no_reason_to_stop(run: Callable[..., Any], tmp_path: Path, content: str | None) -> None:
    run("run", "training.steps=4")
    path = tmp_path / "run" / "metrics.csv"
    content = path.read_text().replace("\n4,", "\nfour,") if content is None else content
    path.write_text(content)
    heard, _ = run("run", "training.steps=6", resume=True)
    assert any("metrics.csv" in text and "it is metrics.csv.damaged now" in text for text in heard.said)
    assert path.with_name("metrics.csv.damaged").read_text() == content
    assert [record.step for record in read_metrics(path)] == [5, 6]


def test_what_is_done_once_more_is_logged_once(run: Callable[..., Any], tmp_path: Path) -> None:
    """And the best loss is that of the whole run."""
    settings = ["evaluation.interval=2", "evaluation.sample_tokens=3"]
    _, first = run("run", *settings, sample=lambda *given: "x")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    _, later = run("run", *settings, "training.lr=5.0", "training.min_lr=5.0", sample=lambda *given: "y", resume=True)
    samples = (tmp_path / "run" / "samples.txt").read_text()
    assert samples == "".join(f"--- step {step}\n{text}\n" for step, text in ((2, "x"), (4, "x"), (6, "y"), (8, "y")))
    losses = [(r.step, r.val_loss) for r in read_metrics(tmp_path / "run" / "metrics.csv") if r.val_loss is not None]
    assert [step for step, _ in losses] == [2, 4, 6, 8]
    assert later.best_val_loss == pytest.approx(min(loss for _, loss in losses))
    assert later.best_val_loss < later.val_loss
    assert first.best_val_loss <= later.best_val_loss + 1e-6


def test_a_profile_that_cannot_be(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file cannot be the folder of a profile: File exists"):
        run("run", profile=tmp_path / "file")
    assert not (tmp_path / "run").exists()
    heard, _ = run("run", "training.steps=4", profile=tmp_path / "profile")
    assert "there is no profile: that takes 9 steps, and there were fewer" in heard.said


def test_a_dataset_that_changes_under_a_run(run: Callable[..., Any], tmp_path: Path, text: Path) -> None:
    folder = tmp_path / "data"
    prepare(find_sources([text]), folder, "characters")
    run("run", f"data.sources=['{folder}']", "training.steps=4")
    shard = folder / "train_00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the same size
    with pytest.raises(DataError, match=r"train_00000\.bin has SHA-256 .*; expected .* changed or damaged"):
        run("run", f"data.sources=['{folder}']", resume=True)
    shard.write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"train_00000\.bin has .* bytes; expected"):
        run("run", f"data.sources=['{folder}']", resume=True)
    shard.unlink()
    with pytest.raises(DataError, match=r"train_00000\.bin is missing"):
        run("run", f"data.sources=['{folder}']", resume=True)
    shard.write_bytes(content)
    characters = folder / "tokenizer" / "characters.json"
    characters.write_text(characters.read_text().replace("x", "Q"))
    with pytest.raises(DataError, match=r"the tokenizer in .* does not match the dataset"):
        run("run", f"data.sources=['{folder}']", resume=True)


def test_a_full_disk(run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run("whole")
    monkeypatch.setattr(module, "free_bytes", lambda folder: 1000)
    with pytest.raises(StateError, match=r"is full, .* step 4 cannot be written: it takes about .* and 1,000 are free"):
        run("none")
    monkeypatch.undo()

    # And one that fills up while it is written.
    real = os.fsync

    def full(descriptor: int) -> None:
        if ".step-00000008" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StateError, match=r"is full, .*step 8 cannot be written.*last checkpoint is that of step 4"):
        run("run")
    monkeypatch.undo()
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [4]
    again, _ = run("run", resume=True)
    assert again.began == [4]
    assert not list((tmp_path / "run" / "checkpoints").glob(".step-*"))
    assert all(torch.equal(p, again.weights()[key]) for key, p in whole.weights().items())


def test_a_file_size_limit_ends_a_run_cleanly(run: Callable[..., Any], tmp_path: Path) -> None:
    """What a quota does: a write in the middle of a checkpoint fails, in the real writer."""
    resource = pytest.importorskip("resource", reason="limits are a POSIX system's")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(StateError, match=r"checkpoint of step 4 cannot be written: .*File too large.*no earlier"):
            run("run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == []
    again, result = run("run", resume=True)
    assert (again.began, result.steps) == ([0], 8)


def test_kills_at_random_moments(dataset_folder: Path, tmp_path: Path) -> None:
    """A few; `python tests/training/kills.py` does as many as one likes."""
    command = [sys.executable, Path(__file__).with_name("kills.py"), dataset_folder, tmp_path / "kills", "--kills", "4"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 kills" in done.stdout
