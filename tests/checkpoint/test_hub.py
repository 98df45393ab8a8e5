"""Models of the Hub: which files are fetched, kept and found again; damage, full disks, what is shown meanwhile."""

import errno
import hashlib
import json
import shutil
from pathlib import Path

import pytest
from fake_hub import CONFIG, LARGE, TOKENIZER, WEIGHTS, WHOLE, FakeHub, Repository, contents
from huggingface_hub.utils import are_progress_bars_disabled
from terminal import terminal

from fusedlm.checkpoint import hub
from fusedlm.checkpoint.errors import CheckpointError
from fusedlm.checkpoint.hub import cached_snapshot, fetch_file, fetch_snapshot


def index(*names: str) -> bytes:
    return json.dumps({"weight_map": {f"layer.{i}": name for i, name in enumerate(names)}}).encode()


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
    monkeypatch.setattr("fake_hub.etag", lambda name, content: wrong if name.endswith(LARGE) else "0" * 40)
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


def test_bars_on_a_terminal(fake: FakeHub, cache: Path) -> None:
    fake.repositories["owner/name"] = Repository(WHOLE)
    with terminal() as shown:
        fetch_snapshot("owner/name", endpoint=fake.endpoint, hub_cache=cache)
        output = shown()
    assert "100%" in output
    assert "downloading owner/name" not in output


def test_an_index_that_cannot_be_read(fake: FakeHub, cache: Path) -> None:
    fake.repositories["owner/name"] = Repository(
        {**CONFIG, **TOKENIZER, **SHARDS, "model.safetensors.index.json": b"{}"}
    )
    with pytest.raises(CheckpointError, match=r"index\.json has no weight_map; delete it and try again"):
        fetch_snapshot("owner/name", endpoint=fake.endpoint, hub_cache=cache)
    assert cached_snapshot("owner/name", hub_cache=cache) is None
