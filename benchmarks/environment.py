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
    """GPU, driver, versions, commit, date."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": subprocess.run(query, capture_output=True, text=True).stdout.strip().split("\n")[0],
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }
