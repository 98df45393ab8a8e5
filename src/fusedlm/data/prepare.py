"""Text, chats or rows to a folder of token shards, in parallel; stopped anywhere, it goes on where it was.

One process reads and writes, in order; workers encode. What is written depends on the sources and the settings alone,
so neither the number of workers nor an interruption changes a byte. While it goes on, `.prepare/` in the folder holds
the recipe (what is being made, of what), how far it has come, and the open shards. dataset.json comes last: a folder
that has one is whole.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fusedlm.checkpoint.downloads import free_bytes, is_full_disk
from fusedlm.data.chunks import BEGINNING, chunks_of, encoded
from fusedlm.data.documents import Source, characters_of
from fusedlm.data.encode import Encoder
from fusedlm.data.errors import DataError
from fusedlm.data.files import TextFile
from fusedlm.data.folder import (
    PARTIAL,
    delete_dataset,
    delete_shards,
    only_process,
    require_ours,
    tokenizer_files,
)
from fusedlm.data.format import (
    DATASET_FILE,
    SPLITS,
    TOKENIZER_FOLDER,
    VERSION,
    Kind,
    Manifest,
    read_manifest,
    token_dtype,
    tokenizer_fingerprint,
)
from fusedlm.data.recipe import Recipe, Split, asked_again, facts_of, require_unchanged, settle
from fusedlm.data.shards import ShardWriter
from fusedlm.tokenizer.characters import CharacterTokenizer
from fusedlm.tokenizer.files import read_json, write_json
from fusedlm.tokenizer.interface import Tokenizer
from fusedlm.tokenizer.load import load_tokenizer

SHARD_TOKENS = 100_000_000

_SMALL = 8 << 20  # bytes of sources for which starting processes takes longer than the work
_RECIPE = "recipe.json"
_PROGRESS = "progress.json"


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
    share: float = 1.0,
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
    "end" for one text file without a separator. share: how many of the documents to take, by another hash, 1 for all.
    shard_tokens: of a shard. workers: processes; by default one a core,
    and none beside this one for a few megabytes. overwrite: delete the dataset that the folder holds first.
    progress: called now and then. commit_seconds: how much work an interruption may cost.

    Raises DataError for sources that cannot be read or have changed since an interruption, for a folder that holds
    something else, and where the disk is full; ValueError for settings that make no sense.
    """
    folder = Path(folder)
    if workers is not None and workers < 0:
        raise ValueError(f"workers is {workers}; expected 0 (none beside this process) or more")
    sources, settings = settle(sources, tokenizer, kind, val_fraction, split, shard_tokens, share)
    try:
        require_ours(folder)
        with only_process(folder):
            if overwrite:
                delete_dataset(folder)
            partial = folder / PARTIAL
            partial.mkdir(exist_ok=True)
            if (folder / DATASET_FILE).exists():
                manifest = read_manifest(folder)
                before = Recipe(manifest.settings, manifest.sources, manifest.tokenizer)
                asked_again(folder, before, sources, settings, tokenizer, "holds a dataset that was made")
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
    settings: Mapping[str, Any],
    workers: int | None,
    progress: Callable[[Progress], None],
    commit_seconds: float,
) -> Manifest:
    partial = folder / PARTIAL
    recipe = _begin(sources, folder, tokenizer, kind, settings)
    # From here on the one that was saved, which those who train will load.
    saved = load_tokenizer(folder / TOKENIZER_FOLDER)
    if tokenizer_fingerprint(saved) != recipe.tokenizer:
        raise DataError(
            f"the tokenizer saved in {folder / TOKENIZER_FOLDER} gives other ids than the one that was given; it "
            "cannot be kept beside the dataset"
        )
    encoder = Encoder(saved, kind)
    dtype = token_dtype(saved.vocab_size)
    progress_path = partial / _PROGRESS
    state = read_json(progress_path) if progress_path.exists() else None
    writers = {
        name: ShardWriter(
            folder, partial, name, kind, dtype, settings["shard_tokens"], state["splits"][name] if state else None
        )
        for name in SPLITS
    }
    if state is None:
        delete_shards(folder, partial)
    left_out = state["left_out"] if state else 0
    sizes = [_size(source, facts) for source, facts in zip(sources, recipe.sources, strict=True)]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    if workers is None:
        workers = _workers(total)

    def commit(place: dict[str, Any]) -> None:
        splits = {name: writer.commit() for name, writer in writers.items()}
        write_json(progress_path, {"place": place, "left_out": left_out, "splits": splits})

    committed = shown = time.monotonic()
    try:
        place = state["place"] if state else BEGINNING
        chunks = chunks_of(sources, sizes, place, settings["val_fraction"], settings["share"])
        with encoded(chunks, encoder, folder / TOKENIZER_FOLDER, kind, workers) as results:
            for chunk, tokens in results:
                for name, part in tokens.items():
                    writers[name].append(part)
                    left_out += part.left_out
                now = time.monotonic()
                if now - committed >= commit_seconds:
                    commit(chunk.place)
                    committed = now
                if now - shown >= 0.1:
                    progress(_progress(chunk.done, total, writers))
                    shown = now
        require_unchanged(sources, recipe.sources)
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
        tokenizer=recipe.tokenizer,
        tokenizer_files=tokenizer_files(folder),
        splits={name: writer.shards for name, writer in writers.items() if writer.shards},
        left_out=left_out,
        sources=recipe.sources,
        settings=settings,
    )
    manifest.write(folder)
    shutil.rmtree(partial)
    return manifest


def _begin(
    sources: Sequence[Source],
    folder: Path,
    tokenizer: Tokenizer | Literal["characters"],
    kind: Kind,
    settings: Mapping[str, Any],
) -> Recipe:
    """The recipe, checked against the one that the folder was begun with, or else written, after the tokenizer."""
    path = folder / PARTIAL / _RECIPE
    if path.exists():
        what = "holds an unfinished dataset that is made"
        return asked_again(folder, Recipe(**read_json(path)), sources, settings, tokenizer, what)
    facts = facts_of(sources)
    chosen = CharacterTokenizer(characters_of(sources)) if isinstance(tokenizer, str) else tokenizer
    Encoder(chosen, kind)  # raises where they do not go together
    recipe = Recipe(settings, facts, tokenizer_fingerprint(chosen))
    shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)
    chosen.save(folder / TOKENIZER_FOLDER)
    write_json(path, asdict(recipe))
    return recipe


def _workers(total: int | None) -> int:
    if total is not None and total <= _SMALL:
        return 0
    from fusedlm.hardware import available_cores  # which imports torch

    return available_cores()


def _size(source: Source, facts: Mapping[str, Any]) -> int | None:
    """Bytes of a file that are read, None for what is no file."""
    if isinstance(source, TextFile):
        return (facts["bytes"] if source.stop is None else source.stop) - source.start
    return facts.get("bytes")


def _progress(done: int, total: int | None, writers: Mapping[str, ShardWriter]) -> Progress:
    some = writers.values()
    return Progress(done, total, sum(writer.documents for writer in some), sum(writer.tokens for writer in some))
