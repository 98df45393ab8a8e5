"""Texts in files, and what reading any file takes: opening it, knowing it again, its errors."""

import codecs
import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from fusedlm.checkpoint.downloads import file_sha256
from fusedlm.data.errors import DataError
from fusedlm.data.pieces import PIECE, Piece, place_to_cut

_BLOCK = 1 << 20  # bytes read at once


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
        with opened(self.path) as (file, raw):
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


def identity(path: Path) -> dict[str, Any]:
    """A file's size in bytes, time of change in ns, and SHA-256. Raises DataError where it cannot be read."""
    try:
        stat = path.stat()
        return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": file_sha256(path)}
    except OSError as error:
        raise unreadable(path, error) from None


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A file's content, and the file itself: the same where it is not compressed."""
    try:
        raw = path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from None
    with raw:
        if path.suffix.lower() == ".gz":
            yield cast(BinaryIO, gzip.GzipFile(fileobj=raw)), raw
        else:
            yield raw, raw


def unreadable(path: Path, error: Exception) -> DataError:
    """The error to raise for a file that cannot be read."""
    return DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}")


def _blocks(path: Path) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    with opened(path) as (file, _):
        try:
            while block := file.read(_BLOCK):
                yield np.frombuffer(block, np.uint8)
        except (OSError, EOFError) as error:
            raise unreadable(path, error) from None


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
        raise unreadable(path, error) from None
