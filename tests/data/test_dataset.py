import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from fusedlm.data.dataset import Dataset
from fusedlm.data.documents import find_sources
from fusedlm.data.errors import DataError
from fusedlm.data.loader import Loader
from fusedlm.data.prepare import prepare
from fusedlm.tokenizer.bpe import BPETokenizer
from fusedlm.tokenizer.characters import CharacterTokenizer
from fusedlm.tokenizer.description import BPEDescription, bpe_document, byte_level

Build = Callable[..., Dataset]


def flip(path: Path, place: int = 0) -> None:
    """Turn one bit of a file, as a bad disk does: its size and time stay."""
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_tokens_across_shards(characters_dataset: Build) -> None:
    texts = ["the first text", "a second", "3"] * 20
    dataset = characters_dataset(texts, shard_tokens=17)
    split = dataset.split("train")
    whole = dataset.tokenizer().encode("".join(texts))
    starts = [sum(map(len, texts[:i])) for i in range(len(texts))]
    assert (split.n_tokens, split.n_documents) == (len(whole), len(texts))
    for start in range(0, len(whole), 3):
        for stop in (start, start + 1, start + 16, start + 40, len(whole)):
            stop = min(stop, len(whole))
            assert split.tokens(start, stop).tolist() == whole[start:stop]
            assert split.starts(start, stop).tolist() == [s for s in starts if start <= s < stop]
    with pytest.raises(ValueError, match=r"tokens 0 to 461 are asked for; split train has 460"):
        split.tokens(0, len(whole) + 1)
    dataset.verify()


FILES = ["train_00001.bin", "train_00000.docs", "train_00002.docs"]


@pytest.mark.parametrize("name", FILES)
def test_a_shard_missing_or_cut_is_noticed_at_opening(characters_dataset: Build, name: str) -> None:
    folder = characters_dataset(["some text"] * 40).folder
    size = (folder / name).stat().st_size
    os.truncate(folder / name, size - 1)
    with pytest.raises(DataError, match=rf"{name} has {size - 1} bytes; expected {size} from dataset\.json"):
        Dataset(folder)
    (folder / name).unlink()
    with pytest.raises(DataError, match=rf"{name} is missing; expected a file of {size} bytes"):
        Dataset(folder)


@pytest.mark.parametrize("name", [*FILES, "tokenizer/characters.json"])
def test_a_flipped_bit_is_noticed_by_verify(characters_dataset: Build, name: str) -> None:
    dataset = characters_dataset(["some text"] * 40)
    seen: list[tuple[int, int]] = []
    dataset.verify(lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == sum(facts.bytes for _, facts in dataset.split("train").files())
    flip(dataset.folder / name, -3)
    with pytest.raises(DataError, match=rf"{name} has SHA-256 [0-9a-f]{{64}}; expected [0-9a-f]{{64}}"):
        Dataset(dataset.folder).verify()


def test_a_shard_that_changes_under_a_run(characters_dataset: Build) -> None:
    dataset = characters_dataset(["some text"] * 40, shard_tokens=1000)
    loader = Loader(dataset, batch_size=4, context=8, seed=0)
    shard = dataset.folder / "train_00000.bin"
    before = loader.batch(0)
    content = shard.read_bytes()
    os.utime(shard, ns=(0, 0))  # touched, with the same content
    assert torch.equal(loader.batch(0).tokens, before.tokens)
    shard.write_bytes(bytes(reversed(content)))
    with pytest.raises(DataError, match=r"train_00000\.bin has SHA-256 .*; expected"):
        loader.batch(0)
    os.truncate(shard, 2)  # reading the map beyond this would end the process
    with pytest.raises(DataError, match=r"train_00000\.bin has 2 bytes; expected"):
        loader.batch(0)
    shard.unlink()
    with pytest.raises(DataError, match=r"train_00000\.bin is missing"):
        loader.batch(0)
    shard.write_bytes(content)
    assert torch.equal(loader.batch(0).tokens, before.tokens)


def test_an_id_beyond_the_vocabulary(characters_dataset: Build) -> None:
    dataset = characters_dataset(["some text"] * 40, shard_tokens=1000)
    path = dataset.folder / "train_00000.bin"
    stat = path.stat()
    path.write_bytes(b"\xff\x00" * 360)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match=r"train_00000\.bin holds the id 255; expected ids below 7"):
        Loader(Dataset(dataset.folder), batch_size=4, context=8, seed=0).batch(0)


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    def made(name: str, text: str, tokenizer: CharacterTokenizer, **settings: int) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(text)
        prepare(find_sources([tmp_path / name]), tmp_path / name / "out", tokenizer, **settings)  # type: ignore[arg-type]
        return Dataset(tmp_path / name / "out").fingerprint

    abc = CharacterTokenizer("abc")
    first = made("first", "abcabcabc" * 10, abc)
    assert made("second", "abcabcabc" * 10, abc) == first
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "first" / "out", moved)
    assert Dataset(moved).fingerprint == first
    others = [
        made("text", "abcabcabb" * 10, abc),
        made("tokenizer", "abcabcabc" * 10, CharacterTokenizer("abcd")),
        made("shards", "abcabcabc" * 10, abc, shard_tokens=50),
    ]
    assert len({first, *others}) == 4
    dataset = Dataset(moved)
    dataset.check_fingerprint(first)
    with pytest.raises(DataError, match=rf"moved is not the one this run began with: .* expected {others[0][:12]}"):
        dataset.check_fingerprint(others[0])


def test_another_tokenizer(tmp_path: Path, gpt2: BPETokenizer, gpt2_files: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 100)
    prepare(find_sources([tmp_path / "a.txt"]), tmp_path / "out", gpt2)
    dataset = Dataset(tmp_path / "out")
    dataset.check_tokenizer(BPETokenizer.from_directory(gpt2_files))
    dataset.check_vocabulary(50304)
    with pytest.raises(DataError, match=r"the model has 50,256 tokens, and the dataset .*out 50,257"):
        dataset.check_vocabulary(50256)
    with pytest.raises(DataError, match=r"the tokenizer does not match .*out: it has 3 ids .* expected 50,257"):
        dataset.check_tokenizer(CharacterTokenizer("abc"))
    CharacterTokenizer("abc").save(tmp_path / "other")
    shutil.rmtree(dataset.folder / "tokenizer")
    shutil.copytree(tmp_path / "other", dataset.folder / "tokenizer")
    with pytest.raises(DataError, match=r"the tokenizer in .*out/tokenizer does not match"):
        dataset.tokenizer()


def test_tokenizers_with_the_same_vocabulary_that_cut_differently(tmp_path: Path, small: BPETokenizer) -> None:
    (tmp_path / "a.txt").write_text("some text " * 100)
    prepare(find_sources([tmp_path / "a.txt"]), tmp_path / "out", small)
    small.save(tmp_path / "small")
    document = json.loads((tmp_path / "small" / "tokenizer.json").read_text())
    vocab = document["model"]["vocab"]
    merges = [tuple(merge) for merge in document["model"]["merges"]]
    end = document["added_tokens"]

    def described(merges: list[tuple[str, ...]], use_regex: bool, named: Mapping[str, str]) -> BPEDescription:
        pairs = [(left, right) for left, right in merges]
        changed = bpe_document(vocab, pairs, byte_level(use_regex=use_regex), added_tokens=end)
        return BPEDescription(source="changed", document=changed, named_tokens=named)

    dataset = Dataset(tmp_path / "out")
    dataset.check_tokenizer(BPETokenizer(described(merges, True, small.named_tokens)))
    for description in (
        described(merges, False, small.named_tokens),
        described([*reversed(merges)], True, small.named_tokens),
        described(merges, True, {}),
    ):
        with pytest.raises(DataError, match="does not match the dataset"):
            dataset.check_tokenizer(BPETokenizer(description))


def test_a_split_that_is_not_there(characters_dataset: Build) -> None:
    dataset = characters_dataset(["some text"])
    with pytest.raises(DataError, match=r"has no split 'val'; there is train\. A larger --val-fraction"):
        dataset.split("val")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has version 2; expected 1"),
        ({"kind": "video"}, "has kind 'video'"),
        ({"dtype": "uint32"}, "dtype 'uint32' for 7 ids; expected text or chat, and uint16"),
        ({"vocab_size": "7"}, "vocab_size is '7'; expected a number"),
        ({"vocab": 7}, "'vocab', 'vocab_size'.*; expected"),
        ({"splits": {"test": []}}, "splits is .*; expected an object with train and val"),
        ({"splits": {"train": [{}]}}, "shard 0 of train is {}; expected an object with files"),
    ],
)
def test_a_dataset_json_that_is_not_right(characters_dataset: Build, change: dict[str, object], message: str) -> None:
    folder = characters_dataset(["some text"]).folder
    value = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**value, **change}))
    with pytest.raises(DataError, match=message):
        Dataset(folder)


def test_a_dataset_json_that_contradicts_itself(characters_dataset: Build) -> None:
    folder = characters_dataset(["some text"]).folder
    value = json.loads((folder / "dataset.json").read_text())
    for field, wrong, message in (
        ("tokens", 10, r"train_00000\.bin is said to have 18 bytes, which 10 tokens and 1 documents contradict"),
        ("documents", 2, r"train_00000\.docs is said to have 8 bytes"),
        ("name", "train_00001", "is called 'train_00001'; expected train_00000"),
        ("tokens", -9, "tokens is -9; expected a number"),
    ):
        changed = json.loads(json.dumps(value))
        changed["splits"]["train"][0][field] = wrong
        (folder / "dataset.json").write_text(json.dumps(changed))
        with pytest.raises(DataError, match=message):
            Dataset(folder)
    (folder / "dataset.json").write_text("{")
    with pytest.raises(DataError, match=r"dataset\.json is not JSON"):
        Dataset(folder)
    with pytest.raises(DataError, match=r"holds no dataset\.json"):
        Dataset(folder / "nowhere")


def test_only_files_that_were_written_to_are_read(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a cat sat on the mat\n" * 50, encoding="utf-8")
    prepare(find_sources([tmp_path / "text.txt"]), tmp_path / "data", "characters")
    dataset, said = Dataset(tmp_path / "data"), list[str]()
    dataset.verify_changed(said.append)
    assert not said
    shard = tmp_path / "data" / "train_00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(content)
    dataset.verify_changed(said.append)
    assert said[0].startswith(f"1 files of {tmp_path / 'data'} are newer than its dataset.json: reading 0.0 MB")
    shard.write_bytes(content[:9] + bytes([content[9] ^ 1]) + content[10:])
    with pytest.raises(DataError, match=r"train_00000\.bin has SHA-256"):
        dataset.verify_changed()
