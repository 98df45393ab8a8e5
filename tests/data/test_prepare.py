"""Datasets as they are written: tokens, documents, splits, chats."""

import gzip
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preparations import Stopped, stopping_after

from fusedlm.data.dataset import Dataset
from fusedlm.data.documents import find_sources
from fusedlm.data.errors import DataError
from fusedlm.data.prepare import prepare
from fusedlm.tokenizer.bpe import BPETokenizer
from fusedlm.tokenizer.characters import CharacterTokenizer

END = 264  # of the small tokenizer
GPT2_END = 50256


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


def test_a_share_of_the_documents(tmp_path: Path, small: BPETokenizer) -> None:
    """Whole ones in their order, each in the split it has anyway; the rest of the settings is one dataset's."""
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "story {i} ends here"}}\n' for i in range(2000)))
    sources = find_sources([tmp_path / "rows.jsonl"])
    prepare(sources, tmp_path / "all", small, val_fraction=0.2)
    manifest = prepare(sources, tmp_path / "some", small, val_fraction=0.2, share=0.25)
    sizes = []
    for split in ("train", "val"):
        every, some = ([tuple(d) for d in documents_of(tmp_path / folder, split)] for folder in ("all", "some"))
        assert some == [document for document in every if document in set(some)]
        sizes.append(len(some) / len(every))
    assert sizes == pytest.approx([0.25, 0.25], abs=0.06)  # in both splits, for the two hashes are not one
    assert manifest.left_out == 0
    with pytest.raises(DataError, match=r"with share = 0.25, not 1.0"):
        prepare(sources, tmp_path / "some", small, val_fraction=0.2)
    with pytest.raises(ValueError, match=r"share is 0; expected more than 0, and at most 1"):
        prepare(sources, tmp_path / "none", small, share=0)
    (tmp_path / "text.txt").write_text("a text")
    with pytest.raises(ValueError, match=r"share is 0.5, and the split end divides a single text"):
        prepare(find_sources([tmp_path / "text.txt"]), tmp_path / "none", small, share=0.5)


def test_a_share_of_long_documents_whatever_the_interruption(
    tmp_path: Path, small: BPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A document in several pieces is taken whole or not at all, also where reading goes on within it."""
    monkeypatch.setattr("fusedlm.data.files.PIECE", 40)
    monkeypatch.setattr("fusedlm.data.pieces.PIECE", 40)
    monkeypatch.setattr("fusedlm.data.chunks._CHUNK", 60)
    texts = ["".join(f"line {i} of {j}\n" for j in range(20)) for i in range(60)]
    (tmp_path / "long.txt").write_text("--".join(texts))
    sources = find_sources([tmp_path / "long.txt"], separator="--")
    prepare(sources, tmp_path / "whole", small, val_fraction=0.2, share=0.5)
    kept = {tuple(d) for split in ("train", "val") for d in documents_of(tmp_path / "whole", split)}
    assert 15 < len(kept) < 45
    assert kept <= {(*small.encode(text), END) for text in texts}

    with monkeypatch.context() as patch:
        stopping_after(3, patch)
        with pytest.raises(Stopped):
            prepare(sources, tmp_path / "parts", small, val_fraction=0.2, share=0.5, commit_seconds=0)
    prepare(sources, tmp_path / "parts", small, val_fraction=0.2, share=0.5)
    for split in ("train", "val"):
        assert tokens_of(tmp_path / "parts", split) == tokens_of(tmp_path / "whole", split)
