"""Indices out of range on a GPU: reported when the host next looks, for waiting to see would cost more than the op.

A kernel that meets one gives NaN in its place and writes to a flag in the host's memory, which a GPU can reach. Reading
it costs no synchronisation, so every call of such an op looks at what earlier ones have left.
"""

import functools

import torch
from torch import Tensor

from fusedlm.kernels._triton import tl, triton


@triton.jit
def flag_index(flag_ptr, bad, index, limit):
    """Note an index (scalar) that is not in [0, limit), where bad."""
    tl.store(flag_ptr + 1, index.to(tl.int64), mask=bad)
    tl.store(flag_ptr + 2, tl.cast(limit, tl.int64), mask=bad)
    tl.store(flag_ptr, tl.cast(1, tl.int64), mask=bad)


@functools.cache
def _flag(device_type: str) -> Tensor:
    """(3,) int64: whether there was one, one such index, its limit."""
    if device_type == "meta":
        return torch.zeros(3, dtype=torch.int64, device="meta")
    return torch.zeros(3, dtype=torch.int64, device="cpu", pin_memory=device_type == "cuda")


def index_flag(device: torch.device) -> Tensor:
    """The flag that kernels on the device write to."""
    return _flag(device.type)


def raise_index_errors() -> None:
    """Raise ValueError where a kernel has met an index out of range (a token id, a target) since the last look.

    Only what the GPU has finished is seen: call it after a synchronisation to be sure. Ops that take indices call it.
    """
    for device_type in ("cuda", "cpu"):
        if device_type == "cuda" and not torch.cuda.is_initialized():
            continue
        flag = _flag(device_type).numpy()
        if flag[0]:
            index, limit = int(flag[1]), int(flag[2])
            flag[:] = 0
            raise ValueError(
                f"an index out of range reached a kernel: {index}, expected 0 to {limit - 1}; what was computed from "
                "it is NaN"
            )


def check_indices(name: str, index: Tensor, limit: int, ignore: int | None = None) -> None:
    """Raises ValueError unless indices lie in [0, limit) or are `ignore`.

    On a CPU alone: on a GPU looking would wait for the device, see raise_index_errors.
    """
    if not index.is_cpu or not index.numel() or torch.compiler.is_compiling():
        return
    bad = (index < 0) | (index >= limit)
    if ignore is not None:
        bad &= index != ignore
    if bool(bad.any()):
        raise ValueError(f"{name} must lie in [0, {limit}); got {int(index[bad][0])}")
