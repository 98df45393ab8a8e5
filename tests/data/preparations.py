"""Preparations to compare, and to stop anywhere."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fusedlm.data import prepare as module
from fusedlm.data.documents import Source
from fusedlm.data.format import Manifest
from fusedlm.data.prepare import prepare
from fusedlm.tokenizer.bpe import BPETokenizer


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, the lock aside."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def make(sources: Source | list[Source], folder: Path, tokenizer: BPETokenizer, **others: Any) -> Manifest:
    sources = sources if isinstance(sources, list) else [sources]
    return prepare(sources, folder, tokenizer, val_fraction=0.1, shard_tokens=1000, **others)


class Stopped(BaseException):
    pass


def stopping_after(commits: int, monkeypatch: pytest.MonkeyPatch, then: int = 0) -> None:
    """Have the preparation stop `then` chunks after so many commits, as it appends."""
    real, append, seen = module.write_json, module.ShardWriter.append, SimpleNamespace(commits=0, chunks=0)

    def write_json(path: Path, value: Any) -> None:
        real(path, value)
        seen.commits += path.name == "progress.json"
        # With commits over all chunks, what comes later is lost; without them some chunks are.
        if seen.commits >= commits:
            monkeypatch.setattr(module, "write_json", lambda path, value: None)

    def stop(writer: Any, tokens: Any) -> None:
        append(writer, tokens)
        seen.chunks += seen.commits >= commits
        if seen.chunks > then:
            raise Stopped

    monkeypatch.setattr(module, "write_json", write_json)
    monkeypatch.setattr(module.ShardWriter, "append", stop)
