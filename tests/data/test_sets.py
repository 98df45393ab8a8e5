import hashlib
import json
import socket
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fake_server import FakeHandler, serving
from huggingface_hub import constants

from fusedlm.checkpoint.errors import CheckpointError
from fusedlm.data import sets
from fusedlm.data.errors import DataError
from fusedlm.data.files import TextFile
from fusedlm.data.hub import HubDataset, pinned
from fusedlm.data.packages import PackageModules
from fusedlm.data.sets import NAMED_SETS, RemoteFile, fetch, python_library, sources_of

CONTENT = b"Before we proceed any further, hear me speak.\n" * 2000
COMMIT = "0123456789" * 4


@dataclass
class Site:
    """A web site: what it sends, and what it was asked for. cut: it hangs up half way."""

    content: bytes = CONTENT
    status: int = 200
    cut: bool = False
    requests: list[str] = field(default_factory=list)
    address: str = ""

    def file(self) -> RemoteFile:
        return RemoteFile(f"{self.address}/input.txt", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


class Handler(FakeHandler):
    site: Site

    def do_GET(self) -> None:
        self.site.requests.append(self.path)
        content = self.site.content
        if self.path.startswith("/api/datasets/owner/name"):
            content = json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": []}).encode()
        elif self.path != "/input.txt":
            self.send_error(404)
            return
        sent = content[: len(content) // 2] if self.site.cut else content
        self.answer(self.site.status, body=sent, length=len(content))


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    state = Site()
    with serving(Handler, site=state) as state.address:
        yield state


def test_a_file_is_downloaded_once(site: Site, tmp_path: Path) -> None:
    cache = tmp_path / "a" / "cache"
    path = fetch(site.file(), cache)
    assert path.read_bytes() == CONTENT
    assert fetch(site.file(), cache) == fetch(site.file(), cache, offline=True) == path
    assert site.requests == ["/input.txt"]
    assert list(cache.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"content": CONTENT[:-1] + b"!"}, r"input\.txt has 92,000 bytes with SHA-256 .* nothing of it was kept"),
        ({"content": CONTENT[:-1]}, r"has 91,999 bytes with SHA-256 .*; expected 92,000"),
        ({"content": CONTENT + b"!"}, r"has 92,001 bytes with SHA-256 .*; expected 92,000"),
        ({"cut": True}, r"input\.txt (cannot be downloaded|has 46,000 bytes)"),
        ({"status": 503}, r"input\.txt is refused: 503 .*; try again later, or download it yourself, and give"),
    ],
)
def test_a_download_that_goes_wrong_leaves_nothing(
    site: Site, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    for name, value in change.items():
        setattr(site, name, value)
    with pytest.raises(DataError, match=message):
        fetch(site.file(), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "_ANSWER_SECONDS", 0.3)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        remote = RemoteFile(f"{address}/input.txt", 5, "0" * 64)
        with pytest.raises(DataError, match=r"input\.txt cannot be downloaded: timed out\. Check the network, or"):
            fetch(remote, tmp_path)
    with pytest.raises(DataError, match=r"input\.txt cannot be downloaded: .*refused"):
        fetch(remote, tmp_path)
    with pytest.raises(DataError, match=r"000-input\.txt is not there and offline is set; run once without --offline"):
        fetch(remote, tmp_path, offline=True)


def test_a_damaged_file_in_the_cache(site: Site, tmp_path: Path) -> None:
    path = fetch(site.file(), tmp_path)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(DataError, match=r"has 91,999 bytes with SHA-256 .* delete it, and it is downloaded anew"):
        fetch(site.file(), tmp_path)


def test_a_full_disk(site: Site, tmp_path: Path) -> None:
    remote = RemoteFile(f"{site.address}/input.txt", 1 << 60, "0" * 64)
    with pytest.raises(CheckpointError, match=r"no room for 000000000000-input\.txt"):
        fetch(remote, tmp_path)
    assert site.requests == []


def test_a_local_file_must_be_the_very_same(tmp_path: Path) -> None:
    path = tmp_path / "input.txt"
    path.write_text("First Citizen:\n")
    with pytest.raises(DataError, match=r"input\.txt has 15 bytes .*; expected 1,115,394 with 86c4e6aa.*: give the"):
        sources_of("tinyshakespeare", file=path)
    with pytest.raises(ValueError, match=r"a file, .*input\.txt, is given for tinystories, which is not one file"):
        sources_of("tinystories", file=path)


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"named set 'tiny-stories'\. Did you mean tinystories\? The sets are python"):
        sources_of("tiny-stories")


def test_sets_of_the_hub_are_pinned_to_a_commit(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pinned(HubDataset("owner/name"), endpoint=site.address) == HubDataset("owner/name", revision=COMMIT)
    assert site.requests == ["/api/datasets/owner/name"]
    pinned(HubDataset("owner/name", revision="v1"), endpoint=site.address)
    assert "/revision/v1" in site.requests[-1]
    n = len(site.requests)
    assert pinned(HubDataset("owner/name", revision=COMMIT)).revision == COMMIT
    assert len(site.requests) == n
    with pytest.raises(DataError, match=r"the dataset roneneldan/TinyStories cannot be asked for at http://127.*404"):
        sources_of("tinystories", endpoint=site.address)
    with pytest.raises(DataError, match="is streamed from the Hugging Face Hub, and offline is set"):
        sources_of("fineweb-edu", offline=True)


def test_the_library_of_this_python() -> None:
    found = python_library()
    paths = [source.path for source in found if isinstance(source, TextFile)]
    assert len(paths) == len(found) > 100
    assert {"os.py", "argparse.py"} <= {path.name for path in paths}
    assert {path.parent for path in paths} == {Path(sysconfig.get_path("stdlib"))}
    text = "".join(path.read_text("ascii") for path in paths)
    assert len(text) > 2_000_000
    assert NAMED_SETS["python"].characters


def test_a_library_that_is_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(DataError, match=r"holds 6 bytes of Python's standard library; expected a megabyte or more"):
        python_library(tmp_path)


def test_the_modules_of_installed_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = tmp_path / "site-packages"
    folder = packages / "one" / "inner"
    folder.mkdir(parents=True)
    story = "x = 'é'\n" * 90_000
    files = {
        "one/__init__.py": b"y = 1\n" * 60_000,
        "one/inner/b.py": story.encode(),
        "one/inner/c.py": story.encode(),  # the same again
        "one/inner/d.py": story.encode("latin-1"),  # not UTF-8
        "one/inner/e.py": b"z\n" * 600_000,  # a table
        "one/inner/f.py": b" \n",
        "one/inner/g.txt": b"no module",
        "two.py": b"print(2)\n",
    }
    for name, content in files.items():
        (packages / name).write_bytes(content)
    monkeypatch.setattr("sys.path", [str(tmp_path), str(packages), str(packages), str(tmp_path / "dist-packages")])
    (source,) = sources_of("python-packages")
    taken = ["one/__init__.py", "one/inner/b.py", "two.py"]
    pieces = list(source.read())
    whole: dict[str, str] = {}
    for piece in pieces:
        assert isinstance(piece.content, str)
        whole[piece.where] = whole.get(piece.where, "") + piece.content
    assert whole == {str(packages / name): files[name].decode() for name in taken}
    assert pieces[-1].done == source.settings()["bytes"] == sum(len(files[name]) for name in taken)
    last = [piece for piece in pieces if piece.last]
    assert [piece.content for piece in source.read(last[1].place)] == ["print(2)\n"]
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(DataError, match=r"hold 0 bytes of modules \(looked in 0 folders"):
        sources_of("python-packages")


def test_packages_that_change_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a = 1\n")
    before = PackageModules(tmp_path).settings()
    (tmp_path / "a.py").write_text("a = 2\n")
    assert PackageModules(tmp_path).settings() == before | {"sha256": PackageModules(tmp_path).settings()["sha256"]}
    assert PackageModules(tmp_path).settings()["sha256"] != before["sha256"]
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert PackageModules(tmp_path).settings()["sha256"] != before["sha256"]
