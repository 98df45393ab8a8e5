"""Sources of documents, and those of files and folders.

A source gives its documents in an order that never changes, and from any place where reading once stopped.
"""

import codecs
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from fusedlm.data.errors import DataError
from fusedlm.data.files import TextFile
from fusedlm.data.pieces import Piece
from fusedlm.data.tables import JsonLines, Parquet

_TEXT_SUFFIXES = (".txt", ".text", ".md")
_ROW_SUFFIXES = (".jsonl", ".ndjson")


class Source(Protocol):
    """Where documents come from. split: "train" or "val", or None, for which a hash of each document decides."""

    @property
    def split(self) -> str | None: ...

    @property
    def ends(self) -> bool:
        """Whether the tokenizer's begin and end tokens go around each document."""
        ...

    @property
    def path(self) -> Path | None:
        """The file, where it is one."""
        ...

    def settings(self) -> dict[str, Any]:
        """What decides which documents there are, a file's content aside; JSON."""
        ...

    def read(self, place: Any = None) -> Iterator[Piece]:
        """All pieces in order, or those behind a place. Raises DataError."""
        ...


def find_sources(
    paths: Sequence[Path],
    *,
    key: str = "text",
    separator: str | None = None,
    glob: str | None = None,
    split: str | None = None,
) -> list[Source]:
    """The sources of files and folders, in the order given; those of a folder by name, at any depth.

    key: of the text (or messages) in a row of JSONL and parquet. separator: between documents in a text file; without
    one a file is a document. glob: which files of a folder to take, as Path.rglob has it, in place of all .txt, .text,
    .md, .jsonl, .ndjson and .parquet (and .gz of these, parquet aside). Hidden files and folders are passed over.
    Raises DataError for a path that is not there and a folder without such files, ValueError for an empty separator.
    """
    if separator == "":
        raise ValueError("the separator is empty; expected some text, or None")
    sources: list[Source] = []
    for path in paths:
        if path.is_dir():
            found = sorted(_files_of(path, glob), key=lambda p: p.relative_to(path).parts)
            if not found:
                what = glob or ", ".join(f"*{s}" for s in (*_TEXT_SUFFIXES, *_ROW_SUFFIXES, ".parquet"))
                raise DataError(f"{path} holds no file to read; looked for {what} in it and the folders below")
            sources += [_source(file, key, separator, split) for file in found]
        elif path.is_file():
            sources.append(_source(path, key, separator, split))
        else:
            raise DataError(f"there is no file or folder {path}")
    return sources


def characters_of(sources: Sequence[Source]) -> str:
    """The characters that occur in all documents, sorted. Raises DataError where there are none, and for chats."""
    seen: set[str] = set()
    for source in sources:
        for piece in source.read():
            if not isinstance(piece.content, str):
                raise DataError(f"{piece.where} is a chat; expected text for a tokenizer of characters")
            seen.update(piece.content)
    if not seen:
        raise DataError("the sources hold no text")
    return "".join(sorted(seen))


def _source(path: Path, key: str, separator: str | None, split: str | None) -> Source:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    suffix = (suffixes[:-1] if suffixes[-1:] == [".gz"] else suffixes)[-1:]
    if suffix == [".parquet"]:
        return Parquet(path, key, split)
    if suffix and suffix[0] in _ROW_SUFFIXES:
        return JsonLines(path, key, split)
    return TextFile(path, separator, split)


def _files_of(folder: Path, glob: str | None) -> Iterator[Path]:
    for path in folder.rglob(glob or "*"):
        parts = path.relative_to(folder).parts
        if not path.is_file() or any(part.startswith(".") for part in parts):
            continue
        name = path.name.lower()
        known = name.removesuffix(".gz").endswith((*_TEXT_SUFFIXES, *_ROW_SUFFIXES)) or name.endswith(".parquet")
        if glob is not None or known:
            yield path


def unescaped(separator: str) -> str:
    """A separator as people type it, with the escapes of Python's strings. Raises ValueError for what is none."""
    try:
        return codecs.decode(separator.encode("latin-1", "backslashreplace"), "unicode_escape")
    except UnicodeDecodeError as error:
        raise ValueError(f"the separator is {separator!r}: {error.reason}; expected escapes such as \\n") from None
