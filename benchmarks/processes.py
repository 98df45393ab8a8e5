"""Jobs as processes of their own, one a GPU at a time, the longest first."""

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fusedlm.hardware import available_cores

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Job:
    """name: for people, and of its log. command: a program and its arguments. seconds: about what it takes."""

    name: str
    command: Sequence[str]
    seconds: float = 0.0


@dataclass(frozen=True)
class Ended:
    """A job that has ended. status: its exit status. log: what it printed. seconds: what it took."""

    job: Job
    status: int
    log: Path
    seconds: float


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, each by a name that CUDA_VISIBLE_DEVICES takes."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]
    return names[: torch.cuda.device_count()]


def alike_gpus() -> list[str]:
    """Those of them that are the same model as the first."""
    models = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return [gpu for gpu, model in zip(visible_gpus(), models, strict=True) if model == models[0]]


def run_jobs(
    jobs: Sequence[Job], gpus: Sequence[str], logs: Path, ended: Callable[[Ended], None], *, patience: float = 10.0
) -> None:
    """Run every job, on as many GPUs at a time as there are; without any, one after the other.

    The jobs share the caches of compiled code, which are the user's, and each has its share of the cores to compile
    with. gpus: a name each, or several joined by commas for jobs that take several. logs: a folder for what they print.
    ended: called as each ends. However this function ends, no job goes on: those that run get SIGTERM, and SIGKILL
    after so many seconds of patience.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting = sorted(jobs, key=lambda job: -job.seconds)
    free: list[str | None] = [*gpus] if gpus else [None]
    threads = str(max(1, available_cores() // len(free)))
    running: list[tuple[Job, str | None, Any, float]] = []
    with ExitStack() as stack:
        stack.callback(lambda: _end([process for _, _, process, _ in running], patience))
        while waiting or running:
            while waiting and free:
                job, gpu = waiting.pop(0), free.pop(0)
                environment = {**os.environ, "OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": threads}
                if gpu is not None:
                    environment["CUDA_VISIBLE_DEVICES"] = gpu
                with (logs / f"{job.name}.log").open("wb") as log:
                    process = subprocess.Popen(job.command, stdout=log, stderr=subprocess.STDOUT, env=environment)
                running.append((job, gpu, process, time.perf_counter()))
            time.sleep(_POLL_SECONDS)
            for entry in [entry for entry in running if entry[2].poll() is not None]:
                job, gpu, process, begin = entry
                running.remove(entry)
                free.append(gpu)
                ended(Ended(job, process.returncode, logs / f"{job.name}.log", time.perf_counter() - begin))


def _end(processes: Sequence[Any], patience: float) -> None:
    for process in processes:
        process.terminate()
    limit = time.monotonic() + patience
    for process in processes:
        try:
            process.wait(max(0.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def last_lines(log: Path, count: int = 15) -> str:
    """The end of what a job printed."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])
