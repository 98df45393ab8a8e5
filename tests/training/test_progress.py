"""What a run shows: lines without a terminal, a bar on one."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fusedlm.training.clock import Clock
from fusedlm.training.metrics import Record, read_metrics
from fusedlm.training.progress import TerminalProgress
from fusedlm.training.readings import Readings
from fusedlm.training.run import train
from fusedlm.training.step import METRICS


def shown(configure: Callable[..., Any], folder: Path, *, terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=140, highlight=False, markup=False)
    config = configure("evaluation.interval=4", "evaluation.sample_tokens=5")
    train(config, folder, device="cpu", observers=[TerminalProgress(console)], sample=lambda *given: "[bold]meow")
    return out.getvalue()


def test_lines(configure: Callable[..., Any], tmp_path: Path) -> None:
    text = shown(configure, tmp_path / "run", terminal=False)
    losses = {r.step: r for r in read_metrics(tmp_path / "run" / "metrics.csv") if r.val_loss is None}
    lines = text.splitlines()
    assert lines[0].startswith("GPT2, ")
    assert "parameters, in fp32 on cpu: 8 steps of 64 tokens" in lines[0]
    assert f"step 1: loss {losses[1].loss:.4f}, " in lines[1]
    assert sum("validation loss" in line for line in lines) == 2
    assert lines.count("[bold]meow") == 2  # text, and not markup


def test_a_bar(configure: Callable[..., Any], tmp_path: Path) -> None:
    text = shown(configure, tmp_path / "run", terminal=True)
    last = [r for r in read_metrics(tmp_path / "run" / "metrics.csv") if r.loss is not None][-1]
    assert "8/8" in text
    assert f"loss {last.loss:.4f}" in text
    assert "meow" in text


def test_what_a_gpu_adds() -> None:
    out = io.StringIO()
    progress = TerminalProgress(Console(file=out, width=200))
    progress.record(
        Record(step=3, tokens=1, seconds=1.0, loss=2.5, tokens_per_second=123456.7, mfu=0.4123, memory=10.04, skipped=2)
    )
    assert out.getvalue() == "step 3: loss 2.5000, 123,457 tokens/s, MFU 41.2%, 10.0 GiB, 2 skipped\n"


class Seconds:
    """A clock that stands still until it is told to go on."""

    seconds = 0.0


def test_a_step_that_is_read_late_has_the_time_at_which_it_was_done() -> None:
    """Ranks read their steps together, so several at once; their speed would be anything."""
    clock: Any = Seconds()
    readings = Readings(torch.device("cpu"), clock, ahead=3, together=True)
    found = []
    for step in range(5):
        clock.seconds = float(step)
        found += [(step, seconds) for step, seconds, _ in readings.put(step, torch.zeros(len(METRICS)))]
    assert found == [(0, 0.0), (1, 1.0), (2, 2.0)]
    clock.seconds = 100.0
    assert [(step, seconds) for step, seconds, _ in readings.rest()] == [(3, 3.0), (4, 4.0)]


def test_laps() -> None:
    clock = Clock()
    clock.start(10, 5.0)
    assert clock.lap(20, 7.0) == 5.0
    assert clock.lap(21, 7.5) == 2.0
