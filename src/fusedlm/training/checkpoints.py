"""The checkpoints of a run on a disk: each is whole or not there, has checksums, and the last good one is found.

    checkpoints/step-00000500/
      manifest.json   the step, what the run was, and the size and SHA-256 of every other file; written last
      .metadata, __0_0.distcp ...   torch.distributed.checkpoint's: one file or more of each rank
A checkpoint is written beside its place under another name, brought to the disk, and renamed.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusedlm.checkpoint.downloads import file_sha256, free_bytes, is_full_disk
from fusedlm.tokenizer.files import read_json, write_json

VERSION = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
_PARTIAL = ".step-"


class StateError(ValueError):
    """A run cannot be saved, or cannot go on. The message names the file, what was found and what is expected."""


@dataclass(frozen=True)
class FileFacts:
    """A file's size and content. sha256: hexadecimal."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says.

    step: steps done. world_size: processes that wrote it. run: what a run that goes on must agree with. model: the
    model's config.json. files: all files beside this one.
    """

    version: int
    step: int
    world_size: int
    run: Mapping[str, Any]
    model: Mapping[str, Any]
    files: Mapping[str, FileFacts]


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that has been verified."""

    folder: Path
    manifest: Manifest


class Checkpoints:
    """A folder of checkpoints, of which the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """Those that have a name of their own, ascending; whether they are good `verify` says."""
        if not self.folder.is_dir():
            return []
        found = [_NAME.fullmatch(path.name) for path in self.folder.iterdir()]
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def clean(self) -> None:
        """Delete what interrupted saves have left."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name.startswith(_PARTIAL):
                    shutil.rmtree(path, ignore_errors=True)

    def last_good(self, warn: Callable[[str], None] = lambda text: None) -> SavedCheckpoint | None:
        """The newest checkpoint that is whole; None where there is not one at all. warn: is told of each damaged
        one before it.

        Raises StateError where there are some and all of them are damaged.
        """
        damaged: list[str] = []
        for step in reversed(self.steps()):
            try:
                found = self.verify(step)
            except StateError as error:
                damaged.append(str(error))
                continue
            for text in damaged:
                warn(text)
            return found
        if damaged:
            raise StateError(f"all {len(damaged)} checkpoints in {self.folder} are damaged: {'; '.join(damaged)}")
        return None

    def verify(self, step: int) -> SavedCheckpoint:
        """Read a checkpoint whole and compare it with its manifest. Raises StateError for the first difference."""
        folder = self.path(step)
        manifest = read_manifest(folder)
        if manifest.step != step:
            raise StateError(f"{folder / MANIFEST} says step {manifest.step}; expected {step}, as its folder does")
        for name, facts in manifest.files.items():
            path = folder / name
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                raise StateError(f"{path} is missing; expected a file of {facts.bytes:,} bytes") from None
            if size != facts.bytes:
                raise StateError(f"{path} has {size:,} bytes; expected {facts.bytes:,}. It has been cut short")
            found = file_sha256(path)
            if found != facts.sha256:
                raise StateError(f"{path} has SHA-256 {found}; expected {facts.sha256}. It is damaged")
        return SavedCheckpoint(folder, manifest)

    def prepare(self, step: int, needed: int) -> Path:
        """An empty folder to write a checkpoint of so many bytes into. Raises StateError where there is no room."""
        partial = self.folder / f"{_PARTIAL}{step:08d}"
        with self._disk(step):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            free = free_bytes(self.folder)
        if free < needed:
            shutil.rmtree(partial, ignore_errors=True)
            raise self._full(step, f"it takes about {needed:,} bytes, and {free:,} are free")
        return partial

    def finish(
        self, partial: Path, files: Mapping[str, FileFacts], *, step: int, world_size: int, run: Any, model: Any
    ) -> Path:
        """Write the manifest, give the checkpoint its name, and delete the oldest."""
        manifest = Manifest(VERSION, step, world_size, run, model, files)
        final = self.path(step)
        with self._disk(step):
            write_json(partial / MANIFEST, asdict(manifest))
            _sync(partial)
            if final.exists():  # damaged, or of a run that went back to an earlier step
                shutil.rmtree(final)
            os.replace(partial, final)
            _sync(self.folder)
        for old in [s for s in self.steps() if s < step][: -(self.keep - 1) or None]:
            shutil.rmtree(self.path(old), ignore_errors=True)
        return final

    @contextmanager
    def _disk(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self.error(step, error) from error

    def error(self, step: int, error: OSError) -> StateError:
        """What to say of a save that failed."""
        if is_full_disk(error):
            return self._full(step, f"{free_bytes(self.folder):,} bytes are free")
        return StateError(f"the checkpoint of step {step} cannot be written: {error}; {self._rest()}")

    def _full(self, step: int, why: str) -> StateError:
        return StateError(
            f"the disk of {self.folder} is full, and the checkpoint of step {step} cannot be written: {why}; "
            f"{self._rest()}"
        )

    def _rest(self) -> str:
        steps = self.steps()
        return f"the last checkpoint is that of step {steps[-1]}" if steps else "there is no earlier checkpoint"


def read_manifest(folder: Path) -> Manifest:
    """What a checkpoint's manifest says. Raises StateError where it cannot be read."""
    path = folder / MANIFEST
    if not path.exists():
        raise StateError(f"{path} is missing; {folder.name} is no whole checkpoint")
    try:
        values = read_json(path)
        if values.get("version") != VERSION:
            raise StateError(f"{path} has version {values.get('version')!r}; expected {VERSION}")
        files = {name: FileFacts(**facts) for name, facts in values["files"].items()}
        return Manifest(**{**values, "files": files})
    except StateError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StateError(f"{path} is damaged: {str(error).removeprefix(f'{path} ')}") from None


def facts_of(path: Path) -> FileFacts:
    """Size and SHA-256 of a file that is on the disk once this returns."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileFacts(path.stat().st_size, file_sha256(path))


def _sync(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
