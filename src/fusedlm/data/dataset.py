"""A prepared dataset, open: its splits as streams of tokens over memory-mapped shards, and what a run must check."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from fusedlm.checkpoint.downloads import file_sha256
from fusedlm.data.errors import DataError
from fusedlm.data.format import (
    DATASET_FILE,
    TOKENIZER_FOLDER,
    FileFacts,
    Shard,
    item_size,
    read_manifest,
    tokenizer_fingerprint,
)
from fusedlm.data.permutation import Integers
from fusedlm.tokenizer.interface import Tokenizer
from fusedlm.tokenizer.load import load_tokenizer

Array = np.ndarray[Any, np.dtype[Any]]


class Dataset:
    """The dataset in a folder that `prepare` has finished.

    Opening it checks that every file is there and has its size, `verify_changed` reads those that were written to since
    then, `verify` reads them all. A shard whose file changes later is noticed when it is next read.
    Raises DataError, which names the file, what was found and what is expected.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        dtype = self.manifest.dtype
        self.splits: Mapping[str, Split] = MappingProxyType(
            {
                name: Split(self.folder, name, shards, dtype, self.manifest.vocab_size, self.manifest.kind == "chat")
                for name, shards in self.manifest.splits.items()
            }
        )

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of all that decides which tokens a run sees: shards, their order, the tokenizer.

        Wherever the folder lies and whenever it was made. A run keeps it, and gives it to `check_fingerprint`.
        """
        return self.manifest.fingerprint

    @property
    def vocab_size(self) -> int:
        """The tokenizer's highest id + 1."""
        return self.manifest.vocab_size

    def split(self, name: str) -> "Split":
        """A split by its name. Raises DataError where there is none."""
        if name not in self.splits:
            raise DataError(
                f"{self.folder} has no split {name!r}; there is {', '.join(self.splits)}. A larger --val-fraction when "
                "it is prepared makes a split val"
            )
        return self.splits[name]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made it. Raises DataError where it has been changed since."""
        tokenizer = load_tokenizer(self.folder / TOKENIZER_FOLDER)
        self.check_tokenizer(tokenizer, f"the tokenizer in {self.folder / TOKENIZER_FOLDER}")
        return tokenizer

    def check_tokenizer(self, tokenizer: Tokenizer, what: str = "the tokenizer") -> None:
        """Raises DataError, which calls it `what`, for another tokenizer than the one that made the dataset."""
        found = tokenizer_fingerprint(tokenizer)
        if found != self.manifest.tokenizer:
            raise DataError(
                f"{what} does not match the dataset {self.folder}: it has {tokenizer.vocab_size:,} ids and fingerprint "
                f"{found[:12]}...; expected {self.vocab_size:,} and {self.manifest.tokenizer[:12]}.... Prepare the "
                f"dataset with this tokenizer, or use the one in {self.folder / TOKENIZER_FOLDER}"
            )

    def check_vocabulary(self, rows: int) -> None:
        """Raises DataError where a model's embedding has fewer rows than the dataset has ids."""
        if rows < self.vocab_size:
            raise DataError(
                f"the model has {rows:,} tokens, and the dataset {self.folder} {self.vocab_size:,}; expected at least "
                "as many"
            )

    def check_fingerprint(self, expected: str) -> None:
        """Raises DataError where the dataset is another than the one a run began with."""
        if self.fingerprint != expected:
            raise DataError(
                f"the dataset {self.folder} is not the one this run began with: its fingerprint is "
                f"{self.fingerprint[:12]}..., expected {expected[:12]}.... Give the run its own dataset, or start "
                "a new run"
            )

    def verify_changed(self, say: Callable[[str], None] = lambda text: None) -> None:
        """Read those files of shards that were written to after dataset.json was, and compare with it.

        They may be copies, or not what they were. say: is told that this may take a while. Raises DataError.
        """
        prepared = (self.folder / DATASET_FILE).stat().st_mtime_ns
        files = [file for split in self.splits.values() for file in split.files() if _check_size(*file) > prepared]
        if files:
            size = sum(facts.bytes for _, facts in files)
            say(f"{len(files)} files of {self.folder} are newer than its {DATASET_FILE}: reading {size / 1e6:,.1f} MB")
        for path, facts in files:
            _check_content(path, facts)

    def verify(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Read everything and compare with dataset.json. progress: takes bytes done and in all.

        Raises DataError for the first file that is not what it was.
        """
        total = sum(
            facts.bytes
            for shards in self.manifest.splits.values()
            for shard in shards
            for facts in shard.files.values()
        )
        done = 0
        for split in self.splits.values():
            for path, facts in split.files():
                _check_size(path, facts)
                _check_content(path, facts)
                done += facts.bytes
                progress(done, total)
            split.check_documents()
        for name, expected in self.manifest.tokenizer_files.items():
            path = self.folder / TOKENIZER_FOLDER / name
            if not path.is_file():
                raise DataError(f"{path} is missing")
            found = file_sha256(path)
            if found != expected:
                raise DataError(f"{path} has SHA-256 {found}; expected {expected} from {DATASET_FILE}")
        self.tokenizer()


class Split:
    """A split's tokens, those of its shards end to end, with the places where documents begin.

    Opened by Dataset. n_tokens, n_documents: in all. has_mask: whether answers are marked (chats).
    """

    def __init__(
        self, folder: Path, name: str, shards: Iterable[Shard], dtype: str, vocab_size: int, has_mask: bool
    ) -> None:
        self.name = name
        self.has_mask = has_mask
        self._shards = list(shards)
        self._dtype = dtype
        self._vocab_size = vocab_size
        self._begins = [0, *accumulate(shard.tokens for shard in self._shards)]
        # By shard and suffix. Paths are made once: making one costs more than looking at the file.
        self._files = {
            (i, suffix): (folder / f"{shard.name}.{suffix}", facts)
            for i, shard in enumerate(self._shards)
            for suffix, facts in shard.files.items()
        }
        self._times = {key: _check_size(*file) for key, file in self._files.items()}
        self._maps: dict[tuple[int, str], Array] = {}
        self.n_tokens = self._begins[-1]
        self.n_documents = sum(shard.documents for shard in self._shards)

    def files(self) -> Iterable[tuple[Path, FileFacts]]:
        """The files of all shards, and what they should be."""
        return self._files.values()

    def tokens(self, start: int, stop: int) -> Array:
        """Tokens start to stop, (stop - start,) uint16 or uint32: a view of the file where it can be one.

        Raises DataError where a file has changed, or holds an id beyond the vocabulary.
        """
        ids = self._read("bin", start, stop)
        if len(ids) and int(ids.max()) >= self._vocab_size:
            at = start + int(np.argmax(ids))
            path, _ = self._files[bisect_right(self._begins, at) - 1, "bin"]
            raise DataError(
                f"{path} holds the id {int(ids.max())}; expected ids below "
                f"{self._vocab_size}. The file is damaged: `fusedlm data verify` looks at all of them"
            )
        return ids

    def mask(self, start: int, stop: int) -> Array:
        """(stop - start,) uint8, 1 for tokens of answers; of chats alone. Raises DataError where a file has changed."""
        return self._read("mask", start, stop)

    def starts(self, start: int, stop: int) -> Integers:
        """Where documents begin among tokens start to stop: int64, as places in the split, ascending."""
        parts = [np.zeros(0, np.int64)]
        for i in self._touched(start, stop):
            places, begin = self._map(i, "docs"), self._begins[i]
            low, high = np.searchsorted(places, (start - begin, stop - begin))
            parts.append(places[low:high].astype(np.int64) + begin)
        return np.concatenate(parts)

    def check_documents(self) -> None:
        """Raises DataError where the places in a shard's .docs do not ascend within the shard."""
        for i, shard in enumerate(self._shards):
            places = self._map(i, "docs")
            if len(places) and (places[0] < 0 or places[-1] >= shard.tokens or bool((np.diff(places) <= 0).any())):
                path, _ = self._files[i, "docs"]
                raise DataError(
                    f"{path} does not ascend from 0 to less than {shard.tokens:,}; it was "
                    "not written by `fusedlm data prepare`"
                )

    def _read(self, suffix: str, start: int, stop: int) -> Array:
        if not 0 <= start <= stop <= self.n_tokens:
            raise ValueError(f"tokens {start} to {stop} are asked for; split {self.name} has {self.n_tokens:,}")
        parts = [
            self._map(i, suffix)[max(0, start - self._begins[i]) : stop - self._begins[i]]
            for i in self._touched(start, stop)
        ]
        if not parts:
            return np.zeros(0, self._map(0, suffix).dtype)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _touched(self, start: int, stop: int) -> range:
        """The shards that hold any of tokens start to stop."""
        if start >= stop:
            return range(0)
        return range(bisect_right(self._begins, start) - 1, bisect_right(self._begins, stop - 1))

    def _map(self, i: int, suffix: str) -> Array:
        key = (i, suffix)
        path, facts = self._files[key]
        # Looked at each time: a file that has been cut would end the process as it is read.
        time = _check_size(path, facts)
        if time != self._times[key]:
            _check_content(path, facts)
            self._times[key] = time
            self._maps.pop(key, None)
        array = self._maps.get(key)
        if array is None:
            dtype = {"bin": f"<u{item_size('bin', self._dtype)}", "docs": "<i8", "mask": "u1"}[suffix]
            # An empty file cannot be mapped. A plain array over the map: slices of a memmap cost ten times as much.
            array = np.asarray(np.memmap(path, dtype, mode="r")) if facts.bytes else np.zeros(0, dtype)
            self._maps[key] = array
        return array


def _check_size(path: Path, facts: FileFacts) -> int:
    """The file's time of change, in ns. Raises DataError where it is missing or has another size."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        raise DataError(f"{path} is missing; expected a file of {facts.bytes:,} bytes") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    if stat.st_size != facts.bytes:
        raise DataError(
            f"{path} has {stat.st_size:,} bytes; expected {facts.bytes:,} from {DATASET_FILE}. It has been cut short "
            "or changed; prepare the dataset again"
        )
    return stat.st_mtime_ns


def _check_content(path: Path, facts: FileFacts) -> None:
    found = file_sha256(path)
    if found != facts.sha256:
        raise DataError(
            f"{path} has SHA-256 {found}; expected {facts.sha256} from {DATASET_FILE}. It has been changed or damaged; "
            "prepare the dataset again"
        )
