"""What a machine can do, measured."""

import time

import torch


def measure_bandwidth(device: torch.device, *, size: int = 1 << 28, repeats: int = 5) -> float:
    """Bytes a second that the device reads from its memory, the best of a few passes over `size` bytes.

    A sum over a buffer larger than the caches, with as many threads as torch uses. Takes about 0.2 s on a laptop.
    """
    buffer = torch.ones(size // 4, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        buffer.sum()
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return size / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
