"""Gluon, Triton's lower level, for kernels of one generation of GPU. Imported when the first of those is launched."""

from typing import Any

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia import hopper


@builtin
def _tma_add(tensor_desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
    """Add a tile in shared memory to one in memory. Triton 3.6 has it, and Gluon there no name for it."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


# Gluon is experimental: these are named so in Triton 3.9, and otherwise in 3.6.
tma_load: Any = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared
tma_store: Any = getattr(hopper.tma, "async_store", None) or hopper.tma.async_copy_shared_to_global
tma_add: Any = getattr(hopper.tma, "async_atomic_add", None) or _tma_add
_memory: Any = gl.shared_memory_descriptor
reinterpret: Any = getattr(_memory, "reinterpret", None) or _memory._reinterpret

__all__ = ["gl", "gluon", "hopper", "reinterpret", "tma_add", "tma_load", "tma_store"]
