"""The sets that have a name: where each comes from, and how it is usually prepared."""

import secrets
import sys
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from difflib import get_close_matches
from http.client import HTTPException
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from fusedlm.checkpoint.downloads import file_sha256, full_disk, is_full_disk, require_space
from fusedlm.checkpoint.sources import default_cache_dir
from fusedlm.data.documents import Source
from fusedlm.data.errors import DataError
from fusedlm.data.files import TextFile
from fusedlm.data.hub import HubDataset, pinned
from fusedlm.data.packages import PackageModules

_ANSWER_SECONDS = 10.0


@dataclass(frozen=True)
class RemoteFile:
    """A text file somewhere. size: in bytes. sha256: hexadecimal."""

    url: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        """Under which it lies in a cache."""
        return f"{self.sha256[:12]}-{self.url.rsplit('/', 1)[-1]}"


@dataclass(frozen=True)
class NamedSet:
    """about: in a line. origin: a file to download, datasets of the Hub, or, on this machine, Python's standard library
    or its packages. val_fraction: 0 where it has a validation split. characters: whether it is for a tokenizer of
    characters.
    """

    about: str
    origin: RemoteFile | Sequence[HubDataset] | Literal["library", "packages"]
    val_fraction: float
    characters: bool = False


NAMED_SETS: Mapping[str, NamedSet] = MappingProxyType(
    {
        "python": NamedSet(
            "modules of Python's standard library, from this machine, 4 MB", "library", 0.1, characters=True
        ),
        "python-packages": NamedSet("modules of the packages installed on this machine", "packages", 0.01),
        "tinyshakespeare": NamedSet(
            "40,000 lines of Shakespeare, 1.1 MB",
            RemoteFile(
                "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                1_115_394,
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            ),
            0.1,
            characters=True,
        ),
        "tinystories": NamedSet(
            "stories in the words of small children (Eldan and Li 2023)",
            (
                HubDataset("roneneldan/TinyStories", split="train"),
                HubDataset("roneneldan/TinyStories", hub_split="validation", split="val"),
            ),
            0.0,
        ),
        "openwebtext": NamedSet(
            "pages that Reddit linked to, after GPT-2's own (Gokaslan and Cohen 2019)",
            (HubDataset("Skylion007/openwebtext"),),
            0.0005,
        ),
        "fineweb-edu": NamedSet(
            "educational web pages, the sample of 10 billion tokens (Penedo et al. 2024)",
            (HubDataset("HuggingFaceFW/fineweb-edu", config="sample-10BT"),),
            0.0005,
        ),
    }
)


def named_set(name: str) -> NamedSet:
    """A set by its name. Raises ValueError for a name that there is not."""
    if name not in NAMED_SETS:
        near = get_close_matches(name.lower(), NAMED_SETS, n=1)
        guess = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"there is no file, folder or named set {name!r}.{guess} The sets are {', '.join(NAMED_SETS)}")
    return NAMED_SETS[name]


def sources_of(
    name: str,
    *,
    file: Path | None = None,
    cache_dir: Path | None = None,
    offline: bool = False,
    endpoint: str | None = None,
) -> list[Source]:
    """What a named set is made of, downloaded first where that is a file.

    file: one that is here already, in place of the download; it must be the very same. cache_dir: for downloads, the
    user's by default. offline: never touch the network. endpoint: the Hub's address, where it is not the default.
    Raises ValueError for a name that there is not, DataError for what cannot be had.
    """
    origin = named_set(name).origin
    if file is not None and not isinstance(origin, RemoteFile):
        raise ValueError(f"a file, {file}, is given for {name}, which is not one file; prepare the file by its path")
    if isinstance(origin, str):
        return python_library() if origin == "library" else installed_packages()
    if isinstance(origin, RemoteFile):
        if file is not None:
            _require(origin, file, "give the right file, or none to download it")
            return [TextFile(file)]
        return [TextFile(fetch(origin, cache_dir or default_cache_dir(), offline=offline))]
    if offline:
        raise DataError(f"{name} is streamed from the Hugging Face Hub, and offline is set")
    return [pinned(source, endpoint=endpoint) for source in origin]


def python_library(folder: Path | None = None) -> list[Source]:
    """The modules of Python's standard library, a file a document: text that every machine has.

    Those that are single files and written in ASCII, so that there are few characters. folder: where they lie, by
    default those of the Python that runs; what is in them depends on its version.
    Raises DataError where there are few or none (some builds keep them in an archive).
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    found: list[Source] = []
    size = 0
    for path in sorted(folder.glob("*.py")):
        content = path.read_bytes()
        if content.strip() and content.isascii():
            found.append(TextFile(path))
            size += len(content)
    if size < 100_000:
        raise DataError(
            f"{folder} holds {size:,} bytes of Python's standard library; expected a megabyte or more. Give a text of "
            "your own"
        )
    return found


def installed_packages() -> list[Source]:
    """The modules of all packages that this Python finds where packages are installed, a file a document.

    What is in them depends on the packages. Raises DataError where they are less than a megabyte.
    """
    folders = [path for path in map(Path, dict.fromkeys(sys.path)) if path.name in ("site-packages", "dist-packages")]
    found = [PackageModules(folder) for folder in folders if folder.is_dir()]
    size = sum(source.settings()["bytes"] for source in found)
    if size < 1_000_000:
        raise DataError(
            f"the packages of this Python hold {size:,} bytes of modules (looked in {len(found)} folders on sys.path); "
            "expected a megabyte or more. Give a text of your own"
        )
    return list(found)


def fetch(remote: RemoteFile, cache_dir: Path, *, offline: bool = False) -> Path:
    """A file, from the cache or downloaded into it; its checksum is verified either way.

    It appears under its name whole or not at all. Raises DataError.
    """
    path = cache_dir / remote.name
    by_hand = f"or download it yourself, and give it with --file, or put it at {path}"
    if path.exists():
        _require(remote, path, "delete it, and it is downloaded anew")
        return path
    if offline:
        raise DataError(f"{path} is not there and offline is set; run once without --offline, {by_hand}")
    try:
        require_space(cache_dir, remote.size, remote.name)
        cache_dir.mkdir(parents=True, exist_ok=True)
        content = _download(remote, by_hand)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            temporary.write_bytes(content)
            _require(remote, temporary, f"nothing of it was kept; try again, {by_hand}", what=remote.url)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if is_full_disk(error):
            raise full_disk(cache_dir, remote.size, remote.name) from error
        raise DataError(f"the cache folder {cache_dir} cannot be used: {error}") from error
    return path


def _download(remote: RemoteFile, by_hand: str) -> bytes:
    try:
        with closing(urllib.request.urlopen(remote.url, timeout=_ANSWER_SECONDS)) as answer:
            content: bytes = answer.read(remote.size + 1)
    except urllib.error.HTTPError as error:
        raise DataError(f"{remote.url} is refused: {error.code} {error.reason}; try again later, {by_hand}") from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(f"{remote.url} cannot be downloaded: {reason}. Check the network, {by_hand}") from error
    return content


def _require(remote: RemoteFile, path: Path, advice: str, what: str | None = None) -> None:
    """Raises DataError unless a file is what it should be."""
    try:
        size = path.stat().st_size
        digest = file_sha256(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    if (size, digest) != (remote.size, remote.sha256):
        raise DataError(
            f"{what or path} has {size:,} bytes with SHA-256 {digest}; expected {remote.size:,} with {remote.sha256}: "
            f"{advice}"
        )
