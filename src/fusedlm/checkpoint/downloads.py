"""What every download needs: room on the disk, and a checksum of what came."""

import errno
import hashlib
import shutil
from pathlib import Path

from fusedlm.checkpoint.errors import CheckpointError


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raises CheckpointError where the disk of a folder, which need not exist yet, has less than needed bytes free."""
    if free_bytes(folder) < needed:
        raise full_disk(folder, needed, what)


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk on which a folder lies or would be made. Raises OSError."""
    there = next((parent for parent in (folder, *folder.parents) if parent.exists()), Path(folder.anchor or "."))
    return shutil.disk_usage(there).free


def is_full_disk(error: OSError) -> bool:
    """Whether a write failed for want of room: of the disk, or of the user's quota on it."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def full_disk(folder: Path, needed: int, what: str) -> CheckpointError:
    """The error for a download that has no room."""
    return CheckpointError(
        f"no room for {what} in {folder}: about {needed:,} bytes are needed and {free_bytes(folder):,} are free; "
        "free some, or choose a folder on another disk"
    )
