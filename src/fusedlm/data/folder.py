"""A dataset's folder while it is written: whose it is, and what may be deleted in it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fusedlm.checkpoint.downloads import file_sha256
from fusedlm.data.errors import DataError
from fusedlm.data.format import DATASET_FILE, SPLITS, SUFFIXES, TOKENIZER_FOLDER

PARTIAL = ".prepare"


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Make the folder, where it is not there, and keep others out. Raises DataError where another is in."""
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


def require_ours(folder: Path) -> None:
    """Raises DataError for a folder with files in it that no preparation has begun."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; expected a folder, or nothing yet")
    names = {path.name for path in folder.iterdir()} - {".lock"} if folder.exists() else set()
    if names and not names & {DATASET_FILE, PARTIAL}:
        raise DataError(
            f"{folder} is not empty and no dataset: it holds {', '.join(sorted(names)[:5])}; expected a new or empty "
            "folder"
        )


def delete_dataset(folder: Path) -> None:
    """Delete a dataset's files, dataset.json first, and no others."""
    (folder / PARTIAL).mkdir(exist_ok=True)  # so that what is left is still known as ours, should we be stopped
    (folder / DATASET_FILE).unlink(missing_ok=True)
    delete_shards(folder, folder / PARTIAL)
    shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)
    shutil.rmtree(folder / PARTIAL)


def delete_shards(*folders: Path) -> None:
    for folder in folders:
        for split in SPLITS:
            for suffix in SUFFIXES:
                for path in folder.glob(f"{split}_[0-9]*.{suffix}"):
                    path.unlink()


def tokenizer_files(folder: Path) -> dict[str, str]:
    """The SHA-256 of each of a dataset's tokenizer's files."""
    return {path.name: file_sha256(path) for path in sorted((folder / TOKENIZER_FOLDER).iterdir())}
