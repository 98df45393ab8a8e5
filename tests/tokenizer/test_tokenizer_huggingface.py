"""Directories of Hugging Face files: every layout that is read, what save writes, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig

from fusedlm.tokenizer.bpe import BPETokenizer
from fusedlm.tokenizer.load import load_tokenizer

Write = Callable[..., Path]
Train = Callable[..., Tokenizer]

ATTRIBUTES = (
    "vocab_size",
    "bos_id",
    "eos_id",
    "eos_ids",
    "add_bos",
    "chat_template",
    "special_tokens",
    "named_tokens",
)


def _split_files(library: Tokenizer) -> dict[str, Any]:
    model = json.loads(library.to_str())["model"]
    return {
        "vocab.json": model["vocab"],
        "merges.txt": "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in model["merges"]),
    }


def test_all_layouts_of_one_tokenizer_agree(
    train: Train, directory_of: Write, texts: list[str], gpt2_files: Path, tmp_path: Path
) -> None:
    library = train("gpt2", first=True)
    directory = directory_of(None, _split_files(library))
    added = {token.content: id for id, token in library.get_added_tokens_decoder().items()}
    (directory / "added_tokens.json").write_text(json.dumps(added))
    split = load_tokenizer(directory)
    one = load_tokenizer(directory_of(library))
    for text in texts:
        assert split.encode(text, allow_special=True) == one.encode(text, allow_special=True), repr(text)
    # GPT-2's defaults, where nothing is said.
    assert split.bos_id == 0
    assert split.eos_ids == {0}

    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").write_text('{"bos_token": null}')
    split = load_tokenizer(directory)
    assert (split.bos_id, split.eos_ids) == (None, {0})

    original = load_tokenizer(gpt2_files)
    (tmp_path / "renamed").mkdir()
    shutil.copy(gpt2_files / "encoder.json", tmp_path / "renamed" / "vocab.json")
    merges = (gpt2_files / "vocab.bpe").read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "renamed" / "merges.txt").write_bytes(merges)
    renamed = load_tokenizer(tmp_path / "renamed")
    for text in texts:
        assert renamed.encode(text) == original.encode(text)


def test_settings_beside_vocab_and_merges(train: Train, directory_of: Write) -> None:
    library = train("gpt2", first=True)
    decoder = {
        "1": {"content": "<|im_start|>", "special": True},
        "2": {"content": "<|im_end|>", "special": True, "lstrip": True},
    }
    config = {"tokenizer_class": "GPT2TokenizerFast", "added_tokens_decoder": decoder, "add_prefix_space": True}
    special = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>"}
    files = {**_split_files(library), "tokenizer_config.json": config, "special_tokens_map.json": special}
    ours = BPETokenizer.from_directory(directory_of(None, files))
    assert (ours.bos_id, ours.eos_ids) == (1, {2})
    assert ours.encode("text  <|im_end|>", allow_special=True) == [*library.encode(" text").ids, 2]


@pytest.mark.parametrize("split", ["gpt2", "digits", "llama3"])
def test_save_is_read_by_transformers_and_by_us(
    split: str, train: Train, directory_of: Write, texts: list[str]
) -> None:
    library = train(split, first=split != "llama3", ignore_merges=split == "llama3")
    ids = {token: library.token_to_id(token) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}
    files = {
        "tokenizer_config.json": {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "add_bos_token": split == "llama3",
        },
        "chat_template.jinja": "{{ bos_token }}{% for m in messages %}{{ m.content }}é{% endfor %}",
        "generation_config.json": {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "temperature": 0.5},
        "special_tokens_map.json": {"unk_token": "<|endoftext|>"},
    }
    directory = directory_of(library, files)
    ours = BPETokenizer.from_directory(directory)
    assert ours.eos_ids == {ids["<|im_end|>"], ids["<|endoftext|>"]}
    target = directory.parent / "new" / "folder"
    for saved in (target, directory):
        ours.save(saved)
        again = load_tokenizer(saved)
        for name in ATTRIBUTES:
            assert getattr(again, name) == getattr(ours, name), name
        theirs = AutoTokenizer.from_pretrained(saved)
        assert (theirs.bos_token, theirs.eos_token, theirs.pad_token, theirs.unk_token) == (
            "<|im_start|>",
            "<|im_end|>",
            "<|endoftext|>",
            "<|endoftext|>",
        )
        assert theirs.chat_template == ours.chat_template
        generation = GenerationConfig.from_pretrained(saved)
        assert generation.eos_token_id == [ids["<|im_end|>"], ids["<|endoftext|>"]]
        assert generation.bos_token_id == ids["<|im_start|>"]
        for text in texts:
            assert theirs.encode(text) == ours.encode(text, allow_special=True), repr(text)
            assert again.encode(text) == ours.encode(text)
            assert theirs.decode(theirs.encode(text)) == ours.decode(
                ours.encode(text, allow_special=True), skip_special=False
            )
    # Older versions of transformers would take the spaces before punctuation away.
    assert json.loads((directory / "tokenizer_config.json").read_text())["clean_up_tokenization_spaces"] is False
    # Settings that are not the tokenizer's stay, and no temporary file does.
    assert json.loads((directory / "generation_config.json").read_text())["temperature"] == 0.5
    assert {path.name for path in target.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    }


def test_save_replaces_the_tokenizer_that_is_there(small: Tokenizer, directory_of: Write, gpt2_files: Path) -> None:
    files = {
        "tokenizer_config.json": {"eos_token": "<|im_end|>"},
        "chat_template.jinja": "old",
        "special_tokens_map.json": {"bos_token": "<|im_start|>", "unk_token": "<|im_end|>"},
        "generation_config.json": {"eos_token_id": [0, 1]},
    }
    directory = directory_of(small, files)
    gpt2 = BPETokenizer.from_directory(gpt2_files)
    gpt2.save(directory)
    again = load_tokenizer(directory)
    for name in ATTRIBUTES:
        assert getattr(again, name) == getattr(gpt2, name), name
    assert AutoTokenizer.from_pretrained(directory).chat_template is None


def test_a_failed_save_leaves_what_was_there(
    small: Tokenizer, directory_of: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = directory_of(small)
    ours = BPETokenizer.from_directory(directory)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        ours.save(directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_chat_template_by_name(small: Tokenizer, directory_of: Write) -> None:
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    directory = directory_of(small, {"tokenizer_config.json": {"chat_template": templates}})
    assert BPETokenizer.from_directory(directory).chat_template == "plain"
    (directory / "chat_template.jinja").write_text("file")
    assert BPETokenizer.from_directory(directory).chat_template == "file"


def test_bos_and_eos_of_the_generation_config(small: Tokenizer, directory_of: Write) -> None:
    ours = BPETokenizer.from_directory(
        directory_of(small, {"generation_config.json": {"bos_token_id": 1, "eos_token_id": 2}})
    )
    assert (ours.bos_id, ours.eos_id, ours.eos_ids) == (1, 2, {2})
    assert ours.named_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def _changed(library: Tokenizer, **changes: Any) -> dict[str, Any]:
    """The library's document with changes; those of the model are given as model__<key>."""
    document = json.loads(library.to_str())
    for key, value in changes.items():
        section, _, inner = key.rpartition("__")
        (document[section] if section else document)[inner] = value
    return document


def _check(directory: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_tokenizer(directory)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "model is a NoneType; expected an object"),
        ({"model__type": "WordPiece"}, "is a WordPiece tokenizer; expected a byte-level BPE"),
        ({"model__type": "Unigram"}, "is a Unigram tokenizer"),
        ({"decoder": None}, "BPE with decoder None; expected a byte-level BPE"),
        ({"decoder": {"type": "Metaspace"}}, "BPE with decoder Metaspace"),
        ({"pre_tokenizer": None}, "no ByteLevel pre-tokenizer"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}]}}, "no ByteLevel"),
        ({"pre_tokenizer": {**BYTE_LEVEL, "use_regex": "yes"}}, "refused by the tokenizers library"),
        ({"model__byte_fallback": True}, "the model has byte_fallback True"),
        ({"model__dropout": 0.1}, "the model has dropout 0.1"),
        ({"model__continuing_subword_prefix": "##"}, "continuing_subword_prefix '##'"),
        ({"model__vocab": ["a", "b"]}, "vocab is a list; expected an object"),
        ({"model__vocab": {}}, "the vocabulary is empty"),
        ({"model__vocab": {"a": "0"}}, "token 'a' has id '0'; expected a whole number"),
        ({"model__vocab": {"a": True}}, "token 'a' has id True"),
        ({"model__vocab": {"a": -1}}, "token 'a' has id -1"),
        ({"model__vocab": {"a": 1.0}}, "token 'a' has id 1.0"),
        ({"model__vocab": {"a": 7, "b": 7}}, "id 7 is given to both 'a' and 'b'"),
        ({"model__merges": None}, "merges is a NoneType; expected a list"),
        ({"model__merges": [["a", "b", "c"]]}, r"merge 0 is \['a', 'b', 'c'\]; expected two tokens"),
        ({"model__merges": ["a"]}, "merge 0 is 'a'; expected two tokens"),
        ({"model__merges": [5]}, "merge 0 is 5; expected two tokens"),
        ({"model__merges": [["a", 5]]}, "expected two tokens"),
        ({"model__merges": [["a", "€"]]}, "merge 0, of 'a' and '€', needs '€', which the vocabulary lacks"),
        ({"model__merges": ["Q Z"]}, "merge 0, of 'Q' and 'Z', needs 'QZ'"),
        ({"added_tokens": {"<s>": 1}}, "added_tokens is a dict; expected a list"),
        ({"added_tokens": [{"id": 3}]}, "added token None has id 3"),
        ({"added_tokens": [5]}, "an added token is a int; expected an object"),
        ({"added_tokens": [{"id": 3, "content": "<x>"}]}, "id 3 is given to both '!' and '<x>'"),
        ({"added_tokens": [{"id": 3, "content": "a"}]}, "id 3 is given to both"),
        ({"added_tokens": [{"id": 5000, "content": "a"}]}, "token 'a' has id 67 in the vocabulary, 5000 as added"),
        ({"added_tokens": [{"id": 5000, "content": "<x>"}]}, "refused by the tokenizers library"),
    ],
)
def test_broken_tokenizer_json(changes: dict[str, Any], message: str, small: Tokenizer, directory_of: Write) -> None:
    _check(directory_of(_changed(small, **changes)), message)


def test_added_tokens_that_contradict_the_vocabulary(small: Tokenizer, directory_of: Write) -> None:
    added = json.loads(small.to_str())["added_tokens"]
    _check(directory_of(_changed(small, added_tokens=[*added, added[0]])), "'<|endoftext|>' is there twice")
    added[-1]["id"] = 5000
    _check(
        directory_of(_changed(small, added_tokens=added)), "'   ' has id 5000, but follows a vocabulary by which it is"
    )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": "{"}, r"tokenizer.json is not JSON: line 1, column 2"),
        ({"tokenizer.json": ""}, r"tokenizer.json is not JSON"),
        ({"tokenizer.json": "[]"}, r"tokenizer.json holds a list; expected an object"),
        ({"tokenizer.json": "[" * 100_000}, r"tokenizer.json is not JSON that can be read"),
        ({"tokenizer_config.json": "{'eos': 1}"}, r"tokenizer_config.json is not JSON"),
        ({"generation_config.json": {"eos_token_id": "2"}}, "generation_config.json has token id '2'"),
        ({"generation_config.json": {"eos_token_id": [2, 5000]}}, "id 5000, to end a generation, has no token"),
        ({"tokenizer_config.json": {"eos_token": "<end>"}}, "eos_token '<end>' is not in the vocabulary"),
        ({"tokenizer_config.json": {"bos_token": "<s>"}}, "bos_token '<s>' is not in the vocabulary"),
        ({"tokenizer_config.json": {"eos_token": 2}}, "eos_token is 2; expected a token's text"),
        ({"tokenizer_config.json": {"additional_special_tokens": "x"}}, "additional_special_tokens is 'x'"),
        ({"tokenizer_config.json": {"chat_template": 5}}, "chat_template is a int; expected a Jinja template"),
    ],
)
def test_broken_files(files: dict[str, Any], message: str, small: Tokenizer, directory_of: Write) -> None:
    _check(directory_of(None if "tokenizer.json" in files else small, files), message)


def test_files_that_are_no_utf8_or_cannot_be_read(directory_of: Write) -> None:
    directory = directory_of(None)
    (directory / "tokenizer.json").write_bytes(b'{"a": "\xff"}')
    _check(directory, r"tokenizer.json is not UTF-8: byte 7 is 0xFF")
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.json").mkdir()
    _check(directory, r"tokenizer.json cannot be read: Is a directory")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merges.txt": None}, "has vocab.json but no merges.txt; expected both"),
        ({"vocab.json": None}, "has merges.txt but no vocab.json; expected both"),
        ({"vocab.json": "[]"}, "vocab.json holds a list; expected an object"),
        ({"vocab.json": '{"a": 0, "b": 0}', "merges.txt": ""}, "id 0 is given to both 'a' and 'b'"),
        ({"merges.txt": "#version: 0.2\na b\nc\n"}, "merges.txt: line 3 is 'c'; expected two tokens"),
        ({"merges.txt": "a b c\n"}, "line 1 is 'a b c'"),
        ({"merges.txt": "Q Z\n"}, "merge 0, of 'Q' and 'Z', needs 'QZ'"),
        ({"tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer"}}, "is for a Qwen2Tokenizer"),
        ({"tokenizer_config.json": {"added_tokens_decoder": []}}, "added_tokens_decoder is a list"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"x": {}}}}, "added_tokens_decoder has 'x'"),
        ({"added_tokens.json": {"<s>": "1"}}, "added_tokens.json has id '1' for '<s>'"),
        ({"added_tokens.json": {"<s>": 3}}, "id 3 is given to both"),
    ],
)
def test_broken_vocab_and_merges(changes: dict[str, Any], message: str, small: Tokenizer, directory_of: Write) -> None:
    files = {name: content for name, content in (_split_files(small) | changes).items() if content is not None}
    _check(directory_of(None, files), message)


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for load in (load_tokenizer, BPETokenizer.from_directory):
        with pytest.raises(
            ValueError, match=r"looked for tokenizer.json, or vocab.json with merges.txt, or encoder.json"
        ):
            load(tmp_path)
    with pytest.raises(ValueError, match=r"or characters.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="is not a directory"):
        load_tokenizer(tmp_path / "config.json")
    with pytest.raises(ValueError, match="is not a directory"):
        load_tokenizer(tmp_path / "nowhere")
