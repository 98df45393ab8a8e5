"""What a dataset is made of, read in an order that never changes and from any place where reading once stopped.

A source gives pieces: documents, and parts of long ones, so that memory stays small and every core has work. A long
text is cut at a line end between two characters that are no white space. GPT-2's, Llama 3's and SmolLM2's splits end a
piece of text there anyway, so tokens are those of the whole.
"""

import codecs
import gzip
import importlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np

from fusedlm.checkpoint.downloads import file_sha256
from fusedlm.data.errors import DataError

PIECE = 1 << 19  # characters
_BLOCK = 1 << 20  # bytes read at once
_HUB_STATES = 256  # rows between two places to go on from
_TEXT_SUFFIXES = (".txt", ".text", ".md")
_ROW_SUFFIXES = (".jsonl", ".ndjson")

Content = str | list[Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """A document or a part of one.

    content: text, or the messages of a chat. where: how errors name it. place: JSON from which `read` goes on behind
    this piece; None where that is not possible. done: bytes of the source read so far.
    """

    content: Content
    where: str
    first: bool = True
    last: bool = True
    place: Any = None
    done: int = 0


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


@dataclass(frozen=True)
class TextFile:
    """A text in UTF-8, also compressed (.gz): one document, or as many as a separator makes.

    start, stop: of the bytes to read, which must not cut a character; stop None is the end.
    """

    path: Path
    separator: str | None = None
    split: str | None = None
    ends: bool = True
    start: int = 0
    stop: int | None = None

    def settings(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "separator": self.separator,
            "split": self.split,
            "ends": self.ends,
            "start": self.start,
            "stop": self.stop,
        }

    def read(self, place: Any = None) -> Iterator[Piece]:
        """place: the byte behind the piece, and whether a document is open there."""
        offset, is_open = place or (self.start, False)
        separator = self.separator
        ahead = len(separator) if separator else 1
        with _open(self.path) as (file, raw):
            characters = _characters(self.path, file, offset, self.stop)
            buffer, more = "", True
            while True:
                while more and len(buffer) < PIECE + ahead:
                    block = next(characters, None)
                    more = block is not None
                    buffer += block or ""
                # Looking past the piece by a separator's length, so that no cut can go through one.
                end = buffer.find(separator, 0, PIECE + ahead) if separator else -1
                if end >= 0:
                    text, used, last = buffer[:end], end + ahead, True
                elif len(buffer) <= PIECE:
                    assert not more
                    text, used, last = buffer, len(buffer), True
                else:
                    used = place_to_cut(buffer)
                    text, last = buffer[:used], False
                offset += len(buffer[:used].encode())
                buffer = buffer[used:]
                if text or is_open:
                    yield Piece(text, str(self.path), not is_open, last, [offset, not last], raw.tell() - self.start)
                is_open = not last
                if not buffer and not more and last:
                    return


@dataclass(frozen=True)
class JsonLines:
    """A document a line, also compressed (.gz): an object whose `key` has the text, or of a chat the messages."""

    path: Path
    key: str = "text"
    split: str | None = None
    ends: bool = True

    def settings(self) -> dict[str, Any]:
        return {"path": str(self.path), "key": self.key, "split": self.split, "ends": self.ends}

    def read(self, place: Any = None) -> Iterator[Piece]:
        """place: the byte behind the line, and the number of the line that begins there."""
        offset, number = place or (0, 1)
        with _open(self.path) as (file, raw):
            try:
                file.seek(offset)
                for line in file:
                    offset += len(line)
                    where = f"{self.path}, line {number}"
                    number += 1
                    if line.strip():
                        try:
                            row = json.loads(line)
                        except (ValueError, RecursionError) as error:
                            raise DataError(f"{where}, is not JSON: {error}") from None
                        yield from _pieces(_column(row, self.key, where), where, [offset, number], raw.tell())
            except (OSError, EOFError) as error:
                raise _unreadable(self.path, error) from None


@dataclass(frozen=True)
class Parquet:
    """A document a row: `key` is the column of the text, or of a chat's messages. Needs pyarrow."""

    path: Path
    key: str = "text"
    split: str | None = None
    ends: bool = True

    def settings(self) -> dict[str, Any]:
        return {"path": str(self.path), "key": self.key, "split": self.split, "ends": self.ends}

    def read(self, place: Any = None) -> Iterator[Piece]:
        """place: the number of the next row."""
        parquet = optional("pyarrow.parquet", "to read parquet files")
        skip, row = place or 0, 0
        size = self.path.stat().st_size
        try:
            with parquet.ParquetFile(self.path) as file:
                if self.key not in file.schema_arrow.names:
                    raise DataError(f"{self.path} has no column {self.key!r}; there are {file.schema_arrow.names}")
                rows = max(1, file.metadata.num_rows)
                for group in range(file.num_row_groups):
                    behind = row + file.metadata.row_group(group).num_rows
                    if behind <= skip:
                        row = behind
                        continue
                    for batch in file.iter_batches(1024, row_groups=[group], columns=[self.key]):
                        if row + batch.num_rows <= skip:
                            row += batch.num_rows
                            continue
                        for value in batch.column(0).to_pylist():
                            row += 1
                            if row > skip:
                                where = f"{self.path}, row {row}"
                                content = _column({self.key: value}, self.key, where)
                                yield from _pieces(content, where, row, size * row // rows)
        except (OSError, optional("pyarrow", "to read parquet files").ArrowException) as error:
            raise _unreadable(self.path, error) from None


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hugging Face Hub, streamed: nothing of it is kept. Needs the package datasets.

    revision: the commit, so that what is read cannot change. endpoint: see `pinned`.
    """

    repository: str
    config: str | None = None
    hub_split: str = "train"
    key: str = "text"
    revision: str | None = None
    split: str | None = None
    ends: bool = True
    path: Path | None = field(default=None, init=False)

    def settings(self) -> dict[str, Any]:
        return {
            "repository": self.repository,
            "config": self.config,
            "hub_split": self.hub_split,
            "key": self.key,
            "revision": self.revision,
            "split": self.split,
            "ends": self.ends,
        }

    def read(self, place: Any = None) -> Iterator[Piece]:
        """place: what the library's stream gives to go on from, and the number of rows before it."""
        datasets = optional("datasets", "to read datasets of the Hugging Face Hub")
        what = f"{self.repository}{f' ({self.config})' if self.config else ''}, split {self.hub_split}"
        try:
            stream = datasets.load_dataset(
                self.repository, self.config, split=self.hub_split, revision=self.revision, streaming=True
            )
            row = 0
            if place:
                state, row = place
                stream.load_state_dict(state)
            for value in stream:
                row += 1
                state = [stream.state_dict(), row] if row % _HUB_STATES == 0 else None
                where = f"{what}, row {row}"
                yield from _pieces(_column(value, self.key, where), where, state, 0)
        except DataError:
            raise
        except Exception as error:  # of the library, of its HTTP library and of the readers of every format below it
            raise DataError(
                f"{what} cannot be read: {type(error).__name__}: {error}. Run again to go on where it stopped"
            ) from error


def pinned(source: HubDataset, *, endpoint: str | None = None) -> HubDataset:
    """The source with the commit that its revision is now. Raises DataError where the Hub does not say.

    endpoint: the Hub's address, where it is not huggingface_hub's default.
    """
    from huggingface_hub import HfApi, constants

    if source.revision is not None and len(source.revision) == 40:
        return source
    try:
        info = HfApi(endpoint=endpoint).dataset_info(source.repository, revision=source.revision, timeout=10)
    except Exception as error:  # the HTTP library under huggingface_hub changed twice, and has errors of its own
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(
            f"the dataset {source.repository} cannot be asked for at {endpoint or constants.ENDPOINT}: {first}. Check "
            "the name and the network; files that are on this disk can be given by path"
        ) from error
    return replace(source, revision=info.sha)


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


def identity(path: Path) -> dict[str, Any]:
    """A file's size in bytes, time of change in ns, and SHA-256. Raises DataError where it cannot be read."""
    try:
        stat = path.stat()
        return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": file_sha256(path)}
    except OSError as error:
        raise _unreadable(path, error) from None


def place_after(path: Path, fraction: float) -> tuple[int, int]:
    """(bytes, characters) of the first int(fraction * characters) characters of a UTF-8 text."""
    n = 0
    for block in _blocks(path):
        n += int(np.count_nonzero(block & 0xC0 != 0x80))  # bytes that begin a character
    wanted, seen, offset = int(n * fraction), 0, 0
    for block in _blocks(path):
        begins = np.flatnonzero(block & 0xC0 != 0x80)
        if seen + len(begins) > wanted:
            return offset + int(begins[wanted - seen]), wanted
        seen += len(begins)
        offset += len(block)
    return offset, wanted


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


def place_to_cut(text: str) -> int:
    """How much of a text longer than PIECE the first piece takes: see the module's docstring.

    Where the second half of the piece has no such line end, before a space between two characters that are none
    (which those splits allow too), and where it has none either, at PIECE characters.
    """
    for mark, behind in (("\n", 1), (" ", 0)):
        at = text.rfind(mark, PIECE // 2, PIECE)
        while at > 0:
            if not text[at - 1].isspace() and not text[at + 1].isspace():
                return at + behind
            at = text.rfind(mark, PIECE // 2, at)
    return PIECE


def optional(module: str, purpose: str) -> Any:
    """A module of the extra `data`. Raises DataError, which says how to install it, where it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise DataError(
            f"the package {package} is needed {purpose}, and cannot be imported ({error}); "
            "install it with: pip install 'fusedlm[data]'"
        ) from None


def _pieces(content: Content, where: str, place: Any, done: int) -> Iterator[Piece]:
    """The pieces of one document that is in memory; only behind the last can reading go on."""
    first = True
    if isinstance(content, str):
        while len(content) > PIECE:
            cut = place_to_cut(content)
            yield Piece(content[:cut], where, first, False, None, done)
            content, first = content[cut:], False
    yield Piece(content, where, first, True, place, done)


def _column(row: Any, key: str, where: str) -> Content:
    if not isinstance(row, dict) or key not in row:
        found = f"the keys {sorted(map(str, row))}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise DataError(f"{where}, has {found}; expected an object with {key!r}")
    value = row[key]
    if not isinstance(value, str | list):
        raise DataError(f"{where}: {key} is {value!r:.80}; expected text, or a list of messages")
    return value


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


@contextmanager
def _open(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A file's content, and the file itself: the same where it is not compressed."""
    try:
        raw = path.open("rb")
    except OSError as error:
        raise _unreadable(path, error) from None
    with raw:
        if path.suffix.lower() == ".gz":
            yield cast(BinaryIO, gzip.GzipFile(fileobj=raw)), raw
        else:
            yield raw, raw


def _blocks(path: Path) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    with _open(path) as (file, _):
        try:
            while block := file.read(_BLOCK):
                yield np.frombuffer(block, np.uint8)
        except (OSError, EOFError) as error:
            raise _unreadable(path, error) from None


def _characters(path: Path, file: BinaryIO, start: int, stop: int | None) -> Iterator[str]:
    """The text of bytes start to stop in blocks; no block is empty."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = start
    try:
        file.seek(start)
        while block := file.read(_BLOCK if stop is None else min(_BLOCK, stop - at)):
            pending = len(decoder.getstate()[0])
            at += len(block)
            if text := decoder.decode(block):
                yield text
        pending = len(decoder.getstate()[0])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        place = at - len(block) - pending + error.start
        raise DataError(f"{path} is not UTF-8: byte {place:,} is 0x{error.object[error.start]:02X}") from None
    except (OSError, EOFError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}")
