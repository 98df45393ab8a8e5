"""Shards as they are written: whole ones under their names, the open one in a folder of its own until it is whole."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from fusedlm.checkpoint.downloads import file_sha256
from fusedlm.data.encode import Tokens
from fusedlm.data.errors import DataError
from fusedlm.data.format import FileFacts, Kind, Shard, item_size, shard_name, suffixes_of


class ShardWriter:
    """Writes one split's tokens into shards of shard_tokens each; the last may have fewer.

    `commit` makes what was appended so far last and returns its state, as JSON; a writer made with that state goes on
    exactly there, whatever has been appended since. The open shard's files are in `partial`, the others in `folder`.
    Raises DataError where a state does not fit the files.
    """

    def __init__(
        self,
        folder: Path,
        partial: Path,
        split: str,
        kind: Kind,
        dtype: np.dtype[Any],
        shard_tokens: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder = folder
        self._partial = partial
        self._split = split
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._suffixes = suffixes_of(kind)
        self._files: dict[str, IO[bytes]] = {}
        self.shards: list[Shard] = []
        self.tokens_in_open = 0
        self.documents_in_open = 0
        if state is not None:
            self._restore(state)

    @property
    def tokens(self) -> int:
        """All tokens so far."""
        return sum(shard.tokens for shard in self.shards) + self.tokens_in_open

    @property
    def documents(self) -> int:
        """All documents so far."""
        return sum(shard.documents for shard in self.shards) + self.documents_in_open

    def append(self, tokens: Tokens) -> None:
        """Add tokens to the end of the split. Raises OSError."""
        ids, starts, mask = tokens.ids, tokens.starts, tokens.mask
        at = 0
        while at < len(ids):
            n = min(len(ids) - at, self._shard_tokens - self.tokens_in_open)
            self._write("bin", ids[at : at + n].astype(self._dtype, copy=False))
            here = starts[(starts >= at) & (starts < at + n)] - at + self.tokens_in_open
            self._write("docs", here.astype("<i8", copy=False))
            if mask is not None:
                self._write("mask", mask[at : at + n])
            at += n
            self.tokens_in_open += n
            self.documents_in_open += len(here)
            if self.tokens_in_open == self._shard_tokens:
                self._finish()

    def commit(self) -> dict[str, Any]:
        """Bring everything to the disk. Raises OSError."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return {
            "shards": [asdict(shard) for shard in self.shards],
            "tokens": self.tokens_in_open,
            "documents": self.documents_in_open,
        }

    def close(self, *, finish: bool) -> None:
        """Close the files; finish: make what there is of the last shard a whole one. Raises OSError."""
        if finish and self.tokens_in_open:
            self._finish()
        for file in self._files.values():
            file.close()
        self._files = {}

    def _write(self, suffix: str, values: np.ndarray[Any, Any]) -> None:
        if not self._files:
            name = shard_name(self._split, len(self.shards))
            self._files = {s: (self._partial / f"{name}.{s}").open("ab") for s in self._suffixes}
        self._files[suffix].write(values.tobytes())

    def _finish(self) -> None:
        name = shard_name(self._split, len(self.shards))
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self._files = {}
        facts = {}
        for suffix in self._suffixes:
            path = self._partial / f"{name}.{suffix}"
            facts[suffix] = FileFacts(path.stat().st_size, file_sha256(path))
        for suffix in self._suffixes:
            os.replace(self._partial / f"{name}.{suffix}", self._folder / f"{name}.{suffix}")
        self.shards.append(Shard(name, self.tokens_in_open, self.documents_in_open, facts))
        self.tokens_in_open = self.documents_in_open = 0

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Back to a state: later shards go, the open one is cut to what it had then."""
        self.shards = [
            Shard(**{**shard, "files": {suffix: FileFacts(**facts) for suffix, facts in shard["files"].items()}})
            for shard in state["shards"]
        ]
        for shard in self.shards:
            for suffix, facts in shard.files.items():
                _require(self._folder / f"{shard.name}.{suffix}", facts.bytes, exactly=True)
        self.tokens_in_open, self.documents_in_open = state["tokens"], state["documents"]
        name = shard_name(self._split, len(self.shards))
        numbers = {"bin": self.tokens_in_open, "docs": self.documents_in_open, "mask": self.tokens_in_open}
        for suffix in self._suffixes:
            open_path, whole_path = self._partial / f"{name}.{suffix}", self._folder / f"{name}.{suffix}"
            if whole_path.exists():  # it became whole after the state was taken
                os.replace(whole_path, open_path)
            size = numbers[suffix] * item_size(suffix, self._dtype.name)
            if size or open_path.exists():
                _require(open_path, size, exactly=False)
                os.truncate(open_path, size)
        kept = {shard.name for shard in self.shards}
        for folder in (self._folder, self._partial):
            for suffix in self._suffixes:
                for path in folder.glob(f"{self._split}_[0-9]*.{suffix}"):
                    is_open = folder == self._partial and path.stem == name
                    if path.stem not in kept and not is_open:
                        path.unlink()


def _require(path: Path, size: int, *, exactly: bool) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found is None or found < size or (exactly and found != size):
        raise DataError(
            f"{path} {'is missing' if found is None else f'has {found:,} bytes'}; expected {size:,} from the "
            "preparation that is to go on. Start again with --overwrite"
        )
