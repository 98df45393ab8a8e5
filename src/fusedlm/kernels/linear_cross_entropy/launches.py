"""Which kernel turns logits into losses and their gradient, and its launch."""

import functools
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from fusedlm.kernels._backend import forced, interpreting
from fusedlm.kernels._index_errors import index_flag
from fusedlm.kernels._launch import capability, launch, launch_described, num_programs
from fusedlm.kernels._triton import triton
from fusedlm.kernels.cross_entropy import statistics_config
from fusedlm.kernels.linear_cross_entropy.loss import loss_kernel

LINE = 64  # a row comes by TMA in lines of so many logits
MIN_V = 16384  # on Hopper, shorter rows have too little work between their barriers


@dataclass(frozen=True)
class Ring:
    """Shared memory of the kernel for Hopper. slots: how many, of slot_bytes each. stream: those of them for what is
    copied twice, where a row is longer than all. Its four groups of warps share both evenly. programs: a
    multiprocessor."""

    slots: int = 28
    slot_bytes: int = 8192
    stream: int = 4
    programs: int = 1


_RING = Ring()


def kernel_for(logits: Tensor) -> Literal["hopper", "plain"]:
    """Which kernel serves: Hopper's where TMA can read the rows and they are long; `backend("triton")` takes any."""
    V = logits.shape[1]
    readable = V % LINE == 0 and V > 0 and logits.data_ptr() % 16 == 0
    long = V >= MIN_V or forced() == "triton"
    return "hopper" if capability(logits.device) == 90 and readable and long else "plain"


def _config(device: torch.device) -> tuple[int, dict[str, int]]:
    """Programs, so that the rows they are at fit the L2 cache, and constants."""
    if interpreting():
        return num_programs(device, 1), statistics_config()
    return num_programs(device, 4), {"BLOCK_K": 4, "BLOCK_V": 2048, "num_warps": 8}


@functools.cache
def _hopper_config(V: int, itemsize: int, gradient: bool, ring: Ring) -> dict[str, int]:
    assert (ring.slots | ring.stream) % 4 == 0, "a slot is always the same group's"
    chunks = triton.cdiv(V * itemsize, ring.slot_bytes)
    stream = ring.stream if gradient and chunks > ring.slots else 0  # else nothing is copied twice
    return {"SLOTS": ring.slots, "STREAM": stream, "num_warps": 4}


def _described(logits: Tensor, slot_bytes: int) -> Any:
    """A descriptor of rows as lines, for chunks of a row."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from fusedlm.kernels._gluon import gl

    M, V = logits.shape
    bits = 8 * logits.itemsize
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=bits, rank=3)
    block = [1, slot_bytes // logits.itemsize // LINE, LINE]
    return TensorDescriptor(logits, [M, V // LINE, LINE], [V, LINE, 1], block, layout)


def losses_in_place(
    logits: Tensor,
    target: Tensor,
    losses: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    *,
    gradient: bool,
    ring: Ring = _RING,
) -> None:
    """The losses of rows; with `gradient` their logits become the gradient of the losses' sum.

    logits: (M, V), target: (M,) int64, losses: (M,) fp32; contiguous, none empty.
    """
    M, V = logits.shape
    device = logits.device
    tensors = (logits, target, losses, index_flag(device))
    scalars = (M, V, ignore_index, label_smoothing, z_loss)
    constants: dict[str, Any] = {"SUM": label_smoothing != 0, "GRADIENT": gradient}
    if kernel_for(logits) == "hopper":
        constants |= _hopper_config(V, logits.itemsize, gradient, ring)
        kernel = import_module("fusedlm.kernels.linear_cross_entropy.hopper").hopper_loss_kernel  # late: needs Triton
        programs = min(num_programs(device, ring.programs), M)
        arguments = (_described(logits, ring.slot_bytes), *tensors, *scalars)
        launch_described(kernel, (programs, 1, 1), arguments, constants)
    else:
        programs, config = _config(device)
        if constants["SUM"] and gradient and not interpreting():
            config = {**config, "maxnreg": 248}  # ptxas of Triton 3.8 would spill 8 bytes to get by with 128
        launch(loss_kernel, (min(programs, M), 1, 1), logits.dtype, tensors, scalars, constants | config)
