"""Tokenizers, texts and small datasets."""

import json
import os
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from fusedlm.data.dataset import Dataset
from fusedlm.data.documents import find_sources
from fusedlm.data.prepare import prepare
from fusedlm.tokenizer.bpe import BPETokenizer
from fusedlm.tokenizer.description import BPEDescription, added_token, bpe_document, byte_level
from fusedlm.tokenizer.huggingface import read_directory

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
END_OF_SMALL = 264


@pytest.fixture(scope="session")
def gpt2(gpt2_files: Path) -> BPETokenizer:
    return BPETokenizer.from_directory(gpt2_files)


@pytest.fixture(scope="session")
def small() -> BPETokenizer:
    """A token a byte and a few of two or more, which loads fast; END_OF_SMALL ends a document."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("c", "a"), ("ca", "t"), ("Ġ", "the"), ("Ġ", "cat"), ("h", "e"), ("e", "Ġ")]
    vocab = {token: id for id, token in enumerate([*letters, *(a + b for a, b in merges)])}
    end = added_token(len(vocab), "<|endoftext|>", special=True)
    assert end["id"] == END_OF_SMALL
    document = bpe_document(vocab, merges, byte_level(use_regex=True), added_tokens=[end])
    return BPETokenizer(BPEDescription(source="small", document=document, named_tokens={"eos_token": "<|endoftext|>"}))


@pytest.fixture(scope="session")
def chat_tokenizer(gpt2_files: Path) -> Callable[..., BPETokenizer]:
    """GPT-2's tokens and two of ChatML, with a template."""

    @cache
    def build(template: str = CHATML) -> BPETokenizer:
        description = read_directory(gpt2_files)
        added = [
            {"id": 50257 + i, "content": token, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": True}
            for i, token in enumerate(("<|im_start|>", "<|im_end|>"))
        ]
        document: dict[str, Any] = {**description.document, "added_tokens": added}
        fields = {**vars(description), "document": document, "chat_template": template}
        named = {**description.named_tokens, "eos_token": "<|im_end|>"}
        return BPETokenizer(type(description)(**{**fields, "named_tokens": named}))

    return build


@pytest.fixture(scope="session")
def stories() -> list[str]:
    """500 documents of 0 to 60 words, some of them the same."""
    rng = random.Random(7)
    words = ["the", "cat", "Übermut", "sat", "on", "42", "mats.", "It's", "naïve", "日本語", "\n", "\n\n", "end!"]
    made = [" ".join(rng.choices(words, k=rng.randint(1, 60))) for _ in range(450)]
    stories = [*made, *rng.sample(made, 30), *([" \n"] * 20)]
    rng.shuffle(stories)
    return stories


@pytest.fixture
def jsonl(tmp_path: Path, stories: list[str]) -> Path:
    """The documents, a line each, and a few empty lines."""
    path = tmp_path / "stories.jsonl"
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(stories)]
    path.write_text("\n".join([*lines[:100], "", " ", *lines[100:]]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def characters_dataset(tmp_path: Path) -> Callable[..., Dataset]:
    """A dataset of some texts, a file and a document each, all in "train", with the characters as tokens."""

    def build(texts: list[str], *, shard_tokens: int = 100) -> Dataset:
        folder = tmp_path / "texts"
        folder.mkdir()
        for i, text in enumerate(texts):
            (folder / f"{i:04d}.txt").write_text(text, encoding="utf-8", newline="")
        output = tmp_path / "dataset"
        prepare(
            find_sources([folder]), output, "characters", val_fraction=0, split="documents", shard_tokens=shard_tokens
        )
        return Dataset(output)

    return build


@pytest.fixture
def many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks so small that a preparation has many, and can stop between any of them."""
    monkeypatch.setattr("fusedlm.data.chunks._CHUNK", 2000)
    for name in ("pieces", "files"):
        monkeypatch.setattr(f"fusedlm.data.{name}.PIECE", 60)  # so that it also stops within documents
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # each takes a disk 10 ms, and these are thousands
