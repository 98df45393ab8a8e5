"""Texts of many kinds, and small tokenizers trained on the spot whose ids are the truth for ours."""

import argparse
import inspect
import json
import random
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import TikTokenConverter

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

FIXED_TEXTS = [
    "",
    " ",
    "hello world",
    "Hello, WORLD! it's I'M we'Ve they'LL 'tis 'S ’s x'd",
    "long s: it'ſ, kelvin: K'K",
    "   three spaces, a tab\t\tand\n\n\nlines\r\n\r\n  \n x \u00a0\u2003y\u3000 ",
    "0 1 12 123 1234 12345678901 3.14 1,000 ½ ² Ⅻ ٣٤٥ 𝟙𝟚 一二",
    "THE'REal 'TESTing 'Mine 'Special we'Vet 'Llama 'Demand 'ſee I'MPORT it'Self 2024 1999 100 1000 10000 007",
    "naïve café, cafe\u0301, Ελληνικά, русский, עברית, العربية, हिन्दी, ไทย, 한국어, 日本語, 中文",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇦🇶 a😀b ☃",
    "\x00\x01\x02\x07\x08\x0b\x0c\x1b\x1c\x1f\x7f\x80\x85\x9f\u200b\u200d\ufeff\ufffd\uffff",
    "𠜎 \U000e0041 \U000f0000 \U0010ffff",
    "def f(x):\n    return {'a': [1, 2, 3]}  # comment\n\tif x != 0:\n",
    "<|endoftext|> <|im_end|>x<|im_start|> <| im_end |>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa !!!!!!!!!!!!!!!!!!!!!!!!!! ----====",
    " \n \n\n \t\r\n" * 7,
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Fixed texts and 300 random ones, of all of Unicode but surrogates."""
    rng = random.Random(20240229)
    blocks = [(0, 0x7F), (0x20, 0x7E), (0, 0x2FFF), (0x3000, 0xD7FF), (0xE000, 0x10FFFF), (0x1F300, 0x1F6FF)]
    common = " \n\r\t'0123456789aest\u00a0\u2009.,!"
    random_texts = []
    for _ in range(300):
        low, high = rng.choice(blocks)
        characters = (
            chr(rng.randint(low, high)) if rng.random() < 0.6 else rng.choice(common) for _ in range(rng.randint(1, 60))
        )
        random_texts.append("".join("?" if "\ud800" <= c <= "\udfff" else c for c in characters))
    return FIXED_TEXTS + random_texts


def _pre_tokenizer_of(split: str) -> pre_tokenizers.PreTokenizer:
    if split == "free":
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\s+\S*|\S+"), behavior="isolated", invert=False),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    by_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if split == "gpt2":
        return by_gpt2
    if split == "digits":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_gpt2])
    assert split == "llama3"
    # transformers keeps Llama 3's pattern as the default of its converter from tiktoken files.
    pattern = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@pytest.fixture(scope="session")
def pre_tokenizer() -> Callable[[str], pre_tokenizers.PreTokenizer]:
    """The pre-tokenizer of a split: "gpt2", "digits" (SmolLM2's), "llama3" or "free" (at spaces only)."""
    return _pre_tokenizer_of


@pytest.fixture(scope="session")
def train() -> Callable[..., Tokenizer]:
    """Train a byte-level BPE of about 1000 tokens.

    split: see pre_tokenizer. first: control tokens come before the vocabulary, as SmolLM2 has
    them, rather than after it, as Llama 3 does; CONTROL are those tokens. After them come "<think>" and a run of three
    spaces, added tokens that are no control tokens. ignore_merges: and a word, "zebrafish", that no merges make.
    """
    corpus = [inspect.getsource(module) for module in (argparse, textwrap, json)] + [
        text * 20 for text in FIXED_TEXTS if "<|" not in text
    ]

    @cache
    def trained(split: str, first: bool, ignore_merges: bool) -> str:
        tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
        tokenizer.pre_tokenizer = _pre_tokenizer_of(split)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=1000,
            show_progress=False,
            special_tokens=CONTROL if first else [],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train_from_iterator(corpus, trainer)
        if ignore_merges:
            document = json.loads(tokenizer.to_str())
            vocab = document["model"]["vocab"]
            vocab["zebrafish"] = len(vocab)
            tokenizer = Tokenizer.from_str(json.dumps(document))
        if not first:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROL])
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "   ")])
        return tokenizer.to_str()

    def build(split: str, *, first: bool, ignore_merges: bool = False) -> Tokenizer:
        return Tokenizer.from_str(trained(split, first, ignore_merges))

    return build


@pytest.fixture(scope="session")
def small(train: Callable[..., Tokenizer]) -> Tokenizer:
    """A small tokenizer of SmolLM2's kind."""
    return train("digits", first=True)


@pytest.fixture
def directory_of(tmp_path: Path) -> Callable[..., Path]:
    """Write a tokenizer.json (a Tokenizer, or a document) and further files, given by name as objects or text."""

    def write(tokenizer: Tokenizer | dict[str, Any] | None, files: dict[str, Any] | None = None) -> Path:
        directory = tmp_path / "tokenizer"
        directory.mkdir(exist_ok=True)
        contents: dict[str, Any] = dict(files or {})
        if tokenizer is not None:
            contents["tokenizer.json"] = tokenizer.to_str() if isinstance(tokenizer, Tokenizer) else tokenizer
        for name, content in contents.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (directory / name).write_text(text, encoding="utf-8", newline="")
        return directory

    return write
