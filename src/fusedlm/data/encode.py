"""Pieces of documents to arrays of tokens, in this process or in several others.

Imports no torch, so that workers start fast.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusedlm.data.chat import ChatEncoder
from fusedlm.data.errors import DataError
from fusedlm.data.format import Kind, token_dtype
from fusedlm.data.pieces import Piece
from fusedlm.tokenizer.interface import Tokenizer
from fusedlm.tokenizer.load import load_tokenizer

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Job:
    """A piece, the split that its document belongs to, and whether begin and end tokens go around the document."""

    piece: Piece
    split: str
    ends: bool


@dataclass(frozen=True)
class Tokens:
    """ids: of one piece or more, of one split. starts: int64, where among them documents begin. mask: uint8, of chats.

    left_out: documents that gave nothing.
    """

    ids: Array
    starts: Array
    mask: Array | None
    left_out: int = 0


class Encoder:
    """Encodes pieces. Raises ValueError where chats are to be encoded and the tokenizer has no chat template."""

    def __init__(self, tokenizer: Tokenizer, kind: Kind) -> None:
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._chat = ChatEncoder(tokenizer) if kind == "chat" else None

    def encode(self, jobs: Sequence[Job]) -> dict[str, Tokens]:
        """The tokens of each split. Raises DataError, which names the document, for what cannot be encoded."""
        parts: dict[str, list[Tokens]] = {}
        for job in jobs:
            try:
                tokens = self._one(job)
            except ValueError as error:
                raise DataError(f"{job.piece.where}: {error}") from None
            parts.setdefault(job.split, []).append(tokens)
        return {split: _joined(some) for split, some in parts.items()}

    def _one(self, job: Job) -> Tokens:
        piece = job.piece
        if self._chat is not None:
            if isinstance(piece.content, str):
                raise ValueError(f"there is text, {piece.content[:40]!r}; expected a chat's list of messages")
            ids, mask = self._chat.encode(piece.content)
            return self._tokens(ids, True, mask) if any(mask) else self._tokens([], False, [], left_out=1)
        if not isinstance(piece.content, str):
            raise ValueError("there is a list; expected text (chats are prepared as chats: --chat)")
        ids = self._tokenizer.encode(piece.content, add_bos=False)
        if piece.first and piece.last and (not ids or not piece.content.strip()):
            return self._tokens([], False, left_out=1)
        if job.ends:
            bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
            if piece.first and self._tokenizer.add_bos and bos is not None:
                ids = [bos, *ids]
            if piece.last and eos is not None:
                ids.append(eos)
        return self._tokens(ids, piece.first)

    def _tokens(self, ids: list[int], first: bool, mask: list[bool] | None = None, left_out: int = 0) -> Tokens:
        starts = np.zeros(1 if first else 0, np.int64)
        return Tokens(np.array(ids, self._dtype), starts, None if mask is None else np.array(mask, np.uint8), left_out)


def _joined(parts: list[Tokens]) -> Tokens:
    begins = np.cumsum([0, *(len(part.ids) for part in parts)])
    masks = [part.mask for part in parts if part.mask is not None]
    return Tokens(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.starts + begin for part, begin in zip(parts, begins, strict=False)]),
        np.concatenate(masks) if masks else None,
        sum(part.left_out for part in parts),
    )


_encoder: Encoder | None = None  # of a worker process, which has one for life


def start_worker(tokenizer: Path, kind: Kind) -> None:
    """Make this process a worker: one encoder, deaf to Ctrl-C, and gone when its parent is."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and stops us

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _encoder = Encoder(load_tokenizer(tokenizer), kind)


def work(jobs: Sequence[Job]) -> dict[str, Tokens]:
    """Encode in a worker."""
    assert _encoder is not None
    return _encoder.encode(jobs)
