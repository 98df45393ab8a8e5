"""A byte-level BPE as Hugging Face lays it out in a directory, read and written.

The vocabulary and merges come from tokenizer.json, else from vocab.json and merges.txt, else from encoder.json and
vocab.bpe (the names of GPT-2's release). Beside them, where present: tokenizer_config.json, special_tokens_map.json,
added_tokens.json, chat_template.jinja, and generation_config.json for the ids that end a generation.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fusedlm.tokenizer.description import BPEDescription, added_token, bpe_document, byte_level
from fusedlm.tokenizer.files import read_json, read_text, write_json, write_text

TOKENIZER_FILE = "tokenizer.json"
SPLIT_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
_GPT2_END = "<|endoftext|>"


def looked_for() -> str:
    """The files one of which a directory needs, for errors."""
    return ", or ".join([TOKENIZER_FILE, *(" with ".join(pair) for pair in SPLIT_FILES)])


def has_bpe_files(directory: Path) -> bool:
    """Whether a directory has any file that only a BPE tokenizer has."""
    return any(
        (directory / name).exists() for name in (TOKENIZER_FILE, *(name for pair in SPLIT_FILES for name in pair))
    )


def read_directory(directory: Path) -> BPEDescription:
    """What a directory's files describe. Raises ValueError where they are missing, broken or of an unknown form."""
    config = _read_optional(directory / "tokenizer_config.json")
    special_map = _read_optional(directory / "special_tokens_map.json")
    generation = _read_optional(directory / "generation_config.json")
    named = {
        role: text
        for role in _ROLES
        if (text := _token_text(config[role] if role in config else special_map.get(role), role)) is not None
    }
    gpt2 = config.get("tokenizer_class") in _GPT2_CLASSES
    if (directory / TOKENIZER_FILE).exists():
        source = directory / TOKENIZER_FILE
        document = read_json(source)
    else:
        source, document = _read_split_files(directory, config)
        gpt2 = True
    texts = _texts_by_id(document)
    if gpt2 and _GPT2_END in texts.values():
        # The defaults of GPT-2's tokenizer, which its files do not state.
        named = {role: _GPT2_END for role in ("bos_token", "eos_token", "unk_token") if role not in config} | named
    eos_ids = _ids(generation.get("eos_token_id"), directory)
    for role, ids in (("bos_token", _ids(generation.get("bos_token_id"), directory)), ("eos_token", eos_ids)):
        if ids and ids[0] in texts:
            named.setdefault(role, texts[ids[0]])
    add_bos = config.get("add_bos_token")
    return BPEDescription(
        source=str(source),
        document=document,
        named_tokens=named,
        extra_special_tokens=[*_extra_special_tokens(special_map), *_extra_special_tokens(config)],
        eos_ids=frozenset(eos_ids),
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        chat_template=_chat_template(directory, config),
    )


def write_directory(
    directory: Path,
    document: str,
    *,
    named_tokens: Mapping[str, str],
    bos_id: int | None,
    eos_ids: Iterable[int],
    chat_template: str | None,
) -> None:
    """Write what read_directory and transformers.AutoTokenizer read, over what tokenizer a directory holds.

    document: the text of tokenizer.json, with a post-processor that adds the bos token where one is to be added.
    eos_ids: the first is eos_token's. They go into generation_config.json, whose other settings stay.
    """
    directory.mkdir(parents=True, exist_ok=True)
    generation_path = directory / "generation_config.json"
    generation = _read_optional(generation_path)
    before = dict(generation)
    for key, ids in (("bos_token_id", [] if bos_id is None else [bos_id]), ("eos_token_id", list(eos_ids))):
        generation.pop(key, None)
        if ids:
            generation[key] = ids[0] if len(ids) == 1 else ids
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **named_tokens,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    write_text(directory / TOKENIZER_FILE, document)
    write_json(directory / "tokenizer_config.json", config)
    if generation != before:
        write_json(generation_path, generation)
    # These would speak louder than tokenizer_config.json, for the tokenizer that was here before.
    for name in ("chat_template.jinja", "special_tokens_map.json", "added_tokens.json"):
        (directory / name).unlink(missing_ok=True)


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _read_split_files(directory: Path, config: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    for vocab_name, merges_name in SPLIT_FILES:
        vocab_path, merges_path = directory / vocab_name, directory / merges_name
        if not vocab_path.exists() and not merges_path.exists():
            continue
        for path, other in ((vocab_path, merges_path), (merges_path, vocab_path)):
            if not path.exists():
                raise ValueError(f"{directory} has {other.name} but no {path.name}; expected both")
        kind = config.get("tokenizer_class")
        if kind is not None and kind not in _GPT2_CLASSES:
            raise ValueError(
                f"{directory} is for a {kind}, whose pre-tokenizer {vocab_name} and {merges_name} do not tell; "
                f"expected {TOKENIZER_FILE}"
            )
        add_prefix_space = config.get("add_prefix_space") is True
        document = bpe_document(
            read_json(vocab_path),
            _read_merges(merges_path),
            byte_level(use_regex=True, add_prefix_space=add_prefix_space),
            added_tokens=_added_tokens(directory, config),
        )
        return vocab_path, document
    raise ValueError(f"{directory} holds no tokenizer: looked for {looked_for()}")


def _read_merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, space, right = line.partition(" ")
        if not (left and space and right) or " " in right:
            raise ValueError(f"{path}: line {number} is {line!r}; expected two tokens with a space between them")
        merges.append((left, right))
    return merges


def _added_tokens(directory: Path, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Added tokens of a directory without tokenizer.json, by id."""
    entries: dict[int, dict[str, Any]] = {}
    for content, id in _read_optional(directory / "added_tokens.json").items():
        if not isinstance(id, int):
            raise ValueError(
                f"{directory / 'added_tokens.json'} has id {id!r} for {content!r}; expected a whole number"
            )
        entries[id] = added_token(id, content, special=False)
    decoder = config.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict):
        raise ValueError(f"{directory}: added_tokens_decoder is a {type(decoder).__name__}; expected an object")
    for key, entry in decoder.items():
        if not (key.isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str)):
            raise ValueError(f"{directory}: added_tokens_decoder has {key!r}: {entry!r}; expected an id and its token")
        entries[int(key)] = added_token(int(key), entry["content"], special=False) | entry
    return [entries[id] for id in sorted(entries)]


def _texts_by_id(document: Mapping[str, Any]) -> dict[object, str]:
    """Tokens by id, as far as an unchecked document has them."""
    model, added = document.get("model"), document.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    texts: dict[object, str] = {}
    if isinstance(vocab, dict):
        texts |= {id: token for token, id in vocab.items() if isinstance(id, int)}
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("id"), int) and isinstance(entry.get("content"), str):
            texts[entry["id"]] = entry["content"]
    return texts


def _token_text(value: object, what: str) -> str | None:
    """A token as tokenizer_config.json gives it: its text, or an object with that and its flags."""
    text = value.get("content") if isinstance(value, dict) else value
    if text is None or isinstance(text, str):
        return text or None
    raise ValueError(f"{what} is {value!r}; expected a token's text, or an object with its content")


def _extra_special_tokens(config: Mapping[str, Any]) -> Iterable[str]:
    for key in ("additional_special_tokens", "extra_special_tokens"):
        values = config.get(key) or []
        if not isinstance(values, list | dict):
            raise ValueError(f"{key} is {values!r}; expected a list of tokens, or an object of them")
        for value in values.values() if isinstance(values, dict) else values:
            if (text := _token_text(value, f"one of {key}")) is not None:
                yield text


def _ids(value: object, directory: Path) -> list[int]:
    ids: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(id, int) and not isinstance(id, bool) for id in ids):
        raise ValueError(
            f"{directory / 'generation_config.json'} has token id {value!r}; expected one or a list of them"
        )
    return ids


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    template = read_text(path) if path.exists() else config.get("chat_template")
    if isinstance(template, list):
        # Several, by name; the others are for uses that we do not have.
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is None or isinstance(template, str):
        return template
    raise ValueError(f"{directory}: chat_template is a {type(template).__name__}; expected a Jinja template")
