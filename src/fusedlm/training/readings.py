"""Numbers of steps, read without making a GPU wait: they come to the host when they come."""

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from fusedlm.training.clock import Clock
from fusedlm.training.step import METRICS

Reading = tuple[int, float, dict[str, float]]  # a step, the clock's seconds when it was done, and its METRICS


class Readings:
    """What steps gave, in order. On a GPU copies go to pinned memory, at most `ahead` of them before the host waits.

    clock: says when they were done. together: give nothing before the host must wait, so that all ranks learn of a step
    at the same moment.
    """

    def __init__(self, device: torch.device, clock: Clock, ahead: int = 8, *, together: bool = False) -> None:
        self._clock = clock
        self._together = together
        self._cuda = device.type == "cuda"
        self._ahead = ahead
        self._slots = torch.empty((ahead, len(METRICS)), dtype=torch.float32, pin_memory=self._cuda)
        self._events = [torch.cuda.Event() for _ in range(ahead)] if self._cuda else []  # type: ignore[no-untyped-call]
        self._waiting: deque[tuple[int, int, float]] = deque()  # step, slot, and when the host had launched it
        self._last = 0.0
        self._next = 0

    def put(self, step: int, metrics: Tensor) -> Iterator[Reading]:
        """metrics: METRICS of a step, on the device. Gives those that are there by now."""
        slot = self._next
        self._next = (slot + 1) % self._ahead
        self._slots[slot].copy_(metrics, non_blocking=True)
        if self._cuda:
            self._events[slot].record()
        self._waiting.append((step, slot, self._clock.seconds))
        while self._waiting and (len(self._waiting) == self._ahead or self._is_there(self._waiting[0][1])):
            yield self._take()

    def rest(self) -> Iterator[Reading]:
        """All that have not been given yet; waits for them."""
        while self._waiting:
            yield self._take()

    def _is_there(self, slot: int) -> bool:
        return not self._together and (not self._cuda or bool(self._events[slot].query()))  # type: ignore[no-untyped-call]

    def _take(self) -> Reading:
        step, slot, launched = self._waiting.popleft()
        # One that is read later than need be was done by then, and soon after it was launched.
        late = self._together and (not self._cuda or bool(self._events[slot].query()))  # type: ignore[no-untyped-call]
        if self._cuda:
            self._events[slot].synchronize()
        self._last = max(launched if late else self._clock.seconds, self._last)
        return step, self._last, dict(zip(METRICS, self._slots[slot].tolist(), strict=True))
