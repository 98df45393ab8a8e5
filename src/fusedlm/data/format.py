"""The folder of a prepared dataset: dataset.json, shards of raw little-endian numbers, and the tokenizer's files.

    dataset.json      what is here: every shard's tokens, documents, sizes and SHA-256, the sources and the settings
    train_00000.bin   token ids, uint16 or uint32
    train_00000.docs  int64: the places among this shard's tokens where a document begins
    train_00000.mask  of chats alone, uint8: 1 for a token of an answer, else 0
    val_00000.bin ... the same for the split "val"
    tokenizer/        what fusedlm.tokenizer.load reads

A split is one stream of tokens, its shards end to end. Every shard but the last has the same number of tokens, so a
document may go on in the next shard.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fusedlm.data.errors import DataError
from fusedlm.tokenizer.files import read_json, write_json
from fusedlm.tokenizer.interface import Tokenizer

VERSION = 1
DATASET_FILE = "dataset.json"
TOKENIZER_FOLDER = "tokenizer"
SUFFIXES = ("bin", "docs", "mask")
SPLITS = ("train", "val")

Kind = Literal["text", "chat"]

# Contractions, digits, runs of space, line ends, capitals and scripts: what pre-tokenizers treat in different ways.
_PROBE = (
    "It's we'LL 'tis x'd HTTPServer2 1234567890 3.14 ½ Ⅻ  two   three\t\ttabs \n\n lines\r\n\r\nend. (a+b)!=c;\n"
    "naïve cafe\u0301 Ελληνικά русский עברית हिन्दी 日本語 한국어 😀👍🏽 <|endoftext|> </s> <s> \u00a0\u2003 ſ K \ufeff"
)


@dataclass(frozen=True)
class FileFacts:
    """A file's size and content. sha256: hexadecimal."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """documents: those that begin in this shard. files: by suffix, of SUFFIXES."""

    name: str
    tokens: int
    documents: int
    files: Mapping[str, FileFacts]


@dataclass(frozen=True)
class Manifest:
    """What dataset.json says.

    dtype: "uint16" or "uint32". tokenizer: its fingerprint. tokenizer_files: their SHA-256. left_out: empty documents,
    and chats without an answer. sources, settings: what it was made of and how, for people and for `prepare`.
    """

    version: int
    kind: Kind
    dtype: str
    vocab_size: int
    tokenizer: str
    tokenizer_files: Mapping[str, str]
    splits: Mapping[str, Sequence[Shard]]
    left_out: int
    sources: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of all that decides which tokens a run sees, and nothing else (no paths, no times)."""
        shards = {
            split: [[shard.tokens, {suffix: facts.sha256 for suffix, facts in shard.files.items()}] for shard in shards]
            for split, shards in self.splits.items()
        }
        content = [self.version, self.kind, self.dtype, self.vocab_size, self.tokenizer, shards]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The files that each shard has."""
        return suffixes_of(self.kind)

    def write(self, folder: Path) -> None:
        """Write dataset.json, whole or not at all."""
        write_json(folder / DATASET_FILE, asdict(self))


def suffixes_of(kind: Kind) -> tuple[str, ...]:
    """The files that each shard of a kind of dataset has."""
    return SUFFIXES if kind == "chat" else SUFFIXES[:2]


def shard_name(split: str, index: int) -> str:
    """A shard's name without its suffixes."""
    return f"{split}_{index:05d}"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype of shards: little-endian uint16 where every id fits, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def item_size(suffix: str, dtype: str) -> int:
    """Bytes of one number in a shard's file."""
    return {"bin": 2 if dtype == "uint16" else 4, "docs": 8, "mask": 1}[suffix]


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Hexadecimal SHA-256 of what a tokenizer does: every token's bytes, the special ones, and how texts are cut.

    Of behaviour (the texts hold every token's) and not of files, so that a tokenizer from a GGUF and the same one from
    Hugging Face agree.
    """
    digest = hashlib.sha256()
    texts = [_PROBE]
    for id in range(tokenizer.vocab_size):
        try:
            token = tokenizer.token_bytes(id)
        except ValueError:  # an id without a token
            digest.update(b"\xff\xff\xff\xff")
            continue
        digest.update(len(token).to_bytes(4, "little") + token)
        if not tokenizer.is_special(id):
            texts.append(token.decode("utf-8", errors="ignore"))
    try:
        probe: list[int] | None = tokenizer.encode("\n".join(texts), add_bos=False)
    except ValueError:  # of characters, which are all there is to it
        probe = None
    special = sorted(tokenizer.special_tokens.items())
    rest = [special, tokenizer.bos_id, tokenizer.eos_id, sorted(tokenizer.eos_ids), tokenizer.add_bos, probe]
    digest.update(json.dumps(rest).encode())
    return digest.hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """What a folder's dataset.json says. Raises DataError where there is none, or it is broken."""
    path = folder / DATASET_FILE
    if not path.is_file():
        raise DataError(f"{folder} holds no {DATASET_FILE}; expected a folder that `fusedlm data prepare` has finished")
    try:
        value = read_json(path)
    except ValueError as error:
        raise DataError(str(error)) from None
    version = value.get("version")
    if version != VERSION:
        raise DataError(f"{path} has version {version!r}; expected {VERSION}, which this fusedlm reads")
    splits = value.get("splits")
    if not isinstance(splits, dict) or not splits or not splits.keys() <= set(SPLITS):
        raise DataError(f"{path}: splits is {splits!r:.80}; expected an object with {' and '.join(SPLITS)}")
    manifest: Manifest = _read(
        Manifest, {**value, "splits": {name: _shards(path, name, shards) for name, shards in splits.items()}}, str(path)
    )
    if manifest.kind not in ("text", "chat") or manifest.dtype != token_dtype(manifest.vocab_size).name:
        raise DataError(
            f"{path} has kind {manifest.kind!r} and dtype {manifest.dtype!r} for {manifest.vocab_size} ids; expected "
            f"text or chat, and {token_dtype(manifest.vocab_size).name}"
        )
    for shards in manifest.splits.values():
        for shard in shards:
            if set(shard.files) != set(manifest.suffixes):
                raise DataError(f"{path}: {shard.name} has {sorted(shard.files)}; expected {sorted(manifest.suffixes)}")
            numbers = {"bin": shard.tokens, "docs": shard.documents, "mask": shard.tokens}
            for suffix, facts in shard.files.items():
                expected = numbers[suffix] * item_size(suffix, manifest.dtype)
                if facts.bytes != expected:
                    raise DataError(
                        f"{path}: {shard.name}.{suffix} is said to have {facts.bytes:,} bytes, which {shard.tokens:,} "
                        f"tokens and {shard.documents:,} documents contradict: they take {expected:,}"
                    )
    return manifest


def _shards(path: Path, split: str, values: Any) -> list[Shard]:
    if not isinstance(values, list):
        raise DataError(f"{path}: split {split} is a {type(values).__name__}; expected a list of shards")
    shards = []
    for i, value in enumerate(values):
        where = f"{path}: shard {i} of {split}"
        files = value.get("files") if isinstance(value, dict) else None
        if not isinstance(value, dict) or not isinstance(files, dict):
            raise DataError(f"{where} is {value!r:.80}; expected an object with files")
        facts = {suffix: _read(FileFacts, file, f"{where}, {suffix}") for suffix, file in files.items()}
        shard: Shard = _read(Shard, {**value, "files": facts}, where)
        if shard.name != shard_name(split, i):
            raise DataError(f"{where} is called {shard.name!r}; expected {shard_name(split, i)}")
        shards.append(shard)
    return shards


_NUMBERS = {"version", "vocab_size", "tokens", "documents", "left_out", "bytes"}
_STRINGS = {"kind", "dtype", "tokenizer", "name", "sha256"}


def _read(cls: type, value: Any, where: str) -> Any:
    """A dataclass of an object that has its fields, no more and no fewer."""
    names = {field.name for field in fields(cls)}
    if not isinstance(value, dict) or value.keys() != names:
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise DataError(f"{where} has {found}; expected {sorted(names)}")
    for name, item in value.items():
        is_number = isinstance(item, int) and not isinstance(item, bool) and item >= 0
        if (name in _NUMBERS and not is_number) or (name in _STRINGS and not isinstance(item, str)):
            raise DataError(f"{where}: {name} is {item!r:.80}; expected {'a number' if name in _NUMBERS else 'text'}")
    return cls(**value)
