"""What every source of a byte-level BPE (tokenizer.json, vocab and merges, GGUF metadata) is brought to.

A tokenizer.json as a dict, in the `tokenizers` library's format, with what lies beside it in the other files. Only
byte-level BPE passes the check: there each byte of the text's UTF-8 is a symbol, written as one printable character.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# GPT-2's spelling of bytes: printable Latin-1 as itself, the other bytes in order as the characters from U+0100.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {byte: byte for byte in _PRINTABLE} | {0x100 + i: byte for i, byte in enumerate(_OTHERS)}
_ALPHABET = frozenset(map(chr, _BYTE_OF))

BYTE_LEVEL_DECODER = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


@dataclass(frozen=True, kw_only=True)
class BPEDescription:
    """A byte-level BPE tokenizer, not yet checked.

    source: how errors name where it came from.
    document: the contents of a tokenizer.json.
    named_tokens: "bos_token", "eos_token" and so on, and their texts.
    extra_special_tokens: texts of further control tokens that the document need not flag as such.
    eos_ids: the ids that end a generation, named_tokens' own aside.
    add_bos: whether a plain prompt begins with the bos token; None: as the document's post-processor has it.
    """

    source: str
    document: Mapping[str, Any]
    named_tokens: Mapping[str, str] = field(default_factory=dict)
    extra_special_tokens: Sequence[str] = ()
    eos_ids: frozenset[int] = frozenset()
    add_bos: bool | None = None
    chat_template: str | None = None


def spelled_bytes(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary spells; one that is not in that spelling stands for itself."""
    if _ALPHABET.issuperset(token):
        return token.translate(_BYTE_OF).encode("latin-1")
    return token.encode("utf-8")


def byte_level(*, use_regex: bool, add_prefix_space: bool = False) -> dict[str, Any]:
    """The pre-tokenizer that spells bytes; use_regex: and first splits as GPT-2 did."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def added_token(id: int, content: str, *, special: bool) -> dict[str, Any]:
    """An entry of a document's added_tokens: a token found in the text before anything else is."""
    return {
        "id": id,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def bpe_document(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    pre_tokenizer: Mapping[str, Any],
    *,
    added_tokens: Sequence[Mapping[str, Any]] = (),
    ignore_merges: bool = False,
) -> dict[str, Any]:
    """A tokenizer.json for a byte-level BPE without a normalizer.

    ignore_merges: a piece of text that is a token as a whole becomes that token, whatever the merges make of it.
    """
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added_tokens),
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": BYTE_LEVEL_DECODER,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": vocab,
            "merges": merges,
        },
    }


def check_document(document: Mapping[str, Any], source: str) -> None:
    """Raise ValueError unless the document is a byte-level BPE whose vocabulary, merges and added tokens agree."""
    model = _mapping(document.get("model"), "model", source)
    # Old files leave the type out.
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"{source} is a {model['type']} tokenizer; expected a byte-level BPE")
    decoder = _mapping(document.get("decoder") or {"type": None}, "decoder", source)
    if decoder.get("type") != "ByteLevel":
        raise ValueError(f"{source} is a BPE with decoder {decoder.get('type')}; expected a byte-level BPE (ByteLevel)")
    if "ByteLevel" not in _pre_tokenizer_types(document.get("pre_tokenizer")):
        raise ValueError(f"{source} has no ByteLevel pre-tokenizer; expected a byte-level BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise ValueError(f"{source}: the model has {key} {model[key]!r}; expected none in a byte-level BPE")
    _check_post_processor(document.get("post_processor"), source)
    vocab = _mapping(model.get("vocab"), "vocab", source)
    _check_vocab(vocab, source)
    _check_merges(vocab, model.get("merges"), source)
    _check_added_tokens(vocab, document.get("added_tokens") or [], source)


def _mapping(value: object, name: str, source: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{source}: {name} is a {type(value).__name__}; expected an object")
    return value


def _pre_tokenizer_types(pre_tokenizer: object) -> Iterable[object]:
    if isinstance(pre_tokenizer, Mapping):
        yield pre_tokenizer.get("type")
        nested = pre_tokenizer.get("pretokenizers")
        for one in nested if isinstance(nested, list) else ():
            yield from _pre_tokenizer_types(one)


def _check_post_processor(processor: object, source: str) -> None:
    """A template whose tokens it does not define makes the library panic, and only once it is used."""
    if not isinstance(processor, Mapping):
        return
    nested = processor.get("processors")
    for one in nested if isinstance(nested, list) else ():
        _check_post_processor(one, source)
    if processor.get("type") != "TemplateProcessing":
        return
    defined = _mapping(processor.get("special_tokens"), "the post-processor's special_tokens", source)
    for key in ("single", "pair"):
        pieces = processor.get(key)
        for piece in pieces if isinstance(pieces, list) else ():
            token = piece.get("SpecialToken") if isinstance(piece, Mapping) else None
            name = token.get("id") if isinstance(token, Mapping) else None
            if isinstance(name, str) and name not in defined:
                raise ValueError(f"{source}: the post-processor uses {name!r}, which it does not define")


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32


def _check_vocab(vocab: Mapping[str, Any], source: str) -> None:
    if not vocab:
        raise ValueError(f"{source}: the vocabulary is empty")
    token_of: dict[int, str] = {}
    for token, id in vocab.items():
        if not _is_id(id):
            raise ValueError(f"{source}: token {token!r} has id {id!r}; expected a whole number, 0 or more")
        if token_of.setdefault(id, token) is not token:
            raise ValueError(f"{source}: id {id} is given to both {token_of[id]!r} and {token!r}")


def _check_merges(vocab: Mapping[str, Any], merges: object, source: str) -> None:
    if not isinstance(merges, list):
        raise ValueError(f"{source}: merges is a {type(merges).__name__}; expected a list")
    for i, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        left, right = pair if isinstance(pair, (list, tuple)) and len(pair) == 2 else (None, None)
        if not (isinstance(left, str) and isinstance(right, str)):
            raise ValueError(f"{source}: merge {i} is {merge!r}; expected two tokens")
        if not (left in vocab and right in vocab and left + right in vocab):
            unknown = next(token for token in (left, right, left + right) if token not in vocab)
            raise ValueError(
                f"{source}: merge {i}, of {left!r} and {right!r}, needs {unknown!r}, which the vocabulary lacks"
            )


def _check_added_tokens(vocab: Mapping[str, int], added_tokens: object, source: str) -> None:
    if not isinstance(added_tokens, list):
        raise ValueError(f"{source}: added_tokens is a {type(added_tokens).__name__}; expected a list")
    token_of = {id: token for token, id in vocab.items()}
    contents = set()
    for entry in added_tokens:
        content, id = _mapping(entry, "an added token", source).get("content"), entry.get("id")
        if not isinstance(content, str) or not content or not _is_id(id):
            raise ValueError(f"{source}: added token {content!r} has id {id!r}; expected some text and a whole number")
        if content in contents:
            raise ValueError(f"{source}: added token {content!r} is there twice")
        contents.add(content)
        if token_of.setdefault(id, content) != content:
            raise ValueError(f"{source}: id {id} is given to both {token_of[id]!r} and {content!r}")
        if content in vocab and vocab[content] != id:
            raise ValueError(
                f"{source}: token {content!r} has id {vocab[content]} in the vocabulary, {id} as added token"
            )
