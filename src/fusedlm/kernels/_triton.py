"""Triton where there is one. Kernel files are imported on machines without it too, where nothing ever launches them."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import triton
    import triton.language as tl
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper

    tma_load: Any
    tma_store: Any
else:
    try:
        import triton
        import triton.language as tl
        from triton.experimental import gluon
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.language.nvidia import hopper

        # Gluon is experimental: these are named so in Triton 3.9, and otherwise in 3.6.
        tma_load = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared
        tma_store = getattr(hopper.tma, "async_store", None) or hopper.tma.async_copy_shared_to_global
    except ImportError:

        def _jit(fn: Any = None, **_: Any) -> Any:
            return fn if fn is not None else lambda fn: fn

        triton = SimpleNamespace(jit=_jit)
        gluon = triton
        tma_load = tma_store = None
        gl = hopper = tl = SimpleNamespace(constexpr=lambda value=None: value)

__all__ = ["gl", "gluon", "hopper", "tl", "tma_load", "tma_store", "triton"]
