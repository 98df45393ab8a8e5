"""Fixtures of downloads: a Hub and a pip of our own, and a cache."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub, HubHandler
from fake_server import serving
from huggingface_hub import constants
from wheel_files import GOOD, FakePip


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A folder that is not there yet."""
    return tmp_path / "cache" / "fusedlm"


@pytest.fixture
def ordinary_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of this machine's."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def fake(ordinary_hub: None) -> Iterator[FakeHub]:
    state = FakeHub()
    with serving(HubHandler, hub=state) as state.endpoint:
        yield state


@pytest.fixture
def closed() -> str:
    """The address of a port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def pip(tmp_path: Path) -> FakePip:
    source = tmp_path / "on-the-index.whl"
    source.write_bytes(GOOD)
    return FakePip(source)
