"""Launch a Triton kernel with less host time than `kernel[grid](...)` takes.

Triton's own launch binds and specialises every argument anew, every call. Here an op names what its compiled kernel
depends on beyond its constants (dtypes, mostly), and what was compiled for that is called directly. Compiled code may
assume that pointers and integers are multiples of 16 where those of its first call were; so a call whose alignment
differs takes Triton's own way.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedlm.kernels._backend import interpreting
from fusedlm.kernels._triton import triton

_compiled: dict[Any, Any] = {}
_recorded: list["Launch"] | None = None
_recorded_capability = 90


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded and not run: the kernel, its positional arguments, its constexprs and options."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


@contextmanager
def record_launches(capability: int = 90) -> Iterator[list[Launch]]:
    """Inside, ops on the device "meta" (under `backend("triton")`) record what they would launch, and run nothing.

    For compiling kernels for GPUs that are not there, with the very arguments and constants they are launched with.
    capability: of such a GPU, 10 * major + minor.
    """
    global _recorded, _recorded_capability
    before = _recorded, _recorded_capability
    _recorded, _recorded_capability = [], capability
    try:
        yield _recorded
    finally:
        _recorded, _recorded_capability = before


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    key: Any,
    tensors: tuple[Tensor | None, ...],
    scalars: tuple[int | float, ...],
    constants: dict[str, Any],
) -> None:
    """Run kernel(*tensors, *scalars, **constants) over grid.

    key: hashable; everything beside the constants' values that compiled code depends on and alignment does not tell
    (the dtypes, which tensors are None). constants: constexprs and options (num_warps), in one order.
    Every tensor is on the same CUDA device (on the CPU under the interpreter), and the first is there.
    """
    first = tensors[0]
    assert first is not None
    device = first.get_device()
    # As numbers: the driver would be asked about every tensor.
    pointers: list[int | None] = []
    bits = 0
    for t in tensors:
        if t is None:
            pointers.append(None)
        else:
            pointer = t.data_ptr()
            pointers.append(pointer)
            bits |= pointer
    # Of an integer compiled code depends on whether 16 divides it, whether it is 1, and whether 32 bits hold it.
    integers = [
        not i & 15 or (i == 1 and 2) if -0x80000000 <= i < 0x80000000 else (i & 15,) for i in scalars if type(i) is int
    ]
    full = (id(kernel), device, key, *constants.values(), *integers)
    # Which pointers are not aligned is not part of the key: those calls go Triton's own way.
    found = None if bits & 15 else _compiled.get(full)
    if found is None or device != torch._C._cuda_getDevice():
        _launch_slowly(kernel, grid, None if bits & 15 else full, tensors, scalars, constants)
        return
    run, function, metadata, values = found
    stream = torch._C._cuda_getCurrentRawStream(device)
    run(*grid, stream, function, metadata, None, None, None, *pointers, *scalars, *values)


def _launch_slowly(
    kernel: Any,
    grid: tuple[int, int, int],
    full: tuple[Any, ...] | None,
    tensors: tuple[Tensor | None, ...],
    scalars: tuple[int | float, ...],
    constants: dict[str, Any],
) -> None:
    """Triton's own way, which compiles; the interpreter; the recorder. full: the key to keep what is compiled under."""
    first = tensors[0]
    assert first is not None
    if interpreting():
        kernel[grid](*tensors, *scalars, **constants)
        return
    if first.is_meta:
        assert _recorded is not None, "nothing can be launched on the device meta"
        _recorded.append(Launch(kernel, (*tensors, *scalars), constants))
        return
    with torch.cuda.device(first.device):
        compiled = kernel[grid](*tensors, *scalars, **constants)
    if full is not None:
        names = kernel.arg_names[len(tensors) + len(scalars) :]
        values = tuple([constants[name] for name in names])
        _compiled[full] = (compiled.run, compiled.function, compiled.packed_metadata, values)


def launch_described(kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], constants: Any) -> None:
    """Run a Gluon kernel that takes descriptors of tensors, Triton's own way.

    arguments: descriptors, tensors, None, and numbers; the first is a descriptor.
    """
    device = arguments[0].base.device
    if device.type == "meta":
        assert _recorded is not None, "nothing can be launched on the device meta"
        _recorded.append(Launch(kernel, arguments, constants))
        return
    with torch.cuda.device(device):
        kernel[grid](*arguments, **constants)


def rows(x: Tensor) -> Tensor:
    """x as (M, N) with unit stride along N; copies only where it must."""
    if x.ndim == 2 and x.stride(1) == 1:
        return x
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def lines(*tensors: Tensor) -> Any:
    """Tensors of one shape as (M, N) with unit stride along N, for kernels that go element by element.

    One long line (M = 1) where all are contiguous, else the rows; copies only where it must. One tensor comes alone.
    """
    if all(t.is_contiguous() for t in tensors):
        found = [t.view(1, -1) for t in tensors]
    elif tensors[0].ndim < 2:
        found = [t.contiguous().view(1, -1) for t in tensors]
    else:
        found = [rows(t) for t in tensors]
    return found[0] if len(found) == 1 else found


@functools.cache
def elementwise_config(M: int, N: int) -> tuple[dict[str, int], tuple[int, int, int]]:
    """Constants and grid of kernels that go element by element: 8 a thread, one dimension of blocks row by row."""
    block = 64 if interpreting() else 1024
    return {"BLOCK_N": block, "num_warps": 4}, (M * triton.cdiv(N, block), 1, 1)


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def capability(device: torch.device) -> int:
    """The generation of a GPU, 10 * major + minor; on the device "meta" that of the one recorded for; 0 on a CPU."""
    if device.type == "cuda":
        return _capability(device)
    return _recorded_capability if device.type == "meta" else 0


@functools.cache
def num_programs(device: torch.device, per_multiprocessor: int) -> int:
    """Programs of a grid that stays resident on a GPU; 3 under the interpreter, so that small tests still loop.

    On the device "meta", where launches are recorded to be compiled, those of an H100.
    """
    if device.type == "meta":
        return per_multiprocessor * 132
    if device.type != "cuda":
        return 3
    return per_multiprocessor * torch.cuda.get_device_properties(device).multi_processor_count
