"""Triton where there is one. Kernel files are imported on machines without it too, where nothing ever launches them."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:

        def _jit(fn: Any = None, **_: Any) -> Any:
            return fn if fn is not None else lambda fn: fn

        triton = SimpleNamespace(jit=_jit)
        tl = SimpleNamespace(constexpr=lambda value=None: value)

__all__ = ["tl", "triton"]
