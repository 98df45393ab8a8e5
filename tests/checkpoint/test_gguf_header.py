"""The header against the gguf package's reader, and what is refused in one."""

import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFEndian, GGUFReader, GGUFValueType
from gguf_files import (
    TOKENS,
    allocating_less_than,
    llama,
    llama_metadata,
    llama_tensors,
    load,
    packed,
    write_gguf,
    write_gpt2,
    write_llama,
)

from fusedlm.checkpoint.errors import CheckpointError
from fusedlm.checkpoint.gguf import GGUFFile

# It would let torch write to memory that must not be written to.
pytestmark = pytest.mark.filterwarnings("error:The given NumPy array is not writable")


@pytest.mark.parametrize("write", [write_llama, write_gpt2])
def test_metadata_and_tensors_are_those_of_ggufs_reader(tmp_path: Path, write: Callable[..., Path]) -> None:
    path = write(tmp_path / "m.gguf", type_name="Q8_0")
    file, theirs = GGUFFile(path), GGUFReader(path)
    expected = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert file.metadata == expected
    assert {k: type(v) for k, v in file.metadata.items()} == {k: type(v) for k, v in expected.items()}
    assert file.metadata["tokenizer.ggml.tokens"] == TOKENS
    assert file.path == path
    assert file.architecture == expected["general.architecture"]
    assert {n: file.shape(n) for n in file.names()} == {t.name: tuple(t.shape[::-1].tolist()) for t in theirs.tensors}


def entry(key: str | bytes, type_: GGUFValueType | int, value: bytes) -> bytes:
    return packed(key) + struct.pack("<I", type_) + value


LLAMA = entry("general.architecture", GGUFValueType.STRING, packed("llama"))


def info(name: str, shape: tuple[int, ...], type_: int, offset: int) -> bytes:
    numbers = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], type_, offset)
    return packed(name) + numbers


def raw(
    entries: list[bytes],
    tensors: list[bytes],
    data: int = 0,
    *,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """A file by hand: with data bytes behind its header."""
    counts = counts or (len(tensors), len(entries))
    header = struct.pack("<4sIQQ", b"GGUF", 3, *counts) + b"".join(entries) + b"".join(tensors)
    return header + bytes(-len(header) % alignment + data)


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[bytes], GGUFFile]:
    def open_bytes(content: bytes) -> GGUFFile:
        (tmp_path / "raw.gguf").write_bytes(content)
        return GGUFFile(tmp_path / "raw.gguf")

    return open_bytes


def array(type_: GGUFValueType, count: int, content: bytes) -> bytes:
    return struct.pack("<IQ", type_, count) + content


def test_every_kind_of_value(opened: Callable[[bytes], GGUFFile]) -> None:
    T = GGUFValueType
    scalars: dict[str, tuple[T, str, Any]] = {
        "u8": (T.UINT8, "<B", 255),
        "i8": (T.INT8, "<b", -128),
        "u16": (T.UINT16, "<H", 2**16 - 1),
        "i16": (T.INT16, "<h", -(2**15)),
        "u32": (T.UINT32, "<I", 2**32 - 1),
        "i32": (T.INT32, "<i", -(2**31)),
        "u64": (T.UINT64, "<Q", 2**64 - 1),
        "i64": (T.INT64, "<q", -(2**63)),
        "f32": (T.FLOAT32, "<f", -0.15625),
        "f64": (T.FLOAT64, "<d", 0.1),
        "yes": (T.BOOL, "<?", True),
        "no": (T.BOOL, "<?", False),
    }
    entries = [LLAMA]
    expected: dict[str, Any] = {"general.architecture": "llama", "none": []}
    for key, (type_, form, value) in scalars.items():
        entries.append(entry(key, type_, struct.pack(form, value)))
        entries.append(entry(f"{key} list", T.ARRAY, array(type_, 2, struct.pack(form, value) * 2)))
        expected |= {key: value, f"{key} list": [value] * 2}
    entries.append(entry("none", T.ARRAY, array(T.UINT32, 0, b"")))
    found = opened(raw(entries, [])).metadata
    assert found == expected
    for key, value in expected.items():
        assert type(found[key]) is type(value)
        assert not isinstance(value, list) or [type(v) for v in found[key]] == [type(v) for v in value]


@pytest.mark.parametrize("padding", [0, 28])
def test_the_last_tensor_may_be_padded_or_not(opened: Callable[[bytes], GGUFFile], padding: int) -> None:
    file = opened(raw([LLAMA], [info("a", (3,), 0, 0), info("b", (2, 1), 0, 32)], 32 + 8 + (24 if padding else 0)))
    assert [(n, file.shape(n)) for n in file.names()] == [("a", (3,)), ("b", (2, 1))]


T = GGUFValueType
U32 = struct.pack("<I", 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a GGUF file"),
        (b"GG", "not a GGUF file"),
        (b"GGML" + bytes(100), "not a GGUF file"),
        (b"GGUF", "cut short or damaged: the version takes 4 bytes at byte 4, and 0 are left"),
        (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "GGUF version 1; expected 2 or 3"),
        (struct.pack("<4sIQQ", b"GGUF", 4, 0, 0), "GGUF version 4; expected 2 or 3"),
        (raw([], []), "no architecture; expected general.architecture to be one of gpt2, llama"),
        (
            raw([entry("general.architecture", T.STRING, packed("qwen2"))], []),
            "architecture 'qwen2'; expected .* gpt2, llama",
        ),
        (raw([entry("general.architecture", T.UINT32, U32)], []), "architecture 1; expected"),
        (raw([LLAMA, LLAMA], []), "metadata 'general.architecture' is there twice"),
        (raw([LLAMA, entry("split.count", T.UINT16, b"\x03\0")], []), "one of 3 parts of a model"),
        (raw([LLAMA, entry(b"\xff", T.UINT32, U32)], []), "the key of metadata entry 1 at byte .* is not UTF-8"),
        (raw([LLAMA, entry("x", T.STRING, packed(b"\xc3"))], []), "metadata 'x' at byte .* is not UTF-8"),
        (raw([LLAMA, entry("x", 13, U32)], []), "metadata 'x' has type 13; expected 0 to 12"),
        (raw([LLAMA, entry("x", T.BOOL, b"\x02")], []), "metadata 'x' is a boolean of 2"),
        (raw([LLAMA, entry("x", T.ARRAY, array(T.BOOL, 2, b"\x01\x80"))], []), "metadata 'x' is a boolean of 128"),
        (raw([LLAMA, entry("x", T.ARRAY, array(T.ARRAY, 1, bytes(40)))], []), "metadata 'x' is an array of arrays"),
        (raw([LLAMA, entry("general.alignment", T.UINT32, bytes(4))], []), "general.alignment is 0; expected a power"),
        (raw([LLAMA, entry("general.alignment", T.UINT32, b"\x18\0\0\0")], []), "general.alignment is 24"),
        (raw([LLAMA, entry("general.alignment", T.STRING, packed("32"))], []), "general.alignment is '32'"),
        (raw([LLAMA], [], counts=(0, 2)), "the key of metadata entry 1 is empty"),
        (raw([LLAMA], [], counts=(1, 1)), "tensor  has 0 dimensions"),
        (raw([LLAMA], [info("a", (8,), 0, 0)] * 2, 64), "tensor a is there twice"),
        (raw([LLAMA], [info("a", (2, 2, 2), 0, 0)], 32), "tensor a has 3 dimensions; expected 1 or 2"),
        (raw([LLAMA], [info("a", (), 0, 0)], 32), "tensor a has 0 dimensions"),
        (raw([LLAMA], [info("a", (0, 8), 0, 0)], 32), r"tensor a has shape \(0, 8\)"),
        (raw([LLAMA], [info("a", (8, 0), 0, 0)], 32), r"tensor a has shape \(8, 0\)"),
        (
            raw([LLAMA], [info("a", (2, 40), 8, 0)], 96),
            r"tensor a has shape \(2, 40\); expected rows of a multiple of 32",
        ),
        (
            raw([LLAMA], [info("a", (1, 32), 28, 0)], 256),
            "tensor a has type F64; expected one of F32, F16, BF16, Q8_0, Q4_0",
        ),
        (raw([LLAMA], [info("a", (1, 256), 23, 0)], 160), "tensor a has type IQ4_XS; expected one of"),
        (raw([LLAMA], [info("a", (1, 256), 99, 0)], 160), "tensor a has type 99; expected one of"),
        (raw([LLAMA], [info("a", (8,), 0, 32)], 64), "tensor a begins at offset 32 of the data; expected 0"),
        (
            raw([LLAMA], [info("a", (9,), 0, 0), info("b", (8,), 0, 32)], 96),
            "tensor b begins at offset 32 .* expected 64",
        ),
        (
            raw([LLAMA], [info("a", (8,), 0, 0), info("b", (8,), 0, 64)], 96),
            "tensor b begins at offset 64 .* expected 32",
        ),
        (
            raw([LLAMA], [info("a", (8,), 0, 0), info("b", (8,), 0, 0)], 64),
            "tensor b begins at offset 0 .* expected 32",
        ),
        (raw([LLAMA], [info("a", (8,), 0, 0)], 31), "cut short: tensor a ends at byte .*, the file at"),
        (raw([LLAMA], [info("a", (8,), 0, 0)], 64), "the last tensor ends at byte .*, the file at"),
        (raw([LLAMA], [info("a", (2,), 0, 0)], 9), "the last tensor ends at byte .*, the file at"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",
)
def test_refused(opened: Callable[[bytes], GGUFFile], content: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        opened(content)


BIG = (2**27, 2**40, 2**63, 2**64 - 1)


@pytest.mark.parametrize(
    "content",
    [
        *(raw([LLAMA], [], counts=(0, n)) for n in BIG),
        *(raw([LLAMA], [], counts=(n, 1)) for n in BIG),
        *(raw([LLAMA, struct.pack("<Q", n)], []) for n in BIG),
        *(raw([LLAMA, entry("x", T.STRING, struct.pack("<Q", n))], []) for n in BIG),
        *(raw([LLAMA, entry("x", T.ARRAY, array(t, n, b""))], []) for n in BIG for t in (T.STRING, T.UINT8, T.FLOAT64)),
        *(raw([LLAMA], [info("a", (n, 1), 0, 0)], 32) for n in BIG),
        *(raw([LLAMA], [info("a", (n, n), 0, 0)], 32) for n in BIG),
        *(raw([LLAMA], [packed("a") + struct.pack("<I", n % 2**32)], 32) for n in BIG),
        *(raw([LLAMA], [info("a", (8,), 0, n)], 32) for n in BIG),
    ],
    ids=lambda _: "file",
)
def test_absurd_counts_fail_at_once(opened: Callable[[bytes], GGUFFile], content: bytes) -> None:
    start = time.perf_counter()
    with allocating_less_than(1e6), pytest.raises(CheckpointError):
        opened(content)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(("type_", "count"), [(T.UINT8, 2**26), (T.STRING, 2**24 + 1)])
def test_an_array_that_goes_on_into_the_tensors_allocates_nothing(
    tmp_path: Path, type_: GGUFValueType, count: int
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw([LLAMA, entry("x", T.ARRAY, array(type_, count, b""))], []))
    with open(path, "r+b") as f:
        f.truncate(2**27)
    with allocating_less_than(1e6), pytest.raises(CheckpointError):
        GGUFFile(path)


def test_no_such_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(CheckpointError, match=f"{path}: no such file"):
            GGUFFile(path)


def test_big_endian(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the file is big-endian"):
        GGUFFile(write_llama(tmp_path / "m.gguf", endianess=GGUFEndian.BIG))


def test_unknown_tensors_are_refused(tmp_path: Path) -> None:
    theirs = llama()
    bias = {"blk.0.attn_q.bias": (np.zeros(128, np.float32), "F32")}
    path = write_gguf(tmp_path / "m.gguf", "llama", llama_metadata(theirs.config), llama_tensors(theirs) | bias)
    with pytest.raises(CheckpointError, match=r"blk.0.attn_q.bias is not known"):
        load(path)
