import errno
import hashlib
import json
import os
import pty
import shutil
import socket
import sys
import termios
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled

from fusedlm.checkpoint import hub
from fusedlm.checkpoint.errors import CheckpointError
from fusedlm.checkpoint.hub import cached_snapshot, fetch_file, fetch_snapshot

CONFIG = {"config.json": b'{"model_type": "llama"}'}
TOKENIZER = {"tokenizer.json": b'{"version": "1.0"}', "tokenizer_config.json": b'{"model_max_length": 9}'}
WEIGHTS = bytes(range(256)) * 1000
WHOLE = {**CONFIG, **TOKENIZER, "model.safetensors": WEIGHTS}
LARGE = (".safetensors", ".bin", ".gguf")  # what the Hub keeps apart and names by its SHA-256


def index(*names: str) -> bytes:
    return json.dumps({"weight_map": {f"layer.{i}": name for i, name in enumerate(names)}}).encode()


@dataclass
class Repository:
    """refuse: (status, headers) for the files. refuse_info: likewise for what is asked of the repository itself.
    cut: send half of a large file, then nothing more."""

    files: dict[str, bytes]
    refuse: tuple[int, dict[str, str]] | None = None
    refuse_info: tuple[int, dict[str, str]] | None = None
    cut: bool = False

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


@dataclass
class FakeHub:
    """As much of the Hub's HTTP interface as huggingface_hub asks for a model."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""

    def files_sent(self) -> set[str]:
        return {
            path.split("/resolve/")[1].split("/", 1)[1]
            for path in self.requests
            if "GET" in path and "/resolve/" in path
        }


def etag(name: str, content: bytes) -> str:
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        parts = parts[2:] if is_api else parts
        repository = self.hub.repositories.get("/".join(parts[:2]))
        if repository is None:
            self.answer(404, {"X-Error-Code": "RepoNotFound"})
        elif is_api:
            self.info("/".join(parts[:2]), repository, tree="tree" in parts)
        else:
            self.file(repository, "/".join(parts[4:]))

    def info(self, name: str, repository: Repository, *, tree: bool) -> None:
        if repository.refuse_info is not None:
            self.answer(*repository.refuse_info)
            return
        entries = []
        for path, content in repository.files.items():
            tag, size = etag(path, content), len(content)
            lfs = {"lfs": {"sha256": tag, "oid": tag, "size": size, "pointerSize": 130}} if len(tag) == 64 else {}
            what = {"type": "file", "path": path, "oid": "0" * 40} if tree else {"rfilename": path, "blobId": "0" * 40}
            entries.append({**what, "size": size, **lfs})
        about = {"id": name, "modelId": name, "sha": repository.commit, "siblings": entries, "private": False}
        body = json.dumps(entries if tree else {**about, "tags": [], "downloads": 0, "likes": 0}).encode()
        self.answer(200, {"Content-Type": "application/json"}, body)

    def file(self, repository: Repository, path: str) -> None:
        content = repository.files.get(path)
        if content is None:
            self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.commit})
            return
        if repository.refuse is not None:
            self.answer(*repository.refuse)
            return
        headers = {"ETag": f'"{etag(path, content)}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        start = int(self.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if repository.cut and path.endswith(LARGE) and self.command == "GET":
            self.send_response(206 if start else 200)
            for name, value in {**headers, "Content-Length": str(len(content) - start)}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content[start : len(content) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.answer(206 if start else 200, headers, content[start:])

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(autouse=True)
def ordinary_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def fake() -> Iterator[FakeHub]:
    state = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("ThisHandler", (Handler,), {"hub": state}))
    server.daemon_threads = True
    state.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def closed() -> str:
    """The address of a port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_downloads_what_loading_needs_and_then_no_more_network(fake: FakeHub, cache: Path, closed: str) -> None:
    extras = {"README.md": b"", "onnx/model.safetensors": b"1", "pytorch_model.bin": b"2", "model.gguf": b"3"}
    fake.repositories["owner/whole"] = Repository({**WHOLE, **extras, "generation_config.json": b"{}"})
    assert cached_snapshot("owner/whole", hub_cache=cache) is None
    folder = fetch_snapshot("owner/whole", endpoint=fake.endpoint, hub_cache=cache)
    assert contents(folder) == {**WHOLE, "generation_config.json": b"{}"}
    assert fake.files_sent() == {*WHOLE, "generation_config.json"}
    fake.requests.clear()
    assert fetch_snapshot("owner/whole", endpoint=fake.endpoint, hub_cache=cache) == folder
    assert fetch_snapshot("owner/whole", endpoint=closed, hub_cache=cache, offline=True) == folder
    assert cached_snapshot("owner/whole", hub_cache=cache) == folder
    assert fake.requests == []


SHARDS = {"model-00001-of-00002.safetensors": b"first", "model-00002-of-00002.safetensors": b"second"}
BINS = {"pytorch_model-00001-of-00002.bin": b"first", "pytorch_model-00002-of-00002.bin": b"second"}


@pytest.mark.parametrize(
    "files",
    [
        {"model.safetensors": b"all", "vocab.json": b"{}", "merges.txt": b"#version: 0.2"},
        {**SHARDS, "model.safetensors.index.json": index(*SHARDS), "tokenizer.json": b"{}"},
        {"pytorch_model.bin": b"all", "tokenizer.json": b"{}"},
        {**BINS, "pytorch_model.bin.index.json": index(*BINS), "tokenizer.json": b"{}"},
    ],
    ids=["safetensors", "shards", "bin", "bin shards"],
)
def test_a_snapshot_that_lacks_any_needed_file_is_completed(
    fake: FakeHub, cache: Path, files: dict[str, bytes]
) -> None:
    files = {**CONFIG, **files}
    fake.repositories["owner/name"] = Repository(files)
    folder = fetch_snapshot("owner/name", endpoint=fake.endpoint, hub_cache=cache)
    assert contents(folder) == files
    for name in files:
        (folder / name).unlink()
        assert cached_snapshot("owner/name", hub_cache=cache) is None
        with pytest.raises(CheckpointError, match=r"not \(or not wholly\) in .* offline is set; run once without"):
            fetch_snapshot("owner/name", endpoint=fake.endpoint, hub_cache=cache, offline=True)
        assert fetch_snapshot("owner/name", endpoint=fake.endpoint, hub_cache=cache) == folder
        assert contents(folder) == files


def test_a_blob_that_is_gone_counts_as_missing(fake: FakeHub, cache: Path) -> None:
    fake.repositories["owner/name"] = Repository(WHOLE)
    folder = fetch_snapshot("owner/name", endpoint=fake.endpoint, hub_cache=cache)
    (folder / "model.safetensors").resolve().unlink()
    assert cached_snapshot("owner/name", hub_cache=cache) is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({**CONFIG, **TOKENIZER}, "holds no model in Hugging Face layout"),
        ({**TOKENIZER, "model.safetensors": b""}, "holds no model in Hugging Face layout"),
        ({"a-Q4_K.gguf": b"", "b-Q8_0.gguf": b""}, r"ask for owner/name/a-Q4_K\.gguf \(or b-Q8_0\.gguf\)"),
        ({**CONFIG, "model.safetensors": b"", "vocab.json": b""}, "holds no tokenizer that can be read"),
    ],
)
def test_a_repository_without_a_model_to_load(
    fake: FakeHub, cache: Path, files: dict[str, bytes], message: str
) -> None:
    fake.repositories["owner/name"] = Repository(files)
    with pytest.raises(CheckpointError, match=message):
        fetch_snapshot("owner/name", endpoint=fake.endpoint, hub_cache=cache)
    assert fake.files_sent() == set()


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


def test_weights_that_were_altered_in_the_cache(fake: FakeHub, cache: Path) -> None:
    fake.repositories["owner/name"] = Repository(WHOLE)
    folder = fetch_snapshot("owner/name", endpoint=fake.endpoint, hub_cache=cache)
    blob = (folder / "model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[1234] ^= 1
    blob.write_bytes(data)
    for offline in (True, False):
        with pytest.raises(CheckpointError) as error:
            fetch_snapshot("owner/name", endpoint=fake.endpoint, hub_cache=cache, offline=offline)
        assert f"Delete {blob} and run again" in str(error.value)
    blob.unlink()  # as it says
    assert contents(fetch_snapshot("owner/name", endpoint=fake.endpoint, hub_cache=cache)) == WHOLE


def test_a_hub_that_sends_other_weights_than_it_says(
    fake: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = hashlib.sha256(b"something else").hexdigest()
    monkeypatch.setitem(globals(), "etag", lambda name, content: wrong if name.endswith(LARGE) else "0" * 40)
    fake.repositories["owner/name"] = Repository(WHOLE)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged: its SHA-256 is"):
        fetch_snapshot("owner/name", endpoint=fake.endpoint, hub_cache=cache)


def test_a_blob_that_is_a_link_into_a_store_of_other_names(fake: FakeHub, cache: Path, tmp_path: Path) -> None:
    fake.repositories["owner/name"] = Repository(WHOLE)
    folder = fetch_snapshot("owner/name", endpoint=fake.endpoint, hub_cache=cache)
    blob = (folder / "model.safetensors").resolve()
    store = tmp_path / "blobs"
    store.mkdir()
    shared = store / ("ab" * 32)  # 64 digits too, of another hash
    blob.rename(shared)
    blob.symlink_to(shared)
    assert fetch_snapshot("owner/name", hub_cache=cache, offline=True) == folder
    shared.write_bytes(WEIGHTS[:-1])
    with pytest.raises(CheckpointError, match="is damaged"):
        fetch_snapshot("owner/name", hub_cache=cache, offline=True)


def test_one_gguf_file(fake: FakeHub, cache: Path, closed: str) -> None:
    files = {"model-Q4_0.gguf": WEIGHTS, "model-Q8_0.gguf": b"8", "sub/model.gguf": b"sub"}
    fake.repositories["owner/name"] = Repository(files)
    for name in ("model-Q4_0.gguf", "sub/model.gguf"):
        path = fetch_file("owner/name", name, endpoint=fake.endpoint, hub_cache=cache)
        assert path.name == Path(name).name
        assert path.read_bytes() == files[name]
        assert fetch_file("owner/name", name, endpoint=closed, hub_cache=cache) == path
        assert fetch_file("owner/name", name, hub_cache=cache, offline=True) == path
    assert fake.files_sent() == {"model-Q4_0.gguf", "sub/model.gguf"}
    with pytest.raises(CheckpointError, match=r"owner/name holds no model-Q4\.gguf; there are model-Q4_0\.gguf"):
        fetch_file("owner/name", "model-Q4.gguf", endpoint=fake.endpoint, hub_cache=cache)
    with pytest.raises(CheckpointError, match=r"owner/name/model-Q8_0\.gguf is not .* offline is set"):
        fetch_file("owner/name", "model-Q8_0.gguf", endpoint=fake.endpoint, hub_cache=cache, offline=True)
    (path := fetch_file("owner/name", "model-Q4_0.gguf", hub_cache=cache)).resolve().write_bytes(b"short")
    with pytest.raises(CheckpointError, match="is damaged"):
        fetch_file("owner/name", path.name, hub_cache=cache)


def test_a_repository_known_to_have_no_config(fake: FakeHub, cache: Path) -> None:
    fake.repositories["owner/name"] = Repository({"model.gguf": WEIGHTS})
    fetch_file("owner/name", "model.gguf", endpoint=fake.endpoint, hub_cache=cache)
    known = cache / "models--owner--name" / ".no_exist" / fake.repositories["owner/name"].commit
    known.mkdir(parents=True)
    (known / "config.json").touch()  # as the library notes what it asked for in vain
    assert cached_snapshot("owner/name", hub_cache=cache) is None


def test_a_disk_that_cannot_read(fake: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error")

    fake.repositories["owner/name"] = Repository(WHOLE)
    monkeypatch.setattr(hub, "file_sha256", broken)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: .*Input/output error"):
        fetch_snapshot("owner/name", endpoint=fake.endpoint, hub_cache=cache)


def test_no_room_is_said_beforehand(fake: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = sum(map(len, WHOLE.values()))
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    fake.repositories["owner/name"] = Repository({**WHOLE, "README.md": b"not needed"})
    with pytest.raises(CheckpointError) as error:
        fetch_snapshot("owner/name", endpoint=fake.endpoint, hub_cache=cache)
    for part in (str(cache), f"{needed:,} bytes are needed", f"{needed - 1:,} are free"):
        assert part in str(error.value)
    assert fake.files_sent() == set()


def test_the_disk_fills_meanwhile(fake: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub, "snapshot_download", full)
    fake.repositories["owner/name"] = Repository(WHOLE)
    with pytest.raises(CheckpointError, match=r"no room for owner/name .* are needed and .* are free"):
        fetch_snapshot("owner/name", endpoint=fake.endpoint, hub_cache=cache)


@pytest.mark.parametrize("progress", [True, False])
def test_at_most_one_line_where_there_is_no_terminal(
    fake: FakeHub, cache: Path, capfd: pytest.CaptureFixture[str], progress: bool
) -> None:
    fake.repositories["owner/name"] = Repository(WHOLE)
    fetch_snapshot("owner/name", endpoint=fake.endpoint, hub_cache=cache, progress=progress)
    line = f"downloading owner/name (0.3 MB) to {cache}\n"
    assert capfd.readouterr() == ("", line if progress else "")
    assert not are_progress_bars_disabled()


def test_bars_on_a_terminal(fake: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.repositories["owner/name"] = Repository(WHOLE)
    main, side = pty.openpty()
    termios.tcsetwinsize(side, (24, 120))
    with os.fdopen(main, "rb", buffering=0) as shown, os.fdopen(side, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        fetch_snapshot("owner/name", endpoint=fake.endpoint, hub_cache=cache)
        terminal.flush()
        os.set_blocking(main, False)  # where nothing was shown
        output = (shown.read(100_000) or b"").decode()
    assert "100%" in output
    assert "downloading owner/name" not in output


def test_an_index_that_cannot_be_read(fake: FakeHub, cache: Path) -> None:
    fake.repositories["owner/name"] = Repository(
        {**CONFIG, **TOKENIZER, **SHARDS, "model.safetensors.index.json": b"{}"}
    )
    with pytest.raises(CheckpointError, match=r"index\.json has no weight_map; delete it and try again"):
        fetch_snapshot("owner/name", endpoint=fake.endpoint, hub_cache=cache)
    assert cached_snapshot("owner/name", hub_cache=cache) is None
