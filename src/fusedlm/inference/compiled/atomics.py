"""What threads inside numba functions need to work together: counters that all see, and waiting politely."""

import platform
from typing import Any

from llvmlite import ir
from numba import types

from fusedlm.inference.compiled.vector import call, inline, instruction, pointer

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_MACHINE = platform.machine().lower()
_SPINS = 2000  # looks at a counter before the core is offered to others: about 50 us


@instruction(types.int64, types.int64)
def take_ticket(builder: Any, address: Any) -> Any:
    """Add one to a counter that threads share. Returns what it was.

    What the thread wrote before is seen by whoever sees the new count (release), and the reverse (acquire).
    """
    return builder.atomic_rmw("add", pointer(builder, address, _I64), _I64(1), "acq_rel")


@instruction(types.int64, types.int64)
def look(builder: Any, address: Any) -> Any:
    """A counter's value, and with it all that was written before it was counted up to there (acquire)."""
    return builder.load_atomic(pointer(builder, address, _I64), "acquire", align=8)


@instruction(types.void)
def _pause(builder: Any) -> Any:
    """Tell the core that this is a loop that waits, where it has a word for that."""
    if _MACHINE in ("x86_64", "amd64"):
        call(builder, "llvm.x86.sse2.pause", ir.VoidType())
    elif _MACHINE in ("aarch64", "arm64"):
        call(builder, "llvm.aarch64.hint", ir.VoidType(), _I32(1))


@instruction(types.void)
def _offer_core(builder: Any) -> Any:
    return call(builder, "sched_yield", _I32)


@inline
def wait_for(address, count):
    """Until the counter at address has reached count. Spins for a moment, then lets other threads run in between."""
    spins = 0
    while look(address) < count:
        spins += 1
        if spins < _SPINS:
            _pause()
        else:
            _offer_core()
