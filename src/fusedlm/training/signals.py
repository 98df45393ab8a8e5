"""SIGTERM and Ctrl-C: a run first saves where it is."""

import signal
import threading
from types import FrameType
from typing import Any


class Interrupts:
    """Inside, the first SIGTERM or SIGINT is only noted in `received`; the second one does what it always does."""

    def __init__(self) -> None:
        self.received = 0  # the signal's number
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python has no handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
