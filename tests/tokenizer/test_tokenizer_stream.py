"""IncrementalDecoder: whole characters only, and joined exactly what decode gives."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from fusedlm.tokenizer.bpe import BPETokenizer
from fusedlm.tokenizer.characters import CharacterTokenizer
from fusedlm.tokenizer.interface import Tokenizer as Interface
from fusedlm.tokenizer.stream import IncrementalDecoder


@pytest.fixture
def tokenizer(small: Tokenizer, directory_of: Callable[..., Path]) -> BPETokenizer:
    return BPETokenizer.from_directory(directory_of(small))


def _stream(tokenizer: Interface, ids: list[int], *, skip_special: bool = True) -> list[str]:
    decoder = IncrementalDecoder(tokenizer, skip_special=skip_special)
    return [*(decoder.push(id) for id in ids), decoder.finish()]


def test_pieces_of_an_emoji_come_together(tokenizer: BPETokenizer) -> None:
    byte_id = {tokenizer.token_bytes(id): id for id in range(tokenizer.vocab_size)}
    ids = [byte_id[bytes([byte])] for byte in "é👍🏽".encode()]
    assert _stream(tokenizer, ids) == ["", "é", "", "", "", "👍", "", "", "", "🏽", ""]
    # Cut short, and then something else: one U+FFFD for what cannot be a character any more.
    assert _stream(tokenizer, ids[:5]) == ["", "é", "", "", "", "\ufffd"]
    assert _stream(tokenizer, [*ids[2:5], byte_id[b"a"]]) == ["", "", "", "\ufffda", ""]
    assert _stream(tokenizer, [byte_id[b"\xff"], byte_id[b"\x80"]]) == ["\ufffd", "\ufffd", ""]


def test_joined_it_is_what_decode_gives(tokenizer: BPETokenizer, texts: list[str]) -> None:
    rng = random.Random(3)
    for _ in range(300):
        ids = [rng.choice((rng.randrange(3, 260), rng.randrange(tokenizer.vocab_size), 2)) for _ in range(20)]
        for skip_special in (True, False):
            pieces = _stream(tokenizer, ids, skip_special=skip_special)
            assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip_special)
    for text in texts:
        assert "".join(_stream(tokenizer, tokenizer.encode(text))) == text


def test_special_tokens(tokenizer: BPETokenizer) -> None:
    byte_id = {tokenizer.token_bytes(id): id for id in range(tokenizer.vocab_size)}
    first, second = (byte_id[bytes([byte])] for byte in "é".encode())
    assert _stream(tokenizer, [first, 2, second]) == ["", "", "é", ""]
    assert _stream(tokenizer, [2, first], skip_special=False) == ["<|im_end|>", "", "\ufffd"]


def test_it_can_begin_again_after_finish(tokenizer: BPETokenizer) -> None:
    decoder = IncrementalDecoder(tokenizer)
    byte_id = {tokenizer.token_bytes(id): id for id in range(tokenizer.vocab_size)}
    assert decoder.push(byte_id[b"\xf0"]) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.push(byte_id[b"a"]) == "a"
    assert decoder.finish() == ""


def test_ids_without_a_token(tokenizer: BPETokenizer) -> None:
    decoder = IncrementalDecoder(tokenizer)
    for id in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=rf"id {id} has no token"):
            decoder.push(id)


def test_characters() -> None:
    tokenizer = CharacterTokenizer.from_text("aé😀")
    assert _stream(tokenizer, tokenizer.encode("😀aé")) == ["😀", "a", "é", ""]
