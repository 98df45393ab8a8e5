"""Which implementation of an op runs: Triton on CUDA tensors of a dtype that it computes with, torch elsewhere.

The interpreter (TRITON_INTERPRET=1) runs Triton kernels on CPU tensors where `backend("triton")` asks for them.
"""

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch"]

_forced: Backend = "auto"

# What kernels compute with, in fp32. They would lose half the digits of fp64, and integers have no such ops.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1), which takes tensors on the CPU.

    Asked once: a kernel is made for one or the other when its module is imported.
    """
    triton = sys.modules.get("triton")
    return triton is not None and bool(triton.knobs.runtime.interpret)


def use_triton(x: Tensor) -> bool:
    """Whether an op that has a Triton kernel launches it for `x`."""
    if _forced == "auto":
        return x.is_cuda and x.dtype in DTYPES
    elsewhere = not (x.is_cuda or x.is_meta)  # meta: see record_launches
    if _forced == "triton" and elsewhere and not torch.compiler.is_compiling() and not interpreting():
        raise ValueError(f"the Triton kernels were asked for, and they need a CUDA tensor; got one on {x.device}")
    if _forced == "triton" and x.dtype not in DTYPES:
        raise ValueError(
            f"the Triton kernels were asked for, and they need {', '.join(map(str, DTYPES))}; got a tensor of {x.dtype}"
        )
    return _forced == "triton"


def forced() -> Backend:
    """The backend that is asked for, "auto" where none is."""
    return _forced


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Force one implementation of every op inside the `with` block; "auto" leaves the choice to the tensor's device.

    Raises ValueError for another name.
    """
    global _forced
    if name not in ("auto", "triton", "torch"):
        raise ValueError(f"unknown backend {name!r}; expected 'auto', 'triton' or 'torch'")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
