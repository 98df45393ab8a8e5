"""Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019 for bytes), by way of the `tokenizers` library.

The library finds the merges; what is ours is what a model needs around them: which ids are control tokens and which are
text, what ends a generation, and decoding by bytes.
"""

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken, Encoding, models
from tokenizers import Tokenizer as Library
from tokenizers.processors import PostProcessor

from fusedlm.tokenizer.description import BPEDescription, bpe_document, byte_level, check_document, spelled_bytes
from fusedlm.tokenizer.huggingface import read_directory, write_directory
from fusedlm.tokenizer.interface import check_text


class BPETokenizer:
    """A byte-level BPE tokenizer with the ids of the Hugging Face tokenizer that it describes.

    Implements fusedlm.tokenizer.interface.Tokenizer. A token is special when the description flags it so or gives it
    a part to play (bos_token, an id of eos_ids and so on), unless the merges make it of plain text: then it is text.
    Text is encoded whole, without the truncation, the padding and the end token that a tokenizer.json may ask for.
    A character whose bytes the vocabulary lacks becomes its unknown token where it has one, and else is left out.

    Raises ValueError for a description that is no byte-level BPE or contradicts itself.
    """

    def __init__(self, description: BPEDescription) -> None:
        source = description.source
        check_document(description.document, source)
        library = _load(description.document, source)
        vocab: dict[str, int] = library.get_vocab(with_added_tokens=True)
        text_of = {id: token for token, id in vocab.items()}
        self.vocab_size = max(text_of) + 1
        self.chat_template = description.chat_template

        named = _named_tokens(description, vocab)
        start = _post_processed_start(library, source)
        if start is not None and named.setdefault("bos_token", start) != start:
            raise ValueError(
                f"{source}: the post-processor begins a text with {start!r}, "
                f"but the bos token is {named['bos_token']!r}"
            )
        self.named_tokens: Mapping[str, str] = MappingProxyType(named)
        self.bos_id = vocab[named["bos_token"]] if "bos_token" in named else None
        add_bos = start is not None if description.add_bos is None else description.add_bos
        self.add_bos = add_bos and self.bos_id is not None
        self.eos_id = vocab[named["eos_token"]] if "eos_token" in named else None
        self.eos_ids = description.eos_ids if self.eos_id is None else description.eos_ids | {self.eos_id}
        for id in self.eos_ids:
            if id not in text_of:
                raise ValueError(
                    f"{source}: id {id}, to end a generation, has no token; ids go to {self.vocab_size - 1}"
                )

        with_a_part = {*named.values(), *description.extra_special_tokens, *(text_of[id] for id in self.eos_ids)}
        self.special_tokens: Mapping[str, int] = MappingProxyType(_special_tokens(library, vocab, with_a_part))
        self._special_ids = frozenset(self.special_tokens.values())
        if self.add_bos != (start is not None):
            # So that what save writes begins a text as encode does.
            library.post_processor = _bos_processor(named["bos_token"], vocab) if self.add_bos else None
        self._library = library
        self._plain = _without_special_tokens(library)
        self._splitter, self._split_ids = _splitter(library, self.special_tokens)

        added = library.get_added_tokens_decoder()
        literal = {id for id, token in added.items() if not token.special or id in self._special_ids}
        self._bytes = {id: token.encode() if id in literal else spelled_bytes(token) for id, token in text_of.items()}

    @classmethod
    def from_directory(cls, directory: Path | str) -> "BPETokenizer":
        """The tokenizer in a directory of Hugging Face files (see fusedlm.tokenizer.huggingface)."""
        return cls(read_directory(Path(directory)))

    def encode(self, text: str, *, allow_special: bool = False, add_bos: bool | None = None) -> list[int]:
        """The ids of a text; see Tokenizer.encode."""
        check_text(text)
        add_bos = self.add_bos if add_bos is None else add_bos
        if add_bos and self.bos_id is None:
            raise ValueError("add_bos is True, but this tokenizer has no bos token")
        library = self._library if allow_special else self._plain
        ids: list[int] = library.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of ids; see Tokenizer.decode."""
        skipped = self._special_ids if skip_special else frozenset()
        return b"".join(self.token_bytes(id) for id in ids if id not in skipped).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token; see Tokenizer.token_bytes."""
        value = self._bytes.get(id)
        if value is None:
            raise ValueError(f"id {id} has no token; the vocabulary's ids go from 0 to {self.vocab_size - 1}")
        return value

    def is_special(self, id: int) -> bool:
        """Whether the id is one of special_tokens."""
        return id in self._special_ids

    def split_special(self, text: str) -> list[int | str]:
        """The text cut at its special tokens; see Tokenizer.split_special. Spaces that a token takes in are its own."""
        check_text(text)
        pieces: list[int | str] = []
        end = 0
        found: Encoding = self._splitter.encode(text, add_special_tokens=False)
        for id, (start, stop) in zip(found.ids, found.offsets, strict=True):
            if start > end:
                pieces.append(text[end:start])
            pieces.append(self._split_ids[id])
            end = stop
        return [*pieces, text[end:]] if end < len(text) else pieces

    def save(self, directory: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and, for the ids that end a generation, generation_config.json.

        They replace the tokenizer that is there; transformers.AutoTokenizer reads them too.
        """
        first = [] if self.eos_id is None else [self.eos_id]
        write_directory(
            Path(directory),
            self._library.to_str(pretty=True),
            named_tokens=self.named_tokens,
            bos_id=self.bos_id,
            eos_ids=[*first, *sorted(self.eos_ids.difference(first))],
            chat_template=self.chat_template,
        )


def _load(document: Mapping[str, Any], source: str) -> Library:
    # Truncation and padding are for batches of a fixed length, not for what a text is.
    text = json.dumps({**document, "truncation": None, "padding": None})
    try:
        library = Library.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{source} is refused by the tokenizers library: {error}") from None
    loaded = {token.content: id for id, token in library.get_added_tokens_decoder().items()}
    for entry in document.get("added_tokens") or []:
        if loaded[entry["content"]] != entry["id"]:
            raise ValueError(
                f"{source}: added token {entry['content']!r} has id {entry['id']}, but follows a vocabulary by which "
                f"it is {loaded[entry['content']]}"
            )
    return library


def _named_tokens(description: BPEDescription, vocab: Mapping[str, int]) -> dict[str, str]:
    """The named tokens that are in the vocabulary, which bos and eos must be."""
    named = {role: token for role, token in description.named_tokens.items() if token in vocab}
    for role in ("bos_token", "eos_token"):
        if role in description.named_tokens and role not in named:
            raise ValueError(
                f"{description.source}: {role} {description.named_tokens[role]!r} is not in the vocabulary"
            )
    return named


def _special_tokens(library: Library, vocab: Mapping[str, int], with_a_part: set[str]) -> dict[str, int]:
    """The special tokens, by id: those that the library has flagged and those with a part to play, which get flagged.

    Not those that plain text is made into.
    """
    there = {token.content: token for token in library.get_added_tokens_decoder().values()}
    flagged = {content for content, token in there.items() if token.special}
    bare = _without_added_tokens(library)
    special = {
        token: vocab[token]
        for token in flagged | with_a_part
        if token in vocab and not _is_made_of_text(bare, token, vocab[token])
    }
    for content in special.keys() - flagged:
        library.add_special_tokens([there.get(content, AddedToken(content, normalized=False))])
    return dict(sorted(special.items(), key=lambda item: item[1]))


def _without_added_tokens(library: Library) -> Library:
    """A tokenizer that shares a library's model and has no added tokens."""
    bare = Library(library.model)
    bare.normalizer = library.normalizer
    bare.pre_tokenizer = library.pre_tokenizer
    return bare


def _without_special_tokens(library: Library) -> Library:
    """A tokenizer that shares a library's model, finds its added tokens, but reads special ones as text."""
    plain = _without_added_tokens(library)
    tokens = library.get_added_tokens_decoder()
    for id in sorted(tokens):
        plain.add_tokens([tokens[id]])
    assert plain.get_added_tokens_decoder().keys() == tokens.keys()
    plain.encode_special_tokens = True
    return plain


def _is_made_of_text(bare: Library, token: str, id: int) -> bool:
    """Whether encoding some text gives a token: its own text, or what its bytes spell."""
    texts = {token, spelled_bytes(token).decode("utf-8", errors="replace")}
    return any(bare.encode(text, add_special_tokens=False).ids == [id] for text in texts)


def _splitter(library: Library, special_tokens: Mapping[str, int]) -> tuple[Library, dict[int, int]]:
    """A tokenizer that finds the special tokens in a text and nothing else, and what its ids are in the vocabulary.

    Without a normalizer: only what is a special token to the letter is one.
    """
    splitter = Library(models.BPE())
    for token in library.get_added_tokens_decoder().values():
        if token.content in special_tokens:
            exact = AddedToken(
                token.content,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=False,
            )
            splitter.add_special_tokens([exact])
    found = splitter.get_added_tokens_decoder()
    return splitter, {id: special_tokens[token.content] for id, token in found.items()}


def _bos_processor(token: str, vocab: Mapping[str, int]) -> PostProcessor:
    """A post-processor that puts a token before a text (before both of a pair)."""

    def part(kind: str, name: str, type_id: int) -> dict[str, Any]:
        return {kind: {"id": name, "type_id": type_id}}

    # By way of JSON: TemplateProcessing's own arguments are strings in which some characters mean something.
    first, second = ([part("SpecialToken", token, i), part("Sequence", "AB"[i], i)] for i in range(2))
    processor = {
        "type": "TemplateProcessing",
        "single": first,
        "pair": [*first, *second],
        "special_tokens": {token: {"id": token, "ids": [vocab[token]], "tokens": [token]}},
    }
    document = {**bpe_document({}, [], byte_level(use_regex=False)), "post_processor": processor}
    return Library.from_str(json.dumps(document)).post_processor


def _post_processed_start(library: Library, source: str) -> str | None:
    """The token that a library's post-processor puts before a text, where it puts one."""
    own: list[int] = []
    ids: list[int] = []
    for character in string.printable:
        own, ids = library.encode(character, add_special_tokens=False).ids, library.encode(character).ids
        if own:
            break
    before = next(ids[:i] for i in range(len(ids) + 1) if ids[i : i + len(own)] == own)
    if not before:
        return None
    token: str | None = library.id_to_token(before[0])
    if len(before) > 1 or token is None:
        raise ValueError(f"{source}: the post-processor begins a text with ids {before}; expected one of a token")
    return token
