"""The memory that a run takes, measured."""

import sys

import torch


def peak_memory(device: torch.device) -> int:
    """Bytes at the most so far: what torch allocated on a GPU, or this whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not a POSIX system
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
