"""What a dataset is made of and how, and whether that is the same as before: sources, settings and the tokenizer."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fusedlm.data.documents import Source
from fusedlm.data.errors import DataError
from fusedlm.data.files import TextFile, identity, place_after
from fusedlm.data.format import SPLITS, Kind, tokenizer_fingerprint
from fusedlm.tokenizer.interface import Tokenizer

CHARACTERS: Literal["characters"] = "characters"

Split = Literal["auto", "end", "documents"]


@dataclass(frozen=True)
class Recipe:
    """settings: with nothing left to defaults. sources: settings and file facts of each. tokenizer: its fingerprint."""

    settings: Mapping[str, Any]
    sources: Sequence[Mapping[str, Any]]
    tokenizer: str


def settle(
    sources: Sequence[Source],
    tokenizer: Tokenizer | Literal["characters"],
    kind: Kind,
    val_fraction: float | None,
    split: Split,
    shard_tokens: int,
    share: float,
) -> tuple[list[Source], dict[str, Any]]:
    """The sources with "end" carried out, and the settings with nothing left to defaults.

    Raises ValueError for arguments that make no sense; they are those of `prepare.prepare`.
    """
    _check(sources, tokenizer, kind, val_fraction, split, shard_tokens)
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; expected more than 0, and at most 1")
    single = sources[0] if len(sources) == 1 else None
    one_text = single if isinstance(single, TextFile) and single.separator is None else None
    divided = [source for source in sources if source.split is None]
    if split == "auto":
        split = "end" if one_text is not None and one_text.split is None else "documents"
    if val_fraction is None:
        val_fraction = 0.1 if split == "end" else 0.01 if len(divided) == len(sources) else 0.0
    settled = list(sources)
    if split == "end" and share < 1:
        raise ValueError(f"share is {share}, and the split end divides a single text; expected whole documents")
    if split == "end":
        if one_text is None or one_text.split is not None:
            raise ValueError("split is end, which divides a single text file without a separator; expected documents")
        cut, _ = place_after(one_text.path, 1 - val_fraction)
        train = replace(one_text, split="train", ends=False, stop=cut)
        settled = [train, replace(train, split="val", start=cut, stop=None)]
    else:
        # By default the undivided go to train.
        settled = [_with_split(source, "train") if not val_fraction else source for source in settled]
    # What of a tokenizer decides a dataset besides its fingerprint: its chat template.
    template = None if isinstance(tokenizer, str) else tokenizer.chat_template
    return settled, {
        "kind": kind,
        "split": split,
        "val_fraction": val_fraction,
        "shard_tokens": shard_tokens,
        "share": share,
        "tokenizer": CHARACTERS if isinstance(tokenizer, str) else "given",
        "chat_template": None if template is None else hashlib.sha256(template.encode()).hexdigest(),
    }


def _check(
    sources: Sequence[Source],
    tokenizer: object,
    kind: str,
    val_fraction: float | None,
    split: str,
    shard_tokens: int,
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
    for source in sources:
        if source.split not in (None, *SPLITS):
            raise ValueError(f"a source's split is {source.split!r}; expected train, val or None")


def _with_split(source: Source, split: str) -> Source:
    return replace(source, split=split) if source.split is None else source  # type: ignore[type-var]


def facts_of(sources: Sequence[Source], before: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """Settings and file facts of each source. A file of the size and time it had before is not hashed again."""
    known = {
        (facts["path"], facts["bytes"], facts["mtime_ns"]): facts["sha256"] for facts in before if "mtime_ns" in facts
    }

    def file_facts(path: Path) -> dict[str, Any]:
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
        facts = dict(zip(paths, pool.map(file_facts, paths), strict=True))
    return [source.settings() | (facts[source.path] if source.path is not None else {}) for source in sources]


def asked_again(
    folder: Path,
    before: Recipe,
    sources: Sequence[Source],
    settings: Mapping[str, Any],
    tokenizer: Tokenizer | Literal["characters"],
    what: str,
) -> Recipe:
    """The recipe for what is asked for now. Raises DataError, which names the first difference, unless it is the same.

    what: is done with the folder, for the error.
    """
    facts = facts_of(sources, before.sources)
    # Characters were settled when the dataset was begun; the sources, which they are of, are compared anyway.
    fingerprint = before.tokenizer if isinstance(tokenizer, str) else tokenizer_fingerprint(tokenizer)
    now = Recipe(settings, facts, fingerprint)
    _require_same(folder, before, now, what)
    return now


def _require_same(folder: Path, before: Recipe, now: Recipe, what: str) -> None:
    again = "choose another folder, or start again with --overwrite"
    were = {"share": 1.0, **before.settings}  # there was none at first
    for name, value in now.settings.items():
        if were.get(name) != value:
            raise DataError(f"{folder} {what} with {name} = {were.get(name)!r}, not {value!r}; {again}")
    if before.tokenizer != now.tokenizer:
        raise DataError(
            f"{folder} {what} with another tokenizer (fingerprint {before.tokenizer[:12]}..., "
            f"not {now.tokenizer[:12]}...); {again}"
        )
    old = {_key(facts): facts for facts in before.sources}
    for facts in now.sources:
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
    if [_key(facts) for facts in before.sources] != [_key(facts) for facts in now.sources]:
        raise DataError(f"{folder} {what} of these sources in another order; {again}")


def _key(facts: Mapping[str, Any]) -> str:
    """A source's settings, its file's content aside."""
    content = ("bytes", "mtime_ns", "sha256")
    return json.dumps({name: value for name, value in facts.items() if name not in content}, sort_keys=True)


def require_unchanged(sources: Sequence[Source], described: Sequence[Mapping[str, Any]]) -> None:
    """Raises DataError where a file has another size or time than the facts say."""
    for source, facts in zip(sources, described, strict=True):
        if source.path is not None:
            stat = source.path.stat() if source.path.exists() else None
            if stat is None or (stat.st_size, stat.st_mtime_ns) != (facts["bytes"], facts["mtime_ns"]):
                raise DataError(
                    f"{source.path} has changed while it was read: it had {facts['bytes']:,} bytes and "
                    f"{'is gone' if stat is None else f'has {stat.st_size:,}'}. Start again with --overwrite"
                )
