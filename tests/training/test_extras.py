"""A profile, TensorBoard and Weights & Biases, by what they leave or are told."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def test_a_profile_has_a_trace_and_a_table(run: Callable[..., Any], tmp_path: Path) -> None:
    plain, _ = run("plain", "training.steps=10")
    heard, _ = run("run", "training.steps=10", profile=tmp_path / "profile")
    assert heard.losses == plain.losses
    trace = json.loads((tmp_path / "profile" / "trace.json").read_text())
    assert sum(event.get("name", "").startswith("ProfilerStep#") for event in trace["traceEvents"]) == 3
    table = (tmp_path / "profile" / "kernels.txt").read_text()
    assert "aten::addmm" in table
    assert "3 steps, after 6" in table


class Writer:
    """What torch.utils.tensorboard has, so that the package need not be there."""

    made: list["Writer"]

    def __init__(self, folder: str, purge_step: int | None) -> None:
        self.folder, self.purge_step, self.closed = folder, purge_step, False
        self.scalars: list[tuple[str, float, int]] = []
        Writer.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        self.closed = True


def test_tensorboard(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    Writer.made = []
    heard, _ = run("run", "log.tensorboard=true", "evaluation.interval=8")
    (writer,) = Writer.made
    assert (writer.folder, writer.closed) == (str(tmp_path / "run" / "tensorboard"), True)
    assert [value for name, value, _ in writer.scalars if name == "loss"] == heard.losses
    assert [step for name, _, step in writer.scalars if name == "val_loss"] == [8]
    run("run", "log.tensorboard=true", "training.steps=9", resume=True)
    assert Writer.made[1].purge_step == 9


def test_weights_and_biases(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    begun: list[dict[str, Any]] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            logged.append((step, values))

        def finish(self) -> None:
            logged.append((-1, {}))

    module = ModuleType("wandb")
    module.init = lambda **given: begun.append(given) or Run()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    heard, _ = run("run", "log.wandb=true")
    assert [values["loss"] for step, values in logged if step > 0] == heard.losses
    assert logged[-1] == (-1, {})
    assert begun[0]["config"]["training"]["steps"] == 8
    assert begun[0]["name"] == "run"
    run("run", "log.wandb=true", "training.steps=9", resume=True)
    run("other", "log.wandb=true")
    ids = [given["id"] for given in begun]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_what_is_not_installed_is_named(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else "wandb", None)
    with pytest.raises(ValueError, match=rf"log\.{name} needs a package .*pip install 'fusedlm\[{name}\]'"):
        run("run", f"log.{name}=true")
