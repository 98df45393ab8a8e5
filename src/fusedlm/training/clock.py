"""How long a run has trained, without the pauses for evaluations and saves."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds of training since `start`."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._lap: tuple[int, float] = (0, 0.0)

    def start(self, done: int, seconds: float = 0.0) -> None:
        """done, seconds: steps of an earlier part of the run, and how long they took."""
        self._begin = time.perf_counter() - seconds
        self._lap = (done, seconds)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begin

    def lap(self, done: int, seconds: float) -> float:
        """Steps a second since the last lap. seconds: what the clock said when so many steps were done."""
        before, then = self._lap
        self._lap = (done, seconds)
        return (done - before) / max(seconds - then, 1e-9)

    @contextmanager
    def paused(self) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._begin += time.perf_counter() - begin
