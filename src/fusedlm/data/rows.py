"""Rows of T tokens out of a split: cut from its stream, or packed with whole documents. Both are numbered."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from fusedlm.data.dataset import Split
from fusedlm.data.errors import DataError

IGNORED = -100  # what the loss leaves out

Documents = Literal["joined", "separate", "packed"]


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens.

    tokens: (B, T) int64. targets: (B, T) int64, of each token the one behind it; -100 where there is none, and where it
    is no target. Where documents are kept apart: positions: (B, T) int64, of each token in its sequence (a document, or
    what of it is in the row); sequence_ends: (n + 1,) int32, cumulative lengths of the sequences of all rows laid end
    to end, from 0 to B * T, as variable-length attention takes them; longest: the greatest length. Else these are None.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor | None = None
    sequence_ends: Tensor | None = None
    longest: int | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The batch in memory that a GPU copies from by itself."""
        return self._map(lambda tensor: tensor.pin_memory())

    def tensors(self) -> list[Tensor]:
        """Those that are there."""
        values = (getattr(self, field.name) for field in fields(self))
        return [value for value in values if isinstance(value, Tensor)]

    def _map(self, change: Any) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: change(value) if isinstance(value, Tensor) else value for name, value in values.items()})


class Rows(Protocol):
    """Numbered rows of T tokens."""

    @property
    def n_rows(self) -> int:
        """How many rows show the split once."""
        ...

    @property
    def n_places(self) -> int:
        """How many rows may be drawn at random: of a stream, one begins at every token."""
        ...

    def batch(self, rows: Sequence[int]) -> Batch:
        """Rows by number; -1 is one without targets. Raises DataError where a file of the dataset has changed."""
        ...

    def batch_at(self, places: Sequence[int]) -> Batch:
        """Rows by place."""
        ...


class StreamRows:
    """Rows cut from the stream of a split: row i has tokens i*T to (i+1)*T, and as targets the ones behind each.

    separate: keep documents apart: a sequence ends where a document does, and no target is in the next one.
    whole: leave out the last row where the split does not fill it; else it ends in tokens without targets.
    """

    def __init__(self, split: Split, context: int, *, separate: bool = False, whole: bool = True) -> None:
        self._split = split
        self._context = context
        self._separate = separate
        targets = max(0, split.n_tokens - 1)
        self.n_rows = targets // context if whole else -(-targets // context)
        self.n_places = max(0, split.n_tokens - context)

    def batch(self, rows: Sequence[int]) -> Batch:
        return self.batch_at([row * self._context if row >= 0 else -1 for row in rows])

    def batch_at(self, places: Sequence[int]) -> Batch:
        B, T = len(places), self._context
        tokens, targets = np.zeros((B, T), np.int64), np.full((B, T), IGNORED, np.int64)
        begins: list[list[int]] = [[0] for _ in range(B)]
        for b, place in enumerate(places):
            if place < 0:
                continue
            stop = min(place + T + 1, self._split.n_tokens)
            ids = self._split.tokens(place, stop)
            n = min(T, len(ids))
            tokens[b, :n] = ids[:n]
            targets[b, : len(ids) - 1] = ids[1:]
            if self._split.has_mask:
                targets[b, : len(ids) - 1][self._split.mask(place + 1, stop) == 0] = IGNORED
            if self._separate:
                starts = self._split.starts(place + 1, stop) - place
                targets[b, starts - 1] = IGNORED
                begins[b] += [int(start) for start in starts if start < n]
                if n < T and begins[b][-1] < n:
                    begins[b].append(n)  # what fills the row is a sequence of its own
        return _batch(tokens, targets, begins if self._separate else None)


class PackedRows:
    """Rows packed with whole documents, by best fit from the longest on; each stands in one row, once.

    A document of n tokens takes n - 1 places, its last token being a target only. One that is longer than T is cut into
    parts of T; each later part begins anew, with the last target of the part before it as its first token. The rest of
    a row has no targets. Holds the length and the row of every document in memory.
    """

    def __init__(self, split: Split, context: int) -> None:
        self._split = split
        self._context = context
        starts = split.starts(0, split.n_tokens)
        lengths = np.maximum(np.diff(np.append(starts, split.n_tokens)) - 1, 0)
        # Parts: (place in the split, inputs), in the order of the split.
        counts = -(-lengths // context)
        document = np.repeat(np.arange(len(starts)), counts)
        part = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._places = starts[document] + part * context
        self._lengths = np.minimum(lengths[document] - part * context, context)
        row_of = _best_fit(self._lengths, context)
        self._order = np.argsort(row_of, kind="stable")
        self.n_rows = int(row_of.max(initial=-1)) + 1
        self.n_places = self.n_rows
        self._begins = np.searchsorted(row_of[self._order], np.arange(self.n_rows + 1))

    def batch(self, rows: Sequence[int]) -> Batch:
        B, T = len(rows), self._context
        tokens, targets = np.zeros((B, T), np.int64), np.full((B, T), IGNORED, np.int64)
        begins: list[list[int]] = [[] for _ in range(B)]
        for b, row in enumerate(rows):
            at = 0
            for i in self._order[self._begins[row] : self._begins[row + 1]] if row >= 0 else ():
                place, n = int(self._places[i]), int(self._lengths[i])
                ids = self._split.tokens(place, place + n + 1)
                tokens[b, at : at + n] = ids[:-1]
                targets[b, at : at + n] = ids[1:]
                if self._split.has_mask:
                    targets[b, at : at + n][self._split.mask(place + 1, place + n + 1) == 0] = IGNORED
                begins[b].append(at)
                at += n
            if at < T:
                begins[b].append(at)
        return _batch(tokens, targets, begins)

    def batch_at(self, places: Sequence[int]) -> Batch:
        return self.batch(places)


def rows_of(split: Split, context: int, documents: Documents | None, *, whole: bool = True) -> Rows:
    """The rows of a split. documents: see Loader; None is "packed" for chats, else "joined".

    Raises ValueError for a context below 1 and unknown documents, DataError for a split that fills no row.
    """
    if context < 1:
        raise ValueError(f"context is {context}; expected 1 or more")
    documents = documents or ("packed" if split.has_mask else "joined")
    if documents not in ("joined", "separate", "packed"):
        raise ValueError(f"documents is {documents!r}; expected joined, separate or packed")
    rows: Rows
    if documents == "packed":
        rows = PackedRows(split, context)
    else:
        rows = StreamRows(split, context, separate=documents == "separate", whole=whole)
    if rows.n_rows == 0:
        needed = context + 1 if whole and documents != "packed" else 2
        raise DataError(
            f"split {split.name} has {split.n_tokens:,} tokens in {split.n_documents:,} documents; expected {needed:,} "
            f"or more for a row of {context:,} and its targets. Choose a smaller context or prepare more text"
        )
    return rows


def _best_fit(lengths: np.ndarray[Any, np.dtype[np.int64]], capacity: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A row for each length, from 0 on without gaps: the fullest that still has room, the longest first.

    Which rooms there are is one bit each of a number, so that the least that suffices takes no search.
    """
    row_of = np.zeros(len(lengths), np.int64)
    rows_with: dict[int, list[int]] = {}
    rooms = n = 0
    for i in np.argsort(-lengths, kind="stable"):
        length = int(lengths[i])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[room].pop()
            if not rows_with[room]:
                rooms ^= 1 << room
        else:
            row, room, n = n, capacity, n + 1
        row_of[i] = row
        left = room - length
        rows_with.setdefault(left, []).append(row)
        rooms |= 1 << left
    return row_of


def _batch(
    tokens: np.ndarray[Any, np.dtype[np.int64]],
    targets: np.ndarray[Any, np.dtype[np.int64]],
    begins: list[list[int]] | None,
) -> Batch:
    """begins: of each row, where its sequences begin, ascending from 0."""
    if begins is None:
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))
    B, T = tokens.shape
    flat = np.array([b * T + begin for b in range(B) for begin in begins[b]], np.int64)
    ends = np.append(flat, B * T)
    lengths = np.diff(ends)
    positions = np.arange(B * T) - np.repeat(flat, lengths)
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(targets),
        torch.from_numpy(positions.reshape(B, T)),
        torch.from_numpy(ends.astype(np.int32)),
        int(lengths.max(initial=0)),
    )
