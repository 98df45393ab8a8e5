"""A terminal, and what is shown on it."""

import contextlib
import os
import pty
import sys
import termios
from collections.abc import Callable, Iterator

import pytest


@contextlib.contextmanager
def terminal() -> Iterator[Callable[[], str]]:
    """Standard error is a terminal of 120 columns; called at the end, this gives all that was shown on it."""
    main, side = pty.openpty()
    termios.tcsetwinsize(side, (24, 120))
    with (
        pytest.MonkeyPatch.context() as patch,
        os.fdopen(main, "rb", buffering=0) as screen,
        os.fdopen(side, "w") as stderr,
    ):
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "120")
        patch.setattr(sys, "stderr", stderr)

        def shown() -> str:
            patch.undo()
            stderr.close()  # so that reading ends, and behind the last of it whenever that arrives
            parts = []
            with contextlib.suppress(OSError):  # which is Linux's end
                while part := screen.read(1 << 16):
                    parts.append(part)
            return b"".join(parts).decode()

        yield shown
