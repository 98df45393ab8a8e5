"""The plan as a whole, its command and its picture."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from fusedlm.cli.plan import plan as command
from fusedlm.hardware import GPUS
from fusedlm.models import PRESETS
from fusedlm.planner import compute_mfu, make_plan
from fusedlm.planner.plot import memory_figure, save_memory_figure

GPT2 = PRESETS["gpt2"]


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, arguments)


def test_speed_time_and_cost_follow_from_the_share_of_the_peak() -> None:
    plan = make_plan(GPT2, gpu="h100", batch=32, mfu=0.5, price=3.0, gpus=2, tokens=1e10)
    flops = plan.flops.total * plan.tokens_per_second
    assert compute_mfu(flops, 1.0, gpu="h100", dtype="bf16", gpus=2) == pytest.approx(0.5)
    assert plan.seconds == pytest.approx(1e10 / plan.tokens_per_second)
    assert plan.cost == pytest.approx(plan.seconds / 3600 * 3.0 * 2)
    assert make_plan(GPT2, gpu="h100", batch=32).tokens == 20 * 124_439_808
    assert make_plan(GPT2, gpu="h100", batch=32, dtype=torch.bfloat16) == make_plan(GPT2, gpu="h100", batch=32)


def test_without_a_batch_as_much_as_fits() -> None:
    plan = make_plan(GPT2, gpu="l4")
    assert plan.training.batch == plan.largest_batch > 1
    assert plan.training.context == 1024
    assert plan.fits
    assert plan.limit == pytest.approx(0.9 * GPUS["l4"].memory)
    assert not make_plan(GPT2, gpu="l4", batch=plan.largest_batch + 1).fits
    small = replace(GPUS["l4"], memory=2**30)
    plan = make_plan(GPT2, gpu=small)
    assert (plan.largest_batch, plan.training.batch, plan.fits) == (0, 1, False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mfu": 0.0}, "mfu is 0.0; expected more than 0"),
        ({"mfu": 1.5}, "mfu is 1.5; expected a share of the peak, at most 1"),
        ({"price": -1.0}, "price is -1.0; expected more than 0"),
        ({"headroom": 1.0}, "headroom is 1.0; expected 0 or more, and less than 1"),
        ({"dtype": "fp8", "gpu": "a100"}, "has no peak for fp8"),
        ({"context": 0}, "context is 0; expected a whole number"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_plan(GPT2, **{"gpu": "h100", "batch": 1, **options})


def test_the_command_prints_what_the_planner_returns() -> None:
    arguments = ("--preset", "gpt2", "--gpu", "h100", "--batch", "32", "--context", "1024", "--gpus", "2")
    plan = make_plan(GPT2, gpu="h100", batch=32, context=1024, gpus=2, price=2.0)
    done = run(*arguments, "--price", "2", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["parameters"]["total"] == 124_439_808
    assert said["flops_per_token"]["total"] == plan.flops.total
    assert said["memory"]["total"] == plan.memory.total
    assert sum(said["memory"][part] for part in plan.memory.parts) == plan.memory.total
    assert (said["largest_batch"], said["cost"], said["fits"]) == (plan.largest_batch, plan.cost, True)
    text = run(*arguments, "--price", "2").stdout
    for expected in (
        "124,439,808",
        f"at most {plan.largest_batch} sequences",
        f"{plan.tokens_per_second:,.0f} tokens/s",
    ):
        assert expected in text
    assert f"{plan.memory.total / 2**30:.2f}" in text


@pytest.mark.parametrize("setting", ["reshard", "direct"])
def test_how_gpus_share_a_model_is_planned_as_told(setting: str) -> None:
    arguments = ("--preset", "gpt2", "--gpu", "h100", "--batch", "32", "--context", "1024", "--gpus", "2", "--json")
    told, default = (json.loads(run(*arguments, *more).stdout)["memory"] for more in ([f"--no-{setting}"], []))
    plan = make_plan(GPT2, gpu="h100", batch=32, context=1024, gpus=2, **{setting: False})
    assert told["total"] == plan.memory.total != default["total"]


def test_the_command_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*arguments: str) -> str:
        done = run(*arguments)
        assert isinstance(done.exception, ValueError)
        return str(done.exception)

    assert said("--preset", "gpt3", "--gpu", "h100") == "unknown preset 'gpt3'; did you mean gpt2?"
    monkeypatch.setattr("fusedlm.hardware.detect", lambda: None)
    assert said("--preset", "gpt2") == "there is no GPU here; expected --gpu with a name, h100 for example"


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plan = make_plan(GPT2, gpu="h100", batch=8)
    left, right = memory_figure(plan, "gpt2").axes
    tops = [max(v[1] for v in area.get_paths()[0].vertices) for area in left.collections]
    longer = make_plan(replace(GPT2, context_length=4096), gpu="h100", batch=8)
    assert max(tops) == pytest.approx(longer.memory.total / 2**30, rel=1e-6)  # the last of its lengths
    assert max(max(v[1] for v in area.get_paths()[0].vertices) for area in right.collections) == pytest.approx(1)
    save_memory_figure(plan, "gpt2", tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"the picture is to be 'memory\.abc'; expected a name with one of \."):
        save_memory_figure(plan, "gpt2", tmp_path / "memory.abc")


def test_a_picture_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"needs matplotlib, which is not installed: pip install 'fusedlm\[plot\]'"):
        memory_figure(make_plan(GPT2, gpu="h100", batch=8), "gpt2")
