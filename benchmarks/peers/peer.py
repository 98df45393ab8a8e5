"""What the harness has to know of a peer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fusedlm.testing import Shape


@dataclass(frozen=True)
class Peer:
    """A function of a case's inputs.

    writes_inputs: it works in place and gets a copy of its own. waits: it waits for the GPU inside, so that it cannot
    be in a CUDA graph. random: its numbers are not to be compared with the reference's. source: the function as it was
    written, where `function` is made of it. takes: whether it can do a shape at all. trains: whether it has a backward
    pass; if not, its forward pass alone is timed.
    """

    function: Callable[..., Any]
    writes_inputs: bool = False
    waits: bool = False
    random: bool = False
    source: Callable[..., Any] | None = None
    takes: Callable[[Shape], bool] = lambda shape: True
    trains: bool = True

    def does(self, direction: str) -> bool:
        return self.trains or direction == "forward"
