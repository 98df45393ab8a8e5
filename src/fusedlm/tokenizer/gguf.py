"""A byte-level BPE from a GGUF file's metadata.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. It names the pre-tokenizer rather than describing
it; each name here stands for the pre-tokenizer of the Hugging Face tokenizer that the file was made from.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fusedlm.tokenizer.bpe import BPETokenizer
from fusedlm.tokenizer.description import BPEDescription, added_token, bpe_document, byte_level

_SOURCE = "the GGUF metadata"
_PREFIX = "tokenizer.ggml."

# Llama 3's split (Dubey et al. 2024), as its tokenizer.json has it.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Family:
    """What a pre-tokenizer's name stands for. adds_bos: where the file does not say whether to."""

    pre_tokenizer: Mapping[str, Any]
    ignore_merges: bool = False
    adds_bos: bool = False


def _sequence(*steps: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


_GPT2 = _Family(byte_level(use_regex=True))
_DIGITS = _Family(_sequence({"type": "Digits", "individual_digits": True}, byte_level(use_regex=True)))
_LLAMA3 = _Family(
    _sequence(
        {"type": "Split", "pattern": {"Regex": _LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False},
        byte_level(use_regex=False),
    ),
    ignore_merges=True,
    adds_bos=True,
)

# Names that llama.cpp treats alike are alike here.
_FAMILIES: Mapping[str, _Family] = {
    **dict.fromkeys(("gpt-2", "phi-2"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact"), _DIGITS),
    **dict.fromkeys(
        (
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
            "jina-v5-nano",
        ),
        _LLAMA3,
    ),
}


# Types of tokens. Of the others, 2 is unknown, 3 control and 5 unused; 6, byte, is not for a byte-level BPE.
_NORMAL, _USER_DEFINED = 1, 4
_TYPES = range(1, 6)


def bpe_from_gguf(metadata: Mapping[str, Any]) -> BPETokenizer:
    """The tokenizer that a GGUF file's metadata describes: keys and values as the file has them, arrays as sequences.

    Tokens of type control, unknown and unused are special; user-defined ones are found whole in any text. Raises
    ValueError for a tokenizer that is no byte-level BPE, for a pre-tokenizer that is not named or not known, and for
    lists that are missing, cut short, or at odds with each other.
    """
    family = _family(metadata)
    tokens = _strings(metadata, "tokens")
    types = _token_types(metadata, len(tokens))
    normal = [id for id, kind in enumerate(types) if kind == _NORMAL]
    if not normal:
        raise ValueError(f"{_SOURCE} has no token of type {_NORMAL} (normal) in {_PREFIX}token_type")
    vocab: dict[str, int] = {}
    added: list[dict[str, Any]] = []
    for id, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        # Added tokens that follow the vocabulary get the ids that follow; those among it must be part of it.
        if id <= normal[-1] and vocab.setdefault(token, id) != id:
            raise ValueError(f"{_SOURCE}: token {token!r} has both id {vocab[token]} and id {id}")
        if kind != _NORMAL:
            added.append(added_token(id, token, special=kind != _USER_DEFINED))

    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    named = {role: _token_id(metadata, name, len(tokens)) for role, name in roles.items()}
    ends = {_token_id(metadata, name, len(tokens)) for name in ("eot", "eom")}
    return BPETokenizer(
        BPEDescription(
            source=_SOURCE,
            document=bpe_document(
                vocab,
                _merges(metadata),
                family.pre_tokenizer,
                added_tokens=added,
                ignore_merges=family.ignore_merges,
            ),
            named_tokens={role: tokens[id] for role, id in named.items() if id is not None},
            eos_ids=frozenset(id for id in ends if id is not None),
            add_bos=_flag(metadata, "add_bos_token", family.adds_bos),
            chat_template=_chat_template(metadata),
        )
    )


def _family(metadata: Mapping[str, Any]) -> _Family:
    model, name = metadata.get(f"{_PREFIX}model"), metadata.get(f"{_PREFIX}pre")
    if model != "gpt2":
        kinds = {"llama": " (SentencePiece)", "bert": " (WordPiece)", "t5": " (Unigram)"}
        raise ValueError(
            f"{_SOURCE} has {_PREFIX}model {model!r}{kinds.get(model, '') if isinstance(model, str) else ''}; "
            "expected 'gpt2', a byte-level BPE"
        )
    known = ", ".join(sorted(_FAMILIES))
    if name is None or name == "default":
        raise ValueError(
            f"{_SOURCE} does not say how to split text: {_PREFIX}pre is {name!r}; expected one of {known}. Convert "
            "the model again with a converter that writes it"
        )
    if not isinstance(name, str) or name not in _FAMILIES:
        raise ValueError(f"{_SOURCE} has {_PREFIX}pre {name!r}, which is not known; expected one of {known}")
    return _FAMILIES[name]


def _list(metadata: Mapping[str, Any], key: str) -> list[Any]:
    value = metadata.get(_PREFIX + key)
    if value is None:
        raise ValueError(f"{_SOURCE} has no {_PREFIX}{key}")
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise ValueError(f"{_SOURCE} has {_PREFIX}{key} of type {type(value).__name__}; expected an array")
    return list(value)


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = _list(metadata, key)
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise ValueError(f"{_SOURCE}: {_PREFIX}{key} has {value!r} at {i}; expected a string")
    return values


def _token_types(metadata: Mapping[str, Any], n_tokens: int) -> list[int]:
    types = _list(metadata, "token_type")
    if len(types) != n_tokens:
        raise ValueError(f"{_SOURCE} has {n_tokens} tokens but {len(types)} entries in {_PREFIX}token_type")
    for id, kind in enumerate(types):
        if kind not in _TYPES:
            raise ValueError(
                f"{_SOURCE}: token {id} has type {kind!r}; expected 1 (normal), 2 (unknown), 3 (control), "
                "4 (user-defined) or 5 (unused) in a byte-level BPE"
            )
    return [int(kind) for kind in types]


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = []
    for i, merge in enumerate(_strings(metadata, "merges")):
        left, space, right = merge.partition(" ")
        if not (left and space and right) or " " in right:
            raise ValueError(f"{_SOURCE}: merge {i} is {merge!r}; expected two tokens with a space between them")
        merges.append((left, right))
    return merges


def _token_id(metadata: Mapping[str, Any], name: str, n_tokens: int) -> int | None:
    key = f"{_PREFIX}{name}_token_id"
    value = metadata.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not hasattr(value, "__index__") or not 0 <= value < n_tokens:
        raise ValueError(f"{_SOURCE} has {key} {value!r}; expected an id below {n_tokens}, the number of tokens")
    return int(value)


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(_PREFIX + name, default)
    if value not in (False, True):
        raise ValueError(f"{_SOURCE} has {_PREFIX}{name} {value!r}; expected true or false")
    return bool(value)


def _chat_template(metadata: Mapping[str, Any]) -> str | None:
    template = metadata.get("tokenizer.chat_template")
    if template is None or isinstance(template, str):
        return template
    raise ValueError(f"{_SOURCE} has tokenizer.chat_template of type {type(template).__name__}; expected a string")
