"""What results depend on beside the code."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fusedlm.hardware import available_cores, measure_bandwidth


def describe() -> dict[str, Any]:
    """The CPU, its cores and memory bandwidth, and versions of what takes part."""
    packages: dict[str, str | None] = {}
    for name in ("torch", "numba", "llama-cpp-python", "transformers"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "cpu": _cpu_name(),
        "cores": available_cores(),
        "bytes_per_second": measure_bandwidth(torch.device("cpu")),
        "python": platform.python_version(),
        **packages,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
