import errno
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from fusedlm.data import documents
from fusedlm.data import prepare as module
from fusedlm.data.dataset import Dataset
from fusedlm.data.documents import JsonLines, Parquet, Source, TextFile, find_sources
from fusedlm.data.errors import DataError
from fusedlm.data.format import Manifest
from fusedlm.data.prepare import Progress, prepare
from fusedlm.tokenizer.bpe import BPETokenizer
from fusedlm.tokenizer.characters import CharacterTokenizer

END = 264  # of the small tokenizer
GPT2_END = 50256


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, the lock aside."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def tokens_of(folder: Path, split: str, dtype: str = "<u2") -> list[int]:
    """A split's tokens, read without ours."""
    return [id for path in sorted(folder.glob(f"{split}_*.bin")) for id in np.fromfile(path, dtype).tolist()]


def documents_of(folder: Path, split: str) -> list[list[int]]:
    """A split's documents, read without ours."""
    ids = tokens_of(folder, split)
    starts, begin = [], 0
    for path in sorted(folder.glob(f"{split}_*.docs")):
        starts += [begin + int(start) for start in np.fromfile(path, "<i8")]
        begin += path.with_suffix(".bin").stat().st_size // 2
    return [ids[a:b] for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]


def test_a_single_text_as_nanogpt_divides_it(tmp_path: Path) -> None:
    text = "".join(random.Random(0).choices("abc déf\n日", k=5003))
    (tmp_path / "input.txt").write_bytes(text.encode())
    manifest = prepare(find_sources([tmp_path / "input.txt"]), tmp_path / "out", "characters", shard_tokens=1000)
    characters = sorted(set(text))
    ids = [characters.index(character) for character in text]
    assert tokens_of(tmp_path / "out", "train") == ids[: int(len(ids) * 0.9)]
    assert tokens_of(tmp_path / "out", "val") == ids[int(len(ids) * 0.9) :]
    assert manifest.vocab_size == len(characters)
    assert [shard.tokens for shard in manifest.splits["train"]] == [1000, 1000, 1000, 1000, 502]
    assert [shard.documents for shard in manifest.splits["train"]] == [1, 0, 0, 0, 0]
    assert Dataset(tmp_path / "out").tokenizer().decode(ids) == text


def test_documents_end_in_the_end_token(tmp_path: Path, small: BPETokenizer, jsonl: Path, stories: list[str]) -> None:
    manifest = prepare(find_sources([jsonl]), tmp_path / "out", small, val_fraction=0.2, shard_tokens=777)
    kept = [[*small.encode(text), END] for text in stories if text.strip()]
    train, val = (documents_of(tmp_path / "out", split) for split in ("train", "val"))
    # Both splits are in the order of the source, and together they are all of it.
    assert sorted(train + val) == sorted(kept)
    for some in (train, val):
        rest = iter(kept)
        assert all(document in rest for document in some)
    assert 0.1 < len(val) / len(kept) < 0.3
    assert not {tuple(document) for document in train} & {tuple(document) for document in val}
    assert manifest.left_out == 20
    assert (manifest.dtype, manifest.vocab_size) == ("uint16", 265)


def test_a_tokenizer_that_begins_texts(tmp_path: Path, gpt2_files: Path) -> None:
    for file in gpt2_files.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "add_bos_token": true}')
    tokenizer = BPETokenizer.from_directory(tmp_path)
    assert tokenizer.add_bos
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    prepare(find_sources([tmp_path / "a.jsonl"]), tmp_path / "out", tokenizer, val_fraction=0)
    one, two = tokenizer.encode("one", add_bos=False), tokenizer.encode("two", add_bos=False)
    assert documents_of(tmp_path / "out", "train") == [[GPT2_END, *one, GPT2_END], [GPT2_END, *two, GPT2_END]]


def test_more_than_65536_ids_take_four_bytes(tmp_path: Path) -> None:
    characters = [chr(c) for c in range(0x20, 0x11000) if not 0xD800 <= c < 0xE000]
    for n, dtype in ((65536, "<u2"), (65537, "<u4")):
        text = "".join(characters[:n]) + characters[0]
        (tmp_path / "a.txt").write_bytes(text.encode())
        folder = tmp_path / str(n)
        manifest = prepare(find_sources([tmp_path / "a.txt"]), folder, CharacterTokenizer(text[:-1]), val_fraction=0)
        assert tokens_of(folder, "train", dtype) == [*range(n), 0]
        assert manifest.dtype == np.dtype(dtype).name


def test_sources_of_several_kinds_and_a_validation_set_of_their_own(tmp_path: Path, small: BPETokenizer) -> None:
    (tmp_path / "a.txt").write_text("one|two|three")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"four"))
    (tmp_path / "c.jsonl").write_text('{"body": "five"}\n')
    (tmp_path / "val.txt").write_text("six")
    paths = [tmp_path / name for name in ("c.jsonl", "a.txt", "b.txt.gz")]
    sources = [
        *find_sources(paths, key="body", separator="|"),
        *find_sources([tmp_path / "val.txt"], split="val"),
    ]
    prepare(sources, tmp_path / "out", small)
    texts = ["five", "one", "two", "three", "four"]
    assert documents_of(tmp_path / "out", "train") == [[*small.encode(text), END] for text in texts]
    assert documents_of(tmp_path / "out", "val") == [[*small.encode("six"), END]]


def test_a_document_goes_where_its_content_says(tmp_path: Path, small: BPETokenizer) -> None:
    texts = [f"document {i}" for i in range(2000)]
    for name, order in (("a", texts), ("b", [*reversed(texts), *texts[:500]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in order))
        prepare(find_sources([tmp_path / f"{name}.jsonl"]), tmp_path / name, small, val_fraction=0.1)
    vals = [{tuple(document) for document in documents_of(tmp_path / name, "val")} for name in "ab"]
    assert vals[0] == vals[1]
    assert 150 < len(vals[0]) < 250  # 200 are expected, give or take 13


def test_chats(tmp_path: Path, chat_tokenizer: Callable[[], BPETokenizer]) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    rows = [{"messages": chat}, {"messages": chat[:1]}, {"messages": [*chat, *chat]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = chat_tokenizer()
    sources = find_sources([tmp_path / "a.jsonl"], key="messages")
    manifest = prepare(sources, tmp_path / "out", tokenizer, kind="chat", val_fraction=0, shard_tokens=10)
    ids = tokens_of(tmp_path / "out", "train")
    mask = [int(b) for path in sorted((tmp_path / "out").glob("train_*.mask")) for b in path.read_bytes()]
    turn = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    assert ids == tokenizer.encode(turn, allow_special=True) * 3
    answer = [*tokenizer.encode("Yes."), 50258]
    n = len(ids) // 3
    assert mask == ([0] * (n - 1 - len(answer)) + [1] * len(answer) + [0]) * 3
    assert manifest.left_out == 1
    assert [len(document) for document in documents_of(tmp_path / "out", "train")] == [n, 2 * n]
    Dataset(tmp_path / "out").verify()


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        ('{"text": "\\ud800"}', "text", r"a\.jsonl, line 2: text has a lone surrogate"),
        ('{"text": [1]}', "text", r"a\.jsonl, line 2: there is a list; expected text"),
        ('{"text": "a"}', "chat", r"line 2: there is text, 'a'; expected a chat's list of messages"),
        ('{"text": [1]}', "chat", r"line 2: messages\[0\] is a int|line 2: .*"),
    ],
)
def test_a_document_that_cannot_be_encoded_is_named(
    tmp_path: Path, chat_tokenizer: Callable[[], BPETokenizer], line: str, kind: Any, message: str
) -> None:
    good = {"chat": '{"text": [{"role": "assistant", "content": "x"}]}', "text": '{"text": "x"}'}[kind]
    (tmp_path / "a.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(DataError, match=message):
        prepare(find_sources([tmp_path / "a.jsonl"]), tmp_path / "out", chat_tokenizer(), kind=kind)


# The same bytes, whatever happens on the way


@pytest.fixture
def many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 2000)
    monkeypatch.setattr(documents, "PIECE", 60)  # so that it also stops within documents
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # each takes a disk 10 ms, and these are thousands


@pytest.fixture(params=["jsonl", "text", "parquet"])
def source(request: pytest.FixtureRequest, tmp_path: Path, jsonl: Path, stories: list[str]) -> Source:
    if request.param == "jsonl":
        return JsonLines(jsonl)
    if request.param == "text":
        (tmp_path / "a.txt").write_text("|".join(stories))
        return TextFile(tmp_path / "a.txt", separator="|")
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"text": stories}), tmp_path / "a.parquet", row_group_size=70)
    return Parquet(tmp_path / "a.parquet")


def make(source: Source, folder: Path, tokenizer: BPETokenizer, **others: Any) -> Manifest:
    return prepare([source], folder, tokenizer, val_fraction=0.1, shard_tokens=1000, **others)


class Stopped(BaseException):
    pass


def stopping_after(commits: int, monkeypatch: pytest.MonkeyPatch, then: int = 0) -> None:
    """Have the preparation stop `then` chunks after so many commits, as it appends."""
    real, append, seen = module.write_json, module.ShardWriter.append, SimpleNamespace(commits=0, chunks=0)

    def write_json(path: Path, value: Any) -> None:
        real(path, value)
        seen.commits += path.name == "progress.json"
        # With commits over all chunks, what comes later is lost; without them some chunks are.
        if seen.commits >= commits:
            monkeypatch.setattr(module, "write_json", lambda path, value: None)

    def stop(writer: Any, tokens: Any) -> None:
        append(writer, tokens)
        seen.chunks += seen.commits >= commits
        if seen.chunks > then:
            raise Stopped

    monkeypatch.setattr(module, "write_json", write_json)
    monkeypatch.setattr(module.ShardWriter, "append", stop)


def test_stopped_anywhere_it_goes_on_with_the_same_bytes(
    tmp_path: Path, small: BPETokenizer, source: Source, many_chunks: None
) -> None:
    make(source, tmp_path / "whole", small)
    expected = contents(tmp_path / "whole")
    assert len(expected) > 12
    stops = 0
    for commits in range(1, 30, 3):
        for then in (0, 7):
            folder = tmp_path / f"{commits}-{then}"
            with pytest.MonkeyPatch.context() as patch:
                stopping_after(commits, patch, then)
                try:
                    make(source, folder, small, commit_seconds=0)
                except Stopped:
                    stops += 1
            if not (folder / "dataset.json").exists():
                assert (folder / ".prepare" / "recipe.json").exists()
                with pytest.raises(DataError, match=r"holds no dataset\.json"):
                    Dataset(folder)
            make(source, folder, small)
            assert contents(folder) == expected
            shutil.rmtree(folder)
    assert stops > 8


def test_stopped_again_and_again(tmp_path: Path, small: BPETokenizer, jsonl: Path, many_chunks: None) -> None:
    source = JsonLines(jsonl)
    make(source, tmp_path / "whole", small)
    for _ in range(100):
        with pytest.MonkeyPatch.context() as patch:
            stopping_after(1, patch)
            try:
                make(source, tmp_path / "out", small, commit_seconds=0)
                break
            except Stopped:
                continue
    make(source, tmp_path / "out", small)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_number_of_processes_changes_no_byte(
    tmp_path: Path, small: BPETokenizer, jsonl: Path, many_chunks: None
) -> None:
    seen: list[Progress] = []
    for workers in (0, 1, 3):
        make(JsonLines(jsonl), tmp_path / str(workers), small, workers=workers, progress=seen.append)
        size = jsonl.stat().st_size
        assert (seen[-1].done, seen[-1].total) == (size, size)
    assert contents(tmp_path / "1") == contents(tmp_path / "0")
    assert contents(tmp_path / "3") == contents(tmp_path / "0")


KILLED = """
import multiprocessing, os, sys
from pathlib import Path
from fusedlm.data import prepare as module
from fusedlm.data.documents import JsonLines
from fusedlm.tokenizer.load import load_tokenizer

if __name__ == "__main__":
    module._CHUNK = 2000
    real = module.write_json

    def write_json(path, value):
        real(path, value)
        if path.name == "progress.json":
            print(*[p.pid for p in multiprocessing.active_children()], flush=True)

    module.write_json = write_json
    source, folder, tokenizer = sys.argv[1:]
    module.prepare([JsonLines(Path(source))], folder, load_tokenizer(tokenizer), val_fraction=0.1, shard_tokens=1000,
                   workers=2, commit_seconds=0)
"""


def test_killed_in_the_middle(tmp_path: Path, small: BPETokenizer, jsonl: Path) -> None:
    make(JsonLines(jsonl), tmp_path / "whole", small)
    (tmp_path / "killed.py").write_text(KILLED)
    small.save(tmp_path / "small")
    command = [sys.executable, tmp_path / "killed.py", jsonl, tmp_path / "out", tmp_path / "small"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert len(workers) == 2
    assert not (tmp_path / "out" / "dataset.json").exists()
    end = time.monotonic() + 10
    while any(is_running(pid) for pid in workers):  # none is left behind
        assert time.monotonic() < end
        time.sleep(0.02)
    make(JsonLines(jsonl), tmp_path / "out", small)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_that_is_killed(tmp_path: Path, small: BPETokenizer, jsonl: Path, many_chunks: None) -> None:
    import multiprocessing

    def kill(progress: Progress) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    with pytest.raises(DataError, match="a worker process has ended unexpectedly"):
        make(JsonLines(jsonl), tmp_path / "out", small, workers=1, progress=kill)
    make(JsonLines(jsonl), tmp_path / "out", small)
    Dataset(tmp_path / "out").verify()


def test_an_error_in_a_worker_is_ours(tmp_path: Path, small: BPETokenizer) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "\\ud800"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: text has a lone surrogate"):
        prepare(find_sources([tmp_path / "a.jsonl"]), tmp_path / "out", small, workers=1)


# What does not fit


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
    append = module.ShardWriter.append

    def change(writer: Any, tokens: Any) -> None:
        append(writer, tokens)
        with jsonl.open("a") as file:
            file.write("\n")
        monkeypatch.undo()

    monkeypatch.setattr(module.ShardWriter, "append", change)
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
