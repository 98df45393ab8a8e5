"""A run on the terminal: a bar where there is one, lines elsewhere."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fusedlm.planner import count_parameters
from fusedlm.training.metrics import Record

_SECONDS = 5.0  # between two lines where there is no terminal


class TerminalProgress:
    """Shows loss, speed, memory and the time that is left; evaluations, samples and messages stay in view above."""

    def __init__(self, console: Console | None = None) -> None:
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self.console = console or Console(stderr=True, highlight=False, markup=False, width=None if terminal else 160)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._shown = 0.0

    def begin(self, run: Any, done: int) -> None:
        training, config = run.config.training, run.model.config
        where = str(run.gpu.name) if run.gpu is not None else str(run.ranks.device)
        many = f"{run.ranks.size} x " if run.ranks.size > 1 else ""
        self.say(
            f"{type(config).__name__.removesuffix('Config')}, {count_parameters(config):,} parameters, in "
            f"{training.precision} on {many}{where}: {training.steps:,} steps of {run.tokens_a_step:,} tokens"
            + (f", from step {done:,} on" if done else "")
        )
        if self.console.is_terminal:
            columns = (BarColumn(24), MofNCompleteColumn(), TextColumn("{task.fields[now]}"))
            times = (TimeElapsedColumn(), TimeRemainingColumn(elapsed_when_finished=True))
            self._bar = Progress(*columns, *times, console=self.console)
            self._task = self._bar.add_task("", total=training.steps, completed=done, now="")
            self._bar.start()

    def record(self, record: Record) -> None:
        if record.val_loss is not None:
            self.say(f"step {record.step:,}: validation loss {record.val_loss:.4f}")
        elif self._bar is not None:
            self._bar.update(self._task, completed=record.step, now=_now(record))
        elif time.monotonic() - self._shown >= _SECONDS:
            self._shown = time.monotonic()
            self.say(f"step {record.step:,}: {_now(record)}")

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def sample(self, step: int, text: str) -> None:
        self.console.print(text.strip("\n"), style="dim", soft_wrap=True)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _now(record: Record) -> str:
    parts = [f"loss {record.loss:.4f}", f"{record.tokens_per_second:,.0f} tokens/s"]
    if record.mfu is not None:
        parts.append(f"MFU {record.mfu:.1%}")
    if record.memory:
        parts.append(f"{record.memory:.1f} GiB")
    if record.skipped:
        parts.append(f"{record.skipped} skipped")
    return ", ".join(parts)
