"""What a preparation refuses: other sources and settings than before, folders of others, what makes no sense."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from preparations import Stopped, contents, make, stopping_after

from fusedlm.data.dataset import Dataset
from fusedlm.data.documents import Source, find_sources
from fusedlm.data.errors import DataError
from fusedlm.data.prepare import prepare
from fusedlm.data.shards import ShardWriter
from fusedlm.data.tables import JsonLines
from fusedlm.tokenizer.bpe import BPETokenizer
from fusedlm.tokenizer.characters import CharacterTokenizer


@pytest.fixture
def begun(tmp_path: Path, small: BPETokenizer, jsonl: Path, many_chunks: None) -> Path:
    """A folder whose preparation was stopped."""
    folder = tmp_path / "begun"
    with pytest.MonkeyPatch.context() as patch:
        stopping_after(4, patch)
        with pytest.raises(Stopped):
            make(JsonLines(jsonl), folder, small, commit_seconds=0)
    return folder


@pytest.fixture(params=["unfinished", "finished"])
def there(request: pytest.FixtureRequest, begun: Path, small: BPETokenizer, jsonl: Path) -> Path:
    if request.param == "finished":
        make(JsonLines(jsonl), begun, small)
    return begun


def test_a_source_that_has_changed(there: Path, small: BPETokenizer, jsonl: Path) -> None:
    before = contents(there)
    stat = jsonl.stat()
    content = jsonl.read_bytes()
    jsonl.write_bytes(content.replace(b"cat", b"dog", 1))
    with pytest.raises(
        DataError, match=rf"stories\.jsonl has changed since .*begun was begun: .* {stat.st_size:,} byt"
    ):
        make(JsonLines(jsonl), there, small)
    assert contents(there) == before
    jsonl.write_bytes(content)  # a new time, the old content
    os.utime(jsonl, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    make(JsonLines(jsonl), there, small)
    Dataset(there).verify()


def test_other_settings_tokenizers_and_sources(
    there: Path, small: BPETokenizer, chat_tokenizer: Callable[[], BPETokenizer], jsonl: Path, tmp_path: Path
) -> None:
    before = contents(there)
    other = tmp_path / "other.jsonl"
    shutil.copy(jsonl, other)
    again = "choose another folder, or start again with --overwrite"
    for sources, tokenizer, settings, message in (
        ([JsonLines(jsonl)], small, {"shard_tokens": 999}, f"with shard_tokens = 1000, not 999; {again}"),
        ([JsonLines(jsonl)], small, {"val_fraction": 0.2}, f"with val_fraction = 0.1, not 0.2; {again}"),
        ([JsonLines(jsonl)], chat_tokenizer(), {}, "with chat_template = None, not "),
        ([JsonLines(jsonl)], CharacterTokenizer("abc"), {}, f"another tokenizer .*{again}"),
        ([JsonLines(jsonl)], "characters", {}, "with tokenizer = 'given', not 'characters'"),
        ([JsonLines(other)], small, {}, r"without .*other\.jsonl"),
        ([JsonLines(jsonl, "body")], small, {}, r"without .*stories\.jsonl, or with other settings for it"),
        ([JsonLines(jsonl), JsonLines(other)], small, {}, r"without .*other\.jsonl"),
    ):
        given: dict[str, Any] = {"val_fraction": 0.1, "shard_tokens": 1000, **settings}
        with pytest.raises(DataError, match=message):
            prepare(sources, there, tokenizer, **given)
        assert contents(there) == before
    make(JsonLines(other), there, small, overwrite=True)
    assert Dataset(there).manifest.sources[0]["path"] == str(other)


def test_a_finished_dataset_is_left_alone(tmp_path: Path, small: BPETokenizer, jsonl: Path) -> None:
    first = make(JsonLines(jsonl), tmp_path / "out", small)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.*") if path.name != ".lock"}
    assert make(JsonLines(jsonl), tmp_path / "out", small, workers=1) == first
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_source_that_changes_while_it_is_read(
    tmp_path: Path, small: BPETokenizer, jsonl: Path, many_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = ShardWriter.append

    def change(writer: Any, tokens: Any) -> None:
        append(writer, tokens)
        with jsonl.open("a") as file:
            file.write("\n")
        monkeypatch.undo()

    monkeypatch.setattr(ShardWriter, "append", change)
    with pytest.raises(DataError, match=r"stories\.jsonl has changed while it was read"):
        make(JsonLines(jsonl), tmp_path / "out", small)
    with pytest.raises(DataError, match=r"stories\.jsonl has changed since"):
        make(JsonLines(jsonl), tmp_path / "out", small)


def test_a_partial_shard_that_was_damaged(begun: Path, small: BPETokenizer, jsonl: Path) -> None:
    state = json.loads((begun / ".prepare" / "progress.json").read_text())["splits"]["train"]
    size = 2 * state["tokens"]
    name = f"train_{len(state['shards']):05d}.bin"  # has become whole since, perhaps
    partial = next(path for path in (begun / name, begun / ".prepare" / name) if path.exists())
    os.truncate(partial, size - 2)
    message = rf"{name} has {size - 2:,} bytes; expected {size:,} .*Start again with --overwrite"
    with pytest.raises(DataError, match=message):
        make(JsonLines(jsonl), begun, small)
    (begun / ".prepare" / name).unlink()  # where it was brought back to
    with pytest.raises(DataError, match=rf"{name} is missing; expected"):
        make(JsonLines(jsonl), begun, small)
    make(JsonLines(jsonl), begun, small, overwrite=True)
    Dataset(begun).verify()


def test_a_folder_that_is_not_ours(tmp_path: Path, small: BPETokenizer, jsonl: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"out is not empty and no dataset: it holds thesis\.txt"):
            make(JsonLines(jsonl), tmp_path / "out", small, overwrite=overwrite)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    with pytest.raises(DataError, match=r"thesis\.txt is a file; expected a folder"):
        make(JsonLines(jsonl), tmp_path / "out" / "thesis.txt", small)


def test_overwriting_deletes_nothing_else(tmp_path: Path, small: BPETokenizer, jsonl: Path) -> None:
    make(JsonLines(jsonl), tmp_path / "out", small)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    make(JsonLines(jsonl), tmp_path / "out", small, overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_two_at_once(tmp_path: Path, small: BPETokenizer, jsonl: Path) -> None:
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / ".lock"),
        pytest.raises(DataError, match=r"another process prepares .*out \(it holds .*\.lock\)"),
    ):
        make(JsonLines(jsonl), tmp_path / "out", small)


def test_a_full_disk(begun: Path, small: BPETokenizer, jsonl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match=r"the disk of .*begun is full \(.* free some and run again to go on"):
            make(JsonLines(jsonl), begun, small)
    make(JsonLines(jsonl), begun, small)
    Dataset(begun).verify()


def test_nothing_to_train_on(tmp_path: Path, small: BPETokenizer) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": " "}\n' * 3)
    with pytest.raises(DataError, match="the sources hold nothing to train on; 3 documents were empty"):
        prepare(find_sources([tmp_path / "a.jsonl"]), tmp_path / "out", small)


def test_settings_that_make_no_sense(tmp_path: Path, small: BPETokenizer, jsonl: Path) -> None:
    source: Source = JsonLines(jsonl)
    for settings, message in (
        ({"val_fraction": 1.0}, "val_fraction is 1.0; expected"),
        ({"shard_tokens": 0}, "shard_tokens is 0; expected"),
        ({"workers": -1}, "workers is -1; expected"),
        ({"split": "half"}, "split is 'half'; expected auto, end or documents"),
        ({"split": "end"}, "split is end, which divides a single text file"),
        ({"kind": "video"}, "kind is 'video'; expected text or chat"),
        ({"kind": "chat"}, "no chat template"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare([source], tmp_path / "out", small, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokenizer is 'gpt2'; expected 'characters', or a Tokenizer"):
        prepare([source], tmp_path / "out", "gpt2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there are no sources"):
        prepare([], tmp_path / "out", small)
    with pytest.raises(ValueError, match="a source's split is 'test'"):
        prepare([replace(JsonLines(jsonl), split="test")], tmp_path / "out", small)
