"""The memory benchmark without a GPU: its set-ups, its steps on a CPU, and what it makes of the figures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the benchmarks need Triton")

from benchmarks import memory
from fusedlm.hardware import GPUS
from fusedlm.models import PRESETS
from fusedlm.planner import Training, make_plan


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.cuda's functions that the benchmark calls do nothing, and are noted."""
    called: list[str] = []

    def noting(name: str, value: int) -> Any:
        def call() -> int:
            called.append(name)
            return value

        return call

    for name, value in (("synchronize", 0), ("reset_peak_memory_stats", 0), ("max_memory_allocated", 77)):
        monkeypatch.setattr(torch.cuda, name, noting(name, value))
    return called


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": True},
        {"recompute": "blocks"},
        {"recompute": "blocks", "dropout": True},
        {"accumulate": True, "masters": False, "state_dtype": "bf16", "dtype": "bf16"},
    ],
)
@pytest.mark.parametrize("preset", ["tiny-gpt2", "tiny-llama"])
def test_the_steps_run(preset: str, options: dict[str, Any], no_gpu: list[str]) -> None:
    training = Training(**{"batch": 2, "context": 16, "dtype": "fp32", **options})
    assert memory._train(preset, training, torch.device("cpu")) == 77
    assert no_gpu.count("reset_peak_memory_stats") == (3 if training.accumulate else 2)


def test_at_least_six_set_ups_and_each_fits_an_h100() -> None:
    assert len(memory.SETUPS) >= 6
    for setup in memory.SETUPS:
        assert setup.get("dtype", "bf16") in memory.DTYPES
        options = {name: value for name, value in setup.items() if name != "preset"}
        assert make_plan(PRESETS[setup["preset"]], gpu="h100", **options).fits, setup


def test_rows_and_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setups = memory.SETUPS[:2]
    plan = make_plan(PRESETS["gpt2"], gpu="h200", batch=32, context=1024).memory.total
    monkeypatch.setattr(memory, "SETUPS", setups)
    monkeypatch.setattr(memory, "detect", lambda: GPUS["h200"])
    monkeypatch.setattr(memory, "environment", lambda commit: {"gpu": "G"})
    monkeypatch.setattr(memory, "measure", lambda preset, training: {"measured": int(plan / 1.02), "left": 5})
    memory.main(["--out", str(tmp_path)])
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert [row["setup"] for row in rows] == setups
    assert rows[0]["off"] == pytest.approx(0.02, abs=1e-6)
    assert sum(rows[0]["parts"].values()) == rows[0]["planned"] == plan
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == f"| gpt2, 32 x 1024 | {plan / 1.02 / 2**30:.2f} | {plan / 2**30:.2f} | +2.0% |"
    assert lines[3].startswith("| gpt2, 32 x 1024, dropout=True |")
    monkeypatch.setattr(memory, "measure", lambda preset, training: {"measured": int(plan / 1.06), "left": 5})
    with pytest.raises(SystemExit, match="2 of 2 plans are more than 5% off"):
        memory.main(["--out", str(tmp_path)])
