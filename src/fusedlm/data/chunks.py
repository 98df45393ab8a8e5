"""Sources to chunks of work, and those to tokens: in order, by this process or by several others."""

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fusedlm.data.documents import Source
from fusedlm.data.encode import Encoder, Job, Tokens, start_worker, work
from fusedlm.data.errors import DataError
from fusedlm.data.format import Kind
from fusedlm.data.pieces import Content

_CHUNK = 1 << 19  # characters, or so, that a worker gets at once

BEGINNING: Mapping[str, Any] = {"source": 0, "at": None, "split": None}


@dataclass(frozen=True)
class Chunk:
    """Work for one worker. place: from where to go on behind it. done: bytes of all sources read by then."""

    jobs: list[Job]
    place: dict[str, Any]
    done: int


def chunks_of(
    sources: Sequence[Source],
    sizes: Sequence[int | None],
    place: Mapping[str, Any],
    val_fraction: float,
    share: float = 1.0,
) -> Iterator[Chunk]:
    """The chunks behind a place, in order. sizes: of the sources in bytes, where known. Raises DataError.

    val_fraction: of the documents, for "val", where a source has no split of its own. share: of all documents, those to
    take.
    """
    split = place["split"]  # of the document that is open, None of one that is not taken
    before = 0
    for index, source in enumerate(sources):
        if index < place["source"]:
            before += sizes[index] or 0
            continue
        at = place["at"] if index == place["source"] else None
        jobs: list[Job] = []
        characters = done = 0
        for piece in source.read(at):
            if piece.first:
                split = source.split or ("val" if _among(piece.content, val_fraction, b"") else "train")
                split = split if share == 1 or _among(piece.content, share, b"share") else None
            if split is not None:
                jobs.append(Job(piece, split, source.ends))
            characters += len(piece.content) if isinstance(piece.content, str) else _characters(piece.content)
            done = max(done, piece.done)
            if characters >= _CHUNK and piece.place is not None:
                yield Chunk(jobs, {"source": index, "at": piece.place, "split": split}, before + done)
                jobs, characters = [], 0
        before += sizes[index] or 0
        yield Chunk(jobs, {"source": index + 1, "at": None, "split": None}, before)


def _characters(messages: list[Any]) -> int:
    return sum(len(str(message)) for message in messages)


def _among(content: Content, share: float, question: bytes) -> bool:
    """Whether a document is among a share of all, by a hash of its content (of a long one, of its first piece)."""
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True, ensure_ascii=False)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, person=question).digest()
    return int.from_bytes(digest, "little") < share * 2**64


@contextmanager
def encoded(
    chunks: Iterator[Chunk], encoder: Encoder, tokenizer: Path, kind: Kind, workers: int
) -> Iterator[Iterator[tuple[Chunk, dict[str, Tokens]]]]:
    """Each chunk with its tokens, in order. A few more than there are workers are under way at a time.

    encoder: for no workers. tokenizer: the folder that workers load theirs from. Raises DataError.
    """
    if workers == 0:
        yield ((chunk, encoder.encode(chunk.jobs)) for chunk in chunks)
        return
    # Not a fork: other threads of this process (torch's, tokenizers') may hold locks.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (tokenizer, kind))

    def results() -> Iterator[tuple[Chunk, dict[str, Tokens]]]:
        waiting: deque[tuple[Chunk, Future[dict[str, Tokens]]]] = deque()
        for chunk in chunks:
            waiting.append((chunk, pool.submit(work, chunk.jobs)))
            if len(waiting) >= 2 * workers + 2:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()

    try:
        yield results()
    except BrokenProcessPool:
        raise DataError(
            "a worker process has ended unexpectedly: for want of memory, or since a script that calls this does not "
            "do so below `if __name__ == '__main__'`. Run again, perhaps with fewer workers, to go on where it stopped"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
