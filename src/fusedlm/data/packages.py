"""The modules of the Python packages in a folder: text in quantity that a machine with torch has, network or not."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fusedlm.data.files import unreadable
from fusedlm.data.pieces import Piece, pieces_of

LARGEST = 1 << 20  # bytes; larger modules are tables


@dataclass(frozen=True)
class PackageModules:
    """The modules in a folder and those below it, by name, a file a document.

    Those that are UTF-8, not empty and no larger than LARGEST; of several with the same content, the first. They must
    not change while they are read.
    """

    folder: Path
    split: str | None = None
    ends: bool = True
    path: Path | None = field(default=None, init=False)

    def settings(self) -> dict[str, Any]:
        """With the size in bytes and the SHA-256 of all the modules and their names. Raises DataError."""
        files, size, digest = self._files
        facts = {"path": str(self.folder), "files": len(files), "split": self.split, "ends": self.ends}
        return {**facts, "bytes": size, "sha256": digest}

    def read(self, place: Any = None) -> Iterator[Piece]:
        """place: the number of files read, and their size in bytes. Raises DataError."""
        number, done = place or (0, 0)
        files, _, _ = self._files
        for file in files[number:]:
            content = _content(file)
            number, done = number + 1, done + len(content)
            yield from pieces_of(content.decode(), str(file), [number, done], done)

    @cached_property
    def _files(self) -> tuple[list[Path], int, str]:
        """The files, their size in bytes, and a SHA-256 of them all."""
        found: list[Path] = []
        seen: set[bytes] = set()
        size, whole = 0, hashlib.sha256()
        paths = (path for path in self.folder.rglob("*.py") if path.is_file())
        for path in sorted(paths, key=lambda path: path.relative_to(self.folder).parts):
            if path.stat().st_size > LARGEST:
                continue
            content = _content(path)
            digest = hashlib.sha256(content).digest()
            if digest in seen or not content.strip() or not _is_utf8(content):
                continue
            seen.add(digest)
            found.append(path)
            size += len(content)
            whole.update(path.relative_to(self.folder).as_posix().encode("utf-8", "surrogateescape") + b"\0" + digest)
        return found, size, whole.hexdigest()


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True
