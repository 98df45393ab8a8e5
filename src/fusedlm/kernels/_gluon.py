"""Gluon, Triton's lower level, for kernels of one generation of GPU. Imported when the first of those is launched."""

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

# Gluon is experimental: these are named so in Triton 3.9, and otherwise in 3.6.
tma_load: Any = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared
tma_store: Any = getattr(hopper.tma, "async_store", None) or hopper.tma.async_copy_shared_to_global
_memory: Any = gl.shared_memory_descriptor
reinterpret: Any = getattr(_memory, "reinterpret", None) or _memory._reinterpret

__all__ = ["gl", "gluon", "hopper", "reinterpret", "tma_load", "tma_store"]
