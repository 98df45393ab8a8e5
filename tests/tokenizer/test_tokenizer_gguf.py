"""bpe_from_gguf: metadata written as llama.cpp's converter writes it must give the original tokenizer's ids."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import AutoTokenizer

from fusedlm.tokenizer.gguf import bpe_from_gguf
from fusedlm.tokenizer.load import load_tokenizer

Train = Callable[..., Tokenizer]

PRE = {"gpt2": "gpt-2", "digits": "smollm", "llama3": "llama-bpe"}


def _metadata(library: Tokenizer, pre: str, *, padding: int = 0) -> dict[str, Any]:
    """The metadata of a Hugging Face tokenizer. padding: rows that a model has beyond its tokens."""
    model = json.loads(library.to_str())["model"]
    token_of = {id: token for token, id in library.get_vocab().items()}
    added = library.get_added_tokens_decoder()
    n = len(token_of)
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [token_of[id] for id in range(n)] + [f"[PAD{n + i}]" for i in range(padding)],
        "tokenizer.ggml.token_type": [(3 if added[id].special else 4) if id in added else 1 for id in range(n)]
        + [5] * padding,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": library.token_to_id("<|im_start|>"),
        "tokenizer.ggml.eos_token_id": library.token_to_id("<|im_end|>"),
        "tokenizer.ggml.unknown_token_id": library.token_to_id("<|endoftext|>"),
    }


@pytest.fixture(scope="session")
def smollm(small: Tokenizer) -> dict[str, Any]:
    return _metadata(small, "smollm")


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("split", ["gpt2", "digits", "llama3"])
def test_ids_are_the_original_ones(split: str, first: bool, train: Train, texts: list[str], tmp_path: Path) -> None:
    library = train(split, first=first, ignore_merges=split == "llama3")
    ours = bpe_from_gguf(_metadata(library, PRE[split], padding=3))
    bare = Tokenizer.from_str(library.to_str())
    bare.encode_special_tokens = True
    texts = [*texts, "zebrafish zebrafishes", "x <think>   </think> y"]
    for text in texts:
        assert ours.encode(text, allow_special=True, add_bos=False) == library.encode(text).ids, repr(text)
        assert ours.encode(text, add_bos=False) == bare.encode(text).ids, repr(text)
    n = library.get_vocab_size()
    assert ours.vocab_size == n + 3
    # Rows beyond the tokens write nothing, and no text is made into them.
    assert ours.decode([n, n + 2]) == ""
    assert n not in ours.encode(f"[PAD{n}]")

    ours.save(tmp_path)
    again = load_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts:
        assert again.encode(text) == ours.encode(text)
        assert theirs.encode(text) == ours.encode(text, allow_special=True)


def test_a_vocabulary_under_every_split(
    train: Train, pre_tokenizer: Callable[[str], PreTokenizer], texts: list[str]
) -> None:
    """A vocabulary trained with none of their limits shows each of them, and no two splits give the same ids."""
    library = train("free", first=True)
    metadata = _metadata(library, "")
    for split in PRE:
        library.pre_tokenizer = pre_tokenizer(split)
        library.model.ignore_merges = split == "llama3"
        expected = [library.encode(text).ids for text in texts]
        for pre in PRE.values():
            ours = bpe_from_gguf(metadata | {"tokenizer.ggml.pre": pre})
            ids = [ours.encode(text, add_bos=False, allow_special=True) for text in texts]
            assert (ids == expected) == (pre == PRE[split]), (split, pre)


def test_ids_with_a_part_to_play(smollm: dict[str, Any]) -> None:
    ours = bpe_from_gguf(smollm)
    assert (ours.bos_id, ours.eos_ids, ours.add_bos, ours.chat_template) == (1, {2}, False, None)
    assert ours.special_tokens == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert ours.named_tokens == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
    }
    more = {
        "tokenizer.ggml.eot_token_id": np.uint32(0),
        "tokenizer.ggml.eom_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.ggml.token_type": np.array(smollm["tokenizer.ggml.token_type"], dtype=np.int32),
    }
    ours = bpe_from_gguf(smollm | more)
    assert (ours.eos_ids, ours.add_bos, ours.chat_template) == ({0, 1, 2}, True, "{{ messages }}")
    assert ours.encode("a")[0] == 1
    bare = {key: value for key, value in smollm.items() if "token_id" not in key}
    ours = bpe_from_gguf(bare)
    assert (ours.bos_id, ours.eos_id, ours.eos_ids, ours.add_bos) == (None, None, frozenset(), False)


def test_where_the_file_does_not_say_whether_to_add_bos(train: Train) -> None:
    """llama.cpp adds it for the names of Llama 3's family only."""
    metadata = _metadata(train("llama3", first=False), "llama-bpe")
    assert bpe_from_gguf(metadata).add_bos
    assert not bpe_from_gguf(metadata | {"tokenizer.ggml.add_bos_token": False}).add_bos
    assert not bpe_from_gguf(metadata | {"tokenizer.ggml.pre": "gpt-2"}).add_bos


@pytest.mark.parametrize(
    ("same", "names"),
    [
        ("llama-bpe", ["llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"]),
        ("smollm", ["starcoder", "refact"]),
        ("gpt-2", ["phi-2"]),
    ],
)
def test_names_that_mean_the_same(same: str, names: list[str], train: Train, texts: list[str]) -> None:
    metadata = _metadata(train("gpt2", first=False), same)
    expected = bpe_from_gguf(metadata)
    for name in names:
        ours = bpe_from_gguf(metadata | {"tokenizer.ggml.pre": name})
        assert ours.add_bos == expected.add_bos
        assert all(ours.encode(text) == expected.encode(text) for text in texts)


def test_a_file_read_with_gguf(smollm: dict[str, Any], tmp_path: Path, texts: list[str]) -> None:
    """As written and read back by the package that defines the format."""
    path = tmp_path / "vocab.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(smollm["tokenizer.ggml.tokens"])
    writer.add_token_types(smollm["tokenizer.ggml.token_type"])
    writer.add_token_merges(smollm["tokenizer.ggml.merges"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    ours = bpe_from_gguf({key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()})
    assert (ours.bos_id, ours.eos_ids, ours.add_bos, ours.chat_template) == (1, {0, 2}, True, "{{ messages }}")
    expected = bpe_from_gguf(smollm)
    for text in texts:
        assert ours.encode(text, add_bos=False) == expected.encode(text)


def _without(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda metadata: {k: v for k, v in metadata.items() if k != f"tokenizer.ggml.{key}"}


def _with(key: str, change: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def apply(metadata: dict[str, Any]) -> dict[str, Any]:
        name = f"tokenizer.ggml.{key}"
        return metadata | {name: change(metadata.get(name)) if callable(change) else change}

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("model"), "tokenizer.ggml.model None; expected 'gpt2'"),
        (_with("model", "llama"), r"tokenizer.ggml.model 'llama' \(SentencePiece\); expected 'gpt2'"),
        (_with("model", "bert"), r"'bert' \(WordPiece\)"),
        (_with("model", "rwkv"), "'rwkv'; expected"),
        (_with("model", ["gpt2"]), "expected 'gpt2'"),
        (_without("pre"), "does not say how to split text: tokenizer.ggml.pre is None; expected one of .*smollm"),
        (_with("pre", "default"), "tokenizer.ggml.pre is 'default'; expected one of .*gpt-2.*llama-bpe"),
        (_with("pre", "tekken"), "tokenizer.ggml.pre 'tekken', which is not known; expected one of .*gpt-2"),
        (_with("pre", ["smollm"]), "which is not known"),
        (_without("tokens"), "has no tokenizer.ggml.tokens"),
        (_without("token_type"), "has no tokenizer.ggml.token_type"),
        (_without("merges"), "has no tokenizer.ggml.merges"),
        (_with("tokens", "abc"), "tokenizer.ggml.tokens of type str; expected an array"),
        (_with("tokens", 5), "tokenizer.ggml.tokens of type int; expected an array"),
        (_with("tokens", lambda tokens: [*tokens[:-1], b"x"]), "tokenizer.ggml.tokens has b'x' at 1001"),
        (_with("token_type", lambda types: types[:-1]), "1002 tokens but 1001 entries in tokenizer.ggml.token_type"),
        (_with("token_type", lambda types: [*types, 1]), "1002 tokens but 1003 entries"),
        (_with("token_type", lambda types: [6, *types[1:]]), "token 0 has type 6; expected 1"),
        (_with("token_type", lambda types: [0, *types[1:]]), "token 0 has type 0"),
        (_with("token_type", lambda types: [3] * len(types)), "no token of type 1"),
        (_with("merges", lambda merges: [*merges, "ab"]), "merge .* is 'ab'; expected two tokens"),
        (_with("merges", lambda merges: [*merges, "a b c"]), "merge .* is 'a b c'"),
        (_with("merges", lambda merges: ["Q €", *merges]), "merge 0, of 'Q' and '€', needs '€'"),
        (_with("bos_token_id", 1002), "bos_token_id 1002; expected an id below 1002"),
        (_with("eos_token_id", -1), "eos_token_id -1"),
        (_with("eos_token_id", "2"), "eos_token_id '2'"),
        (_with("eot_token_id", 2**32 - 1), "eot_token_id 4294967295"),
        (_with("add_bos_token", "yes"), "add_bos_token 'yes'; expected true or false"),
        (lambda metadata: metadata | {"tokenizer.chat_template": 5}, "chat_template of type int"),
    ],
)
def test_broken_metadata(
    change: Callable[[dict[str, Any]], dict[str, Any]], message: str, smollm: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        bpe_from_gguf(change(smollm))


@pytest.mark.parametrize("n", [0, 2, 3, 100, 900, 995])
def test_truncated_tokens(n: int, smollm: dict[str, Any]) -> None:
    cut = {key: smollm[key][:n] for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")}
    with pytest.raises(ValueError, match=r"the GGUF metadata"):
        bpe_from_gguf(smollm | cut)


def test_a_token_that_is_there_twice(smollm: dict[str, Any]) -> None:
    tokens = list(smollm["tokenizer.ggml.tokens"])
    tokens[700] = tokens[600]
    with pytest.raises(ValueError, match=r"token .* has both id 600 and id 700"):
        bpe_from_gguf(smollm | {"tokenizer.ggml.tokens": tokens})
    tokens = [*smollm["tokenizer.ggml.tokens"], "<think>"]
    types = [*smollm["tokenizer.ggml.token_type"], 4]
    with pytest.raises(ValueError, match=r"added token '<think>' is there twice"):
        bpe_from_gguf(smollm | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types})
