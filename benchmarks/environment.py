"""What a figure depends on beside the code that is timed."""

import platform
import subprocess
import time
from typing import Any

import torch
import triton


def head() -> str | None:
    """The commit that is checked out, where this is a git checkout."""
    done = subprocess.run(["git", "rev-parse", "--verify", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def environment(commit: str | None) -> dict[str, Any]:
    """GPU and driver, or CPU and threads where there is none; versions, commit, date."""
    return {
        **(_gpu() if torch.cuda.is_available() else _cpu()),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def _gpu() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip().split("\n")[0]
    return {"gpu": torch.cuda.get_device_name(), "driver": driver}


def _cpu() -> dict[str, Any]:
    return {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
