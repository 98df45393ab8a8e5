"""A few steps under torch's profiler: a trace to look at, and a table of what took the time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WAIT, WARM_UP, ACTIVE = 4, 2, 3  # steps: before, thrown away, kept
STEPS = WAIT + WARM_UP + ACTIVE


class StepProfile:
    """Counts steps; after the last that it keeps it writes trace.json and kernels.txt into a folder."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self.written = False
        self.cuda = device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]
        steps = schedule(wait=WAIT, warmup=WARM_UP, active=ACTIVE, repeat=1)
        self._profile = profile(activities=activities, schedule=steps, on_trace_ready=self._write)

    def step(self) -> None:
        """A step has been asked for."""
        self._profile.step()

    def _write(self, found: Any) -> None:
        found.export_chrome_trace(str(self.folder / "trace.json"))
        order = "self_cuda_time_total" if self.cuda else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=80)
        text = f"{ACTIVE} steps, after {WAIT + WARM_UP}; trace.json opens in https://ui.perfetto.dev\n{table}\n"
        (self.folder / "kernels.txt").write_text(text, encoding="utf-8")
        self.written = True

    @contextmanager
    def running(self) -> Iterator["StepProfile"]:
        with self._profile:
            yield self


@contextmanager
def profiled(folder: Path | None, device: torch.device) -> Iterator[StepProfile | None]:
    """A profile into a folder; None without one."""
    if folder is None:
        yield None
        return
    with StepProfile(folder, device).running() as found:
        yield found
