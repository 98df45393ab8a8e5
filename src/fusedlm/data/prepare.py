"""Text, chats or rows to a folder of token shards, in parallel; stopped anywhere, it goes on where it was.

One process reads and writes, in order; workers encode. What is written depends on the sources and the settings alone,
so neither the number of workers nor an interruption changes a byte. While it goes on, `.prepare/` in the folder holds
the recipe (what is being made, of what), how far it has come, and the open shards. dataset.json comes last: a folder
that has one is whole.
"""

import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from fusedlm.checkpoint.downloads import file_sha256, free_bytes, is_full_disk
from fusedlm.data.documents import Content, Source, TextFile, characters_of, identity, place_after
from fusedlm.data.encode import Encoder, Job, Tokens, start_worker, work
from fusedlm.data.errors import DataError
from fusedlm.data.format import (
    DATASET_FILE,
    SPLITS,
    SUFFIXES,
    TOKENIZER_FOLDER,
    VERSION,
    Kind,
    Manifest,
    read_manifest,
    token_dtype,
    tokenizer_fingerprint,
)
from fusedlm.data.shards import ShardWriter
from fusedlm.tokenizer.characters import CharacterTokenizer
from fusedlm.tokenizer.files import read_json, write_json
from fusedlm.tokenizer.interface import Tokenizer
from fusedlm.tokenizer.load import load_tokenizer

PARTIAL = ".prepare"
SHARD_TOKENS = 100_000_000
CHARACTERS: Literal["characters"] = "characters"

_CHUNK = 1 << 19  # characters, or so, that a worker gets at once
_SMALL = 8 << 20  # bytes of sources for which starting processes takes longer than the work
_RECIPE = "recipe.json"
_PROGRESS = "progress.json"

Split = Literal["auto", "end", "documents"]


@dataclass(frozen=True)
class Progress:
    """How far a preparation has come. total: bytes of the sources, None where nobody knows."""

    done: int
    total: int | None
    documents: int
    tokens: int


def prepare(
    sources: Sequence[Source],
    folder: Path | str,
    tokenizer: Tokenizer | Literal["characters"],
    *,
    kind: Kind = "text",
    val_fraction: float | None = None,
    split: Split = "auto",
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] = lambda progress: None,
    commit_seconds: float = 10.0,
) -> Manifest:
    """Make a dataset's folder, or go on making it; where it is there already, made of the same, nothing is done.

    sources: see `documents.find_sources`; one whose split is None is divided. tokenizer: "characters" is one of the
    characters that occur. kind: "chat" where a document is a list of messages, laid out by the tokenizer's template.
    val_fraction: how much goes to "val"; by default 0.1 for "end", 0.01 for "documents", and none where a source has
    a split of its own. split: "end" takes it from the end of a single text, which then is no document with an
    end token; "documents" takes whole ones, by a hash of their content, so that equal ones stay together; "auto" is
    "end" for one text file without a separator. shard_tokens: of a shard. workers: processes; by default one a core,
    and none beside this one for a few megabytes. overwrite: delete the dataset that the folder holds first.
    progress: called now and then. commit_seconds: how much work an interruption may cost.

    Raises DataError for sources that cannot be read or have changed since an interruption, for a folder that holds
    something else, and where the disk is full; ValueError for settings that make no sense.
    """
    folder = Path(folder)
    _check(sources, tokenizer, kind, val_fraction, split, shard_tokens, workers)
    partial = folder / PARTIAL
    sources, settings = _settle(sources, kind, val_fraction, split, shard_tokens)
    try:
        _require_ours(folder)
        with _only_process(folder):
            if overwrite:
                _delete(folder)
            partial.mkdir(exist_ok=True)
            if (folder / DATASET_FILE).exists():
                manifest = read_manifest(folder)
                described = _described(sources, manifest.sources)
                fingerprint = _fingerprint(tokenizer, manifest.tokenizer)
                before = {"settings": manifest.settings, "sources": manifest.sources, "tokenizer": manifest.tokenizer}
                now = {"settings": settings | _names(tokenizer), "sources": described, "tokenizer": fingerprint}
                _require_same(folder, before, now, "holds a dataset that was made")
                shutil.rmtree(partial)
                return manifest
            return _make(sources, folder, tokenizer, kind, settings, workers, progress, commit_seconds)
    except OSError as error:
        if is_full_disk(error):
            raise DataError(
                f"the disk of {folder} is full ({free_bytes(folder):,} bytes are free); free some and run again to go "
                "on where it stopped"
            ) from error
        raise


def _make(
    sources: Sequence[Source],
    folder: Path,
    tokenizer: Tokenizer | Literal["characters"],
    kind: Kind,
    settings: dict[str, Any],
    workers: int | None,
    progress: Callable[[Progress], None],
    commit_seconds: float,
) -> Manifest:
    partial = folder / PARTIAL
    settings = settings | _names(tokenizer)
    recipe_path, progress_path = partial / _RECIPE, partial / _PROGRESS
    before = read_json(recipe_path) if recipe_path.exists() else None
    described = _described(sources, before["sources"] if before else [])
    if before is not None:
        fingerprint = _fingerprint(tokenizer, before["tokenizer"])
        now = {"settings": settings, "sources": described, "tokenizer": fingerprint}
        _require_same(folder, before, now, "holds an unfinished dataset that is made")
    else:
        chosen = CharacterTokenizer(characters_of(sources)) if isinstance(tokenizer, str) else tokenizer
        Encoder(chosen, kind)  # raises where they do not go together
        fingerprint = tokenizer_fingerprint(chosen)
        shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)
        chosen.save(folder / TOKENIZER_FOLDER)
        write_json(recipe_path, {"settings": settings, "sources": described, "tokenizer": fingerprint})
    # From here on the one that was saved, which those who train will load.
    saved = load_tokenizer(folder / TOKENIZER_FOLDER)
    if tokenizer_fingerprint(saved) != fingerprint:
        raise DataError(
            f"the tokenizer saved in {folder / TOKENIZER_FOLDER} gives other ids than the one that was given; it "
            "cannot be kept beside the dataset"
        )
    encoder = Encoder(saved, kind)
    dtype = token_dtype(saved.vocab_size)
    state = read_json(progress_path) if progress_path.exists() else None
    writers = {
        name: ShardWriter(
            folder, partial, name, kind, dtype, settings["shard_tokens"], state["splits"][name] if state else None
        )
        for name in SPLITS
    }
    if state is None:
        _delete_shards(folder, partial)
    left_out = state["left_out"] if state else 0
    sizes = [_size(source, facts) for source, facts in zip(sources, described, strict=True)]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    if workers is None:
        workers = 0 if total is not None and total <= _SMALL else _cores()

    def commit(place: dict[str, Any]) -> None:
        splits = {name: writer.commit() for name, writer in writers.items()}
        write_json(progress_path, {"place": place, "left_out": left_out, "splits": splits})

    place = state["place"] if state else {"source": 0, "at": None, "split": None}
    committed = shown = time.monotonic()
    try:
        chunks = _chunks(sources, sizes, place, settings["val_fraction"])
        with _encoded(chunks, encoder, folder / TOKENIZER_FOLDER, kind, workers) as results:
            for chunk, tokens in results:
                for name, part in tokens.items():
                    writers[name].append(part)
                    left_out += part.left_out
                now_ = time.monotonic()
                if now_ - committed >= commit_seconds:
                    commit(chunk.place)
                    committed = now_
                if now_ - shown >= 0.1:
                    progress(_progress(chunk.done, total, writers))
                    shown = now_
        _require_unchanged(sources, described)
    except BaseException:
        for writer in writers.values():
            writer.close(finish=False)
        raise
    for writer in writers.values():
        writer.close(finish=True)
    if not any(writer.shards for writer in writers.values()):
        raise DataError(f"the sources hold nothing to train on; {left_out} documents were empty or without an answer")
    progress(_progress(total or 0, total, writers))
    manifest = Manifest(
        version=VERSION,
        kind=kind,
        dtype=dtype.name,
        vocab_size=saved.vocab_size,
        tokenizer=fingerprint,
        tokenizer_files=tokenizer_files(folder),
        splits={name: writer.shards for name, writer in writers.items() if writer.shards},
        left_out=left_out,
        sources=described,
        settings=settings,
    )
    manifest.write(folder)
    shutil.rmtree(partial)
    return manifest


def tokenizer_files(folder: Path) -> dict[str, str]:
    """The SHA-256 of each of a dataset's tokenizer's files."""
    return {path.name: file_sha256(path) for path in sorted((folder / TOKENIZER_FOLDER).iterdir())}


# Settings


def _check(
    sources: Sequence[Source],
    tokenizer: object,
    kind: str,
    val_fraction: float | None,
    split: str,
    shard_tokens: int,
    workers: int | None,
) -> None:
    if not sources:
        raise ValueError("there are no sources; expected one or more")
    if isinstance(tokenizer, str) and tokenizer != CHARACTERS:
        raise ValueError(f"tokenizer is {tokenizer!r}; expected {CHARACTERS!r}, or a Tokenizer")
    if kind not in ("text", "chat"):
        raise ValueError(f"kind is {kind!r}; expected text or chat")
    if val_fraction is not None and not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; expected 0 or more, and less than 1")
    if split not in ("auto", "end", "documents"):
        raise ValueError(f"split is {split!r}; expected auto, end or documents")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens is {shard_tokens}; expected 1 or more")
    if workers is not None and workers < 0:
        raise ValueError(f"workers is {workers}; expected 0 (none beside this process) or more")
    for source in sources:
        if source.split not in (None, *SPLITS):
            raise ValueError(f"a source's split is {source.split!r}; expected train, val or None")


def _settle(
    sources: Sequence[Source], kind: Kind, val_fraction: float | None, split: Split, shard_tokens: int
) -> tuple[list[Source], dict[str, Any]]:
    """The sources with "end" carried out, and the settings with nothing left to defaults."""
    single = sources[0] if len(sources) == 1 else None
    one_text = single if isinstance(single, TextFile) and single.separator is None else None
    divided = [source for source in sources if source.split is None]
    if split == "auto":
        split = "end" if one_text is not None and one_text.split is None else "documents"
    if val_fraction is None:
        val_fraction = 0.1 if split == "end" else 0.01 if len(divided) == len(sources) else 0.0
    settled = list(sources)
    if split == "end":
        if one_text is None or one_text.split is not None:
            raise ValueError("split is end, which divides a single text file without a separator; expected documents")
        cut, _ = place_after(one_text.path, 1 - val_fraction)
        train = replace(one_text, split="train", ends=False, stop=cut)
        settled = [train, replace(train, split="val", start=cut, stop=None)]
    else:
        # By default the undivided go to train.
        settled = [_with_split(source, "train") if not val_fraction else source for source in settled]
    settings = {"kind": kind, "split": split, "val_fraction": val_fraction, "shard_tokens": shard_tokens}
    return settled, settings


def _with_split(source: Source, split: str) -> Source:
    return replace(source, split=split) if source.split is None else source  # type: ignore[type-var]


def _names(tokenizer: Tokenizer | Literal["characters"]) -> dict[str, Any]:
    """What of a tokenizer decides a dataset besides its fingerprint: its chat template."""
    template = None if isinstance(tokenizer, str) else tokenizer.chat_template
    return {
        "tokenizer": CHARACTERS if isinstance(tokenizer, str) else "given",
        "chat_template": None if template is None else hashlib.sha256(template.encode()).hexdigest(),
    }


def _fingerprint(tokenizer: Tokenizer | Literal["characters"], before: str) -> str:
    """Characters were settled when the dataset was begun; the sources, which they are of, are compared anyway."""
    return before if isinstance(tokenizer, str) else tokenizer_fingerprint(tokenizer)


def _described(sources: Sequence[Source], before: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Settings and file facts of each source. A file of the size and time it had before is not hashed again."""
    known = {
        (facts["path"], facts["bytes"], facts["mtime_ns"]): facts["sha256"] for facts in before if "mtime_ns" in facts
    }

    def facts_of(path: Path) -> dict[str, Any]:
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
        digest = known.get((str(path), stat.st_size, stat.st_mtime_ns))
        if digest is not None:
            return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": digest}
        return identity(path)

    paths = {source.path for source in sources if source.path is not None}
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter's lock
        facts = dict(zip(paths, pool.map(facts_of, paths), strict=True))
    return [source.settings() | (facts[source.path] if source.path is not None else {}) for source in sources]


def _require_unchanged(sources: Sequence[Source], described: Sequence[Mapping[str, Any]]) -> None:
    for source, facts in zip(sources, described, strict=True):
        if source.path is not None:
            stat = source.path.stat() if source.path.exists() else None
            if stat is None or (stat.st_size, stat.st_mtime_ns) != (facts["bytes"], facts["mtime_ns"]):
                raise DataError(
                    f"{source.path} has changed while it was read: it had {facts['bytes']:,} bytes and "
                    f"{'is gone' if stat is None else f'has {stat.st_size:,}'}. Start again with --overwrite"
                )


def _require_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    """Raises DataError, which names the first difference, unless a dataset is made of the same in the same way."""
    again = "choose another folder, or start again with --overwrite"
    for name, value in now["settings"].items():
        if before["settings"].get(name) != value:
            raise DataError(f"{folder} {what} with {name} = {before['settings'].get(name)!r}, not {value!r}; {again}")
    if before["tokenizer"] != now["tokenizer"]:
        raise DataError(
            f"{folder} {what} with another tokenizer (fingerprint {before['tokenizer'][:12]}..., "
            f"not {now['tokenizer'][:12]}...); {again}"
        )
    old = {_key(facts): facts for facts in before["sources"]}
    for facts in now["sources"]:
        was = old.pop(_key(facts), None)
        name = facts.get("path", facts.get("repository"))
        if was is None:
            raise DataError(f"{folder} {what} without {name}, or with other settings for it; {again}")
        if was.get("sha256") != facts.get("sha256"):
            raise DataError(
                f"{name} has changed since {folder} was begun: it had {was['bytes']:,} bytes with SHA-256 "
                f"{was['sha256'][:12]}... and has {facts['bytes']:,} with {facts['sha256'][:12]}...; {again}"
            )
    if old:
        gone = next(iter(old.values()))
        raise DataError(f"{folder} {what} with {gone.get('path', gone.get('repository'))}, too; {again}")
    if [_key(facts) for facts in before["sources"]] != [_key(facts) for facts in now["sources"]]:
        raise DataError(f"{folder} {what} of these sources in another order; {again}")


def _key(facts: Mapping[str, Any]) -> str:
    """A source's settings, its file's content aside."""
    content = ("bytes", "mtime_ns", "sha256")
    return json.dumps({name: value for name, value in facts.items() if name not in content}, sort_keys=True)


# The folder


@contextmanager
def _only_process(folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    # Beside the folder's content, for .prepare comes and goes.
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise DataError(f"another process prepares {folder} (it holds {lock.lock_file})") from None
    try:
        yield
    finally:
        lock.release()


def _require_ours(folder: Path) -> None:
    """Raises DataError for a folder with files in it that no preparation has begun."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; expected a folder, or nothing yet")
    names = {path.name for path in folder.iterdir()} - {".lock"} if folder.exists() else set()
    if names and not names & {DATASET_FILE, PARTIAL}:
        raise DataError(
            f"{folder} is not empty and no dataset: it holds {', '.join(sorted(names)[:5])}; expected a new or empty "
            "folder"
        )


def _delete(folder: Path) -> None:
    """Delete a dataset's files, dataset.json first, and no others."""
    (folder / PARTIAL).mkdir(exist_ok=True)  # so that what is left is still known as ours, should we be stopped
    (folder / DATASET_FILE).unlink(missing_ok=True)
    _delete_shards(folder, folder / PARTIAL)
    shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)
    shutil.rmtree(folder / PARTIAL)


def _delete_shards(*folders: Path) -> None:
    for folder in folders:
        for split in SPLITS:
            for suffix in SUFFIXES:
                for path in folder.glob(f"{split}_[0-9]*.{suffix}"):
                    path.unlink()


# The work


@dataclass(frozen=True)
class _Chunk:
    """Work for one worker. place: from where to go on behind it. done: bytes of all sources read by then."""

    jobs: list[Job]
    place: dict[str, Any]
    done: int


def _chunks(
    sources: Sequence[Source], sizes: Sequence[int | None], place: Mapping[str, Any], val_fraction: float
) -> Iterator[_Chunk]:
    split = place["split"]  # of the document that is open
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
                split = source.split or _split_of(piece.content, val_fraction)
            jobs.append(Job(piece, split, source.ends))
            characters += len(piece.content) if isinstance(piece.content, str) else _characters(piece.content)
            done = max(done, piece.done)
            if characters >= _CHUNK and piece.place is not None:
                yield _Chunk(jobs, {"source": index, "at": piece.place, "split": split}, before + done)
                jobs, characters = [], 0
        before += sizes[index] or 0
        yield _Chunk(jobs, {"source": index + 1, "at": None, "split": None}, before)


def _characters(messages: list[Any]) -> int:
    return sum(len(str(message)) for message in messages)


def _split_of(content: Content, val_fraction: float) -> str:
    """Where a document goes: by a hash of its content (of a long one, of its first piece)."""
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True, ensure_ascii=False)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "little") < val_fraction * 2**64 else "train"


def _cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _encoded(
    chunks: Iterator[_Chunk], encoder: Encoder, tokenizer: Path, kind: Kind, workers: int
) -> Iterator[Iterator[tuple[_Chunk, dict[str, Tokens]]]]:
    """Each chunk with its tokens, in order. A few more than there are workers are under way at a time."""
    if workers == 0:
        yield ((chunk, encoder.encode(chunk.jobs)) for chunk in chunks)
        return
    # Not a fork: other threads of this process (torch's, tokenizers') may hold locks.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (tokenizer, kind))

    def results() -> Iterator[tuple[_Chunk, dict[str, Tokens]]]:
        waiting: deque[tuple[_Chunk, Future[dict[str, Tokens]]]] = deque()
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


def _size(source: Source, facts: Mapping[str, Any]) -> int | None:
    """Bytes of a file that are read, None for what is no file."""
    if isinstance(source, TextFile):
        return (facts["bytes"] if source.stop is None else source.stop) - source.start
    return facts.get("bytes")


def _progress(done: int, total: int | None, writers: Mapping[str, ShardWriter]) -> Progress:
    some = writers.values()
    return Progress(done, total, sum(writer.documents for writer in some), sum(writer.tokens for writer in some))
