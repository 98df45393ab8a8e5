"""A Hub that refuses, breaks off, or cannot be reached: what is said, and how soon."""

import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_hub import WHOLE, FakeHub, Repository, contents

from fusedlm.checkpoint import hub
from fusedlm.checkpoint.errors import CheckpointError
from fusedlm.checkpoint.hub import cached_snapshot, fetch_snapshot

pytestmark = pytest.mark.usefixtures("ordinary_hub")

GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model owner/name is restricted."}


@pytest.mark.parametrize(
    "repository",
    [
        Repository(WHOLE, refuse=(403, GATED)),
        Repository(WHOLE, refuse=(401, GATED)),
        Repository(WHOLE, refuse_info=(403, GATED)),
        Repository(WHOLE, refuse=(403, {})),
    ],
    ids=["files 403", "files 401", "all 403", "plain 403"],
)
def test_a_gated_model(fake: FakeHub, cache: Path, repository: Repository) -> None:
    fake.repositories["owner/name"] = repository
    with pytest.raises(CheckpointError) as error:
        fetch_snapshot("owner/name", endpoint=fake.endpoint, hub_cache=cache)
    assert "accept its licence at https://huggingface.co/owner/name" in str(error.value)
    assert "`hf auth login`" in str(error.value)
    assert cached_snapshot("owner/name", hub_cache=cache) is None


@pytest.mark.parametrize("refusal", [None, (401, {}), (401, {"X-Error-Code": "RepoNotFound"})])
def test_an_unknown_or_private_model(fake: FakeHub, cache: Path, refusal: tuple[int, dict[str, str]] | None) -> None:
    if refusal is not None:
        fake.repositories["owner/name"] = Repository(WHOLE, refuse_info=refusal)
    with pytest.raises(CheckpointError) as error:
        fetch_snapshot("owner/name", endpoint=fake.endpoint, hub_cache=cache)
    assert "the Hugging Face Hub has none or does not show it to you: check the name" in str(error.value)
    assert "`hf auth login`" in str(error.value)


def test_a_token_that_is_not_accepted(fake: FakeHub, cache: Path) -> None:
    refusal = (401, {"X-Error-Message": "Invalid credentials in Authorization header"})
    fake.repositories["owner/name"] = Repository(WHOLE, refuse_info=refusal)
    with pytest.raises(CheckpointError, match="does not accept your token"):
        fetch_snapshot("owner/name", endpoint=fake.endpoint, hub_cache=cache)


@pytest.mark.parametrize("refusal", [(500, {}), (403, {"X-Error-Message": "Access to this resource is disabled."})])
def test_another_refusal(fake: FakeHub, cache: Path, refusal: tuple[int, dict[str, str]]) -> None:
    fake.repositories["owner/name"] = Repository(WHOLE, refuse_info=refusal)
    with pytest.raises(CheckpointError, match=f"the Hugging Face Hub refused owner/name: .*{refusal[0]}"):
        fetch_snapshot("owner/name", endpoint=fake.endpoint, hub_cache=cache)


def test_a_connection_that_is_cut_half_way(fake: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_wait = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})  # between the library's own tries
    monkeypatch.setattr("huggingface_hub.file_download.time", no_wait)
    fake.repositories["owner/name"] = Repository(WHOLE, cut=True)
    with pytest.raises(CheckpointError, match=r"the download of owner/name broke off: .*Run again to go on with it"):
        fetch_snapshot("owner/name", endpoint=fake.endpoint, hub_cache=cache)
    assert cached_snapshot("owner/name", hub_cache=cache) is None
    fake.repositories["owner/name"].cut = False
    assert contents(fetch_snapshot("owner/name", endpoint=fake.endpoint, hub_cache=cache)) == WHOLE


def seconds_until_unreachable(endpoint: str, cache: Path) -> float:
    start = time.monotonic()
    with pytest.raises(
        CheckpointError, match=rf"the Hugging Face Hub \({endpoint}\) cannot be reached: .*Check the net"
    ):
        fetch_snapshot("owner/name", endpoint=endpoint, hub_cache=cache)
    return time.monotonic() - start


def test_a_closed_port(closed: str, cache: Path) -> None:
    assert seconds_until_unreachable(closed, cache) < 1


def test_a_server_that_never_answers(cache: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert seconds_until_unreachable(f"http://127.0.0.1:{server.getsockname()[1]}", cache) < 4.8
        end = time.monotonic() + 2
        while waiting_threads():  # none is left to wait for ever
            assert time.monotonic() < end
            time.sleep(0.02)


def waiting_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ask the Hub"]


def test_a_name_server_that_hangs(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def hang(*arguments: object, **options: object) -> list[object]:
        released.wait(30)
        raise OSError("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setattr(hub, "_ANSWER_SECONDS", 0.5)
    try:
        assert seconds_until_unreachable("http://hub.invalid", cache) < 1.5
        assert [thread.daemon for thread in waiting_threads()] == [True]  # the process can end without it
    finally:
        released.set()
