import random
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFEndian, GGUFReader, GGUFValueType
from gguf_files import (
    TOKENS,
    Tensors,
    gpt2,
    gpt2_metadata,
    gpt2_tensors,
    llama,
    llama_metadata,
    llama_tensors,
    write_gguf,
)
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from fusedlm.checkpoint.errors import CheckpointError
from fusedlm.checkpoint.gguf import GGUFFile, config_from_gguf, load_gguf
from fusedlm.models import DecoderModel

# It would let torch write to memory that must not be written to.
pytestmark = pytest.mark.filterwarnings("error:The given NumPy array is not writable")

CPU = torch.device("cpu")
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")


def load(path: Path, dtype: torch.dtype = torch.float32) -> DecoderModel:
    return load_gguf(GGUFFile(path), dtype=dtype, device=CPU)


def write_llama(path: Path, model: Any = None, type_name: str = "F32", **options: Any) -> Path:
    model = model or llama()
    return write_gguf(path, "llama", llama_metadata(model.config), llama_tensors(model, type_name), **options)


def write_gpt2(path: Path, model: Any = None, type_name: str = "F32", **options: Any) -> Path:
    model = model or gpt2()
    return write_gguf(path, "gpt2", gpt2_metadata(model.config), gpt2_tensors(model, type_name), **options)


# What comes out is the model that went in


def assert_same_logits(ours: DecoderModel, theirs: Any) -> None:
    ids = torch.randint(0, 101, (2, 29), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = ours(ids), theirs(ids).logits
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "num_key_value_heads": 4, "head_dim": 16},
        {"num_key_value_heads": 1, "rope_parameters": LLAMA3 | {"rope_theta": 1e4}, "rms_norm_eps": 1e-3},
        {"rope_parameters": LLAMA3, "head_dim": 64},
    ],
)
def test_llama_is_that_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    theirs = llama(**changes)
    assert_same_logits(load(write_llama(tmp_path / "m.gguf", theirs)), theirs)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-3, "n_inner": 100}])
def test_gpt2_is_that_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    theirs = gpt2(**changes)
    assert_same_logits(load(write_gpt2(tmp_path / "m.gguf", theirs)), theirs)


def test_gpt2_with_a_copy_of_its_embedding_is_tied(tmp_path: Path) -> None:
    theirs = gpt2()
    tensors = gpt2_tensors(theirs, output=True)
    ours = load(write_gguf(tmp_path / "m.gguf", "gpt2", gpt2_metadata(theirs.config), tensors))
    assert ours.head is None
    assert_same_logits(ours, theirs)


def test_alignment_of_another_width(tmp_path: Path) -> None:
    theirs = llama()
    assert_same_logits(load(write_llama(tmp_path / "m.gguf", theirs, alignment=256)), theirs)


def test_llama_as_transformers_reads_the_file(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf", llama(tie_word_embeddings=False), "Q8_0")
    # What from_pretrained(gguf_file=...) calls, which itself asks for a further package.
    config = load_gguf_checkpoint(path)["config"]
    theirs = LlamaForCausalLM(LlamaConfig(**config)).eval()
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=theirs)["tensors"]
    theirs.load_state_dict(tensors)
    assert_same_logits(load(path), theirs)


def test_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    theirs = llama()
    ours = load(write_llama(tmp_path / "m.gguf", theirs), torch.bfloat16)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    expected = theirs.model.layers[1].mlp.down_proj.weight.bfloat16()
    assert torch.equal(ours.get_parameter("blocks.1.mlp.down.weight"), expected)
    assert not ours.training


# Types


def unpack(type_name: str, block: bytes) -> list[float]:
    """The numbers in one block, as the structs of ggml-common.h lay them out and ggml-quants.c reads them."""

    def half(at: int) -> float:
        return float(struct.unpack_from("<e", block, at)[0])

    if type_name in ("F32", "F16"):
        return [struct.unpack("<f" if type_name == "F32" else "<e", block)[0]]
    if type_name == "BF16":
        return [struct.unpack("<f", b"\0\0" + block)[0]]
    if type_name == "Q8_0":
        return [half(0) * q for q in struct.unpack_from("<32b", block, 2)]
    if type_name[:2] in ("Q4", "Q5") and type_name[3] in "01":
        has_min, has_high = type_name[3] == "1", type_name[1] == "5"
        at = 4 if has_min else 2
        high = struct.unpack_from("<I", block, at)[0] if has_high else 0
        nibbles = block[at + 4 * has_high :]
        quants = [n & 15 for n in nibbles] + [n >> 4 for n in nibbles]
        quants = [q | ((high >> i & 1) << 4) for i, q in enumerate(quants)]
        zero = 0 if has_min else 16 if has_high else 8
        return [half(0) * (q - zero) + (half(2) if has_min else 0.0) for q in quants]
    if type_name in ("Q4_K", "Q5_K"):
        s = block[4:16]
        scales = [s[j] & 63 if j < 4 else s[j + 4] & 15 | s[j - 4] >> 6 << 4 for j in range(8)]
        mins = [s[j + 4] & 63 if j < 4 else s[j + 4] >> 4 | s[j] >> 6 << 4 for j in range(8)]
        high_bits = block[16:48] if type_name == "Q5_K" else bytes(32)
        low_bits = block[-128:]
        values = []
        for j in range(8):
            for i in range(32):
                q = low_bits[32 * (j // 2) + i] >> (4 * (j % 2)) & 15 | (high_bits[i] >> j & 1) << 4
                values.append(half(0) * scales[j] * q - half(2) * mins[j])
        return values
    assert type_name == "Q6_K"
    low_bits, high_bits, scales6 = block[:128], block[128:192], struct.unpack_from("<16b", block, 192)
    values = []
    for n in range(2):
        for j in range(4):
            for i in range(32):
                low = low_bits[64 * n + 32 * (j % 2) + i] >> (4 * (j // 2)) & 15
                q = (low | (high_bits[32 * n + i] >> (2 * j) & 3) << 4) - 32
                values.append(half(208) * scales6[8 * n + 2 * j + i // 16] * q)
    return values


def random_blocks(type_name: str, rows: int, width: int) -> np.ndarray:
    """Any bits, but for scales of ordinary size. Returns (rows, bytes a row) uint8."""
    r = np.random.default_rng(0)
    block, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    n = rows * width // block
    if type_name in ("F32", "F16", "BF16"):
        values = r.standard_normal((rows, width)).astype(np.float16 if type_name == "F16" else np.float32)
        return (
            values.view(np.uint8)
            if type_name != "BF16"
            else values.view(np.uint8).reshape(n, 4)[:, 2:].reshape(rows, -1)
        )
    blocks = r.integers(0, 256, (n, size), dtype=np.uint8)
    halves = {"Q8_0": [0], "Q4_0": [0], "Q5_0": [0], "Q6_K": [208]}.get(type_name, [0, 2])
    for at in halves:
        blocks[:, at : at + 2] = r.uniform(-0.1, 0.1, (n, 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def typed_file(path: Path, type_name: str, rows: int, width: int) -> tuple[GGUFFile, np.ndarray]:
    """A file of one tensor of random blocks."""
    blocks = random_blocks(type_name, rows, width)
    return GGUFFile(write_gguf(path, "llama", {}, {"x.weight": (blocks, type_name)})), blocks


@pytest.mark.parametrize("type_name", TYPES)
def test_types(tmp_path: Path, type_name: str) -> None:
    file, blocks = typed_file(tmp_path / "m.gguf", type_name, 3, 512)
    size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[type_name]][1]
    data = blocks.tobytes()
    values = [v for at in range(0, len(data), size) for v in unpack(type_name, data[at : at + size])]
    expected = torch.tensor(values, dtype=torch.float64).view(3, 512)
    assert expected.abs().max() > 0.5
    assert file.shape("x.weight") == (3, 512)
    found = torch.empty(3, 512, dtype=torch.float64)
    file.read("x.weight", found)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("type_name", ["F32", "F16", "Q4_1"])
def test_read_goes_into_any_layout_by_chunks(tmp_path: Path, type_name: str) -> None:
    shape = (700, 1024)  # 2.7 chunks
    file, _ = typed_file(tmp_path / "m.gguf", type_name, *shape)
    theirs = GGUFReader(tmp_path / "m.gguf").tensors[0]
    expected = torch.from_numpy(gguf.quants.dequantize(theirs.data, theirs.tensor_type).copy())
    outs: list[Tensor] = [
        torch.full(shape, torch.nan),
        torch.full(shape[::-1], torch.nan).t(),
        torch.full((700, 2, 1024), torch.nan)[:, 1],
        torch.full(shape, torch.nan, dtype=torch.bfloat16),
        torch.full(shape, torch.nan, dtype=torch.float64),
    ]
    for out in outs:
        file.read("x.weight", out)
        assert torch.equal(out, expected.to(out.dtype))


@contextmanager
def allocating_less_than(size: float) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size


@pytest.mark.parametrize("type_name", TYPES)
def test_reading_takes_a_few_megabytes(tmp_path: Path, type_name: str) -> None:
    file, _ = typed_file(tmp_path / "m.gguf", type_name, 4096, 512)
    out = torch.empty(4096, 512)
    with allocating_less_than(6e6):  # the whole in fp32 takes 8
        file.read("x.weight", out)


def test_reading_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf")
    before = path.read_bytes()
    model = load(path)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert path.read_bytes() == before
    assert torch.count_nonzero(load(path).get_parameter("norm.weight")) > 0


def test_read_refuses_what_does_not_fit(tmp_path: Path) -> None:
    file, _ = typed_file(tmp_path / "m.gguf", "F32", 3, 512)
    with pytest.raises(ValueError, match=r"out has shape \(512, 3\); x.weight has \(3, 512\)"):
        file.read("x.weight", torch.empty(512, 3))
    with pytest.raises(CheckpointError, match=r"no tensor y.weight"):
        file.read("y.weight", torch.empty(3, 512))


# The header


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


def packed(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


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


# Damage


def small(architecture: str) -> tuple[Any, dict[str, Any], Tensors]:
    """One layer, in a file with every kind of thing a header has."""
    if architecture == "gpt2":
        model: Any = gpt2(n_layer=1, vocab_size=32, n_positions=32)
        return model, gpt2_metadata(model.config), gpt2_tensors(model, "Q8_0")
    model = llama(num_hidden_layers=1, vocab_size=32, rope_parameters=LLAMA3)
    return model, llama_metadata(model.config), llama_tensors(model, "Q8_0")


def ends_of_data(path: Path) -> int:
    return GGUFReader(path).data_offset


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_cut_short_anywhere(tmp_path: Path, architecture: str) -> None:
    _, metadata, tensors = small(architecture)
    whole = write_gguf(tmp_path / "whole.gguf", architecture, metadata, tensors)
    content, start = whole.read_bytes(), ends_of_data(whole)
    path = tmp_path / "cut.gguf"
    lengths = [*range(start + 1), *range(start, len(content), 997), len(content) - 1]
    if architecture == "gpt2":
        lengths = lengths[::7]
    for length in lengths:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            GGUFFile(path)


def free_bytes(content: bytes, architecture: str) -> set[int]:
    """Where any bits make a file that no reader can tell from a good one.

    These are the texts of strings (a name, a token), numbers that say how the model computes and of which no tensor
    has the shape (the norm's epsilon, the rotary base, how long a context a Llama takes), and the number of GPT-2's
    heads, which divide the width as well by another number.
    """
    free: set[int] = set()

    def value(key: str, size: int) -> None:
        start = content.index(key.encode()) + len(key) + 4
        free.update(range(start, start + size))

    if architecture == "llama":
        value("llama.attention.layer_norm_rms_epsilon", 4)
        value("llama.rope.freq_base", 4)
        value("llama.context_length", 4)
    else:
        value("gpt2.attention.layer_norm_epsilon", 4)
        value("gpt2.attention.head_count", 4)
    for text in (f"a {architecture}", *TOKENS):
        start = content.index(packed(text)) + 8
        free.update(range(start, start + len(text.encode())))
    return free


def flips(content: bytes, header: int, free: set[int], n: int) -> Iterator[int]:
    """n positions of bits in the header, and every bit of the first 24 bytes (version and counts)."""
    bits = [bit for bit in range(8 * header) if bit // 8 not in free]
    yield from bits[: 8 * 24]
    yield from sorted(random.Random(0).sample(bits[8 * 24 :], n))


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_flipped_bits_of_the_header(tmp_path: Path, architecture: str) -> None:
    """Each is refused, or changes nothing of the model (a name, a token's type, a type of the same values)."""
    _, metadata, tensors = small(architecture)
    path = write_gguf(tmp_path / "m.gguf", architecture, metadata, tensors, alignment=64)
    content, header = bytearray(path.read_bytes()), ends_of_data(path)
    config, model = config_from_gguf(GGUFFile(path)), load(path)
    refused = loaded = 0
    for bit in flips(bytes(content), header, free_bytes(bytes(content), architecture), 800):
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        content[bit // 8] ^= 1 << bit % 8
        try:
            found = load(path)
        except CheckpointError:
            refused += 1
            continue
        loaded += 1
        assert found.config == config, f"bit {bit % 8} of byte {bit // 8}"
        for name, p in model.named_parameters():
            assert torch.equal(found.get_parameter(name), p), f"{name} after bit {bit % 8} of byte {bit // 8}"
    assert refused > 4 * loaded > 0


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_flipped_bits_that_nobody_can_judge(tmp_path: Path, architecture: str) -> None:
    """They may give another model, and only that: no error of another kind, no other parameters."""
    _, metadata, tensors = small(architecture)
    path = write_gguf(tmp_path / "m.gguf", architecture, metadata, tensors)
    content = bytearray(path.read_bytes())
    model = load(path)
    for byte in sorted(free_bytes(bytes(content), architecture)):
        for bit in (0, 3, 7):
            content[byte] ^= 1 << bit
            path.write_bytes(content)
            content[byte] ^= 1 << bit
            try:
                found = load(path)
            except CheckpointError:
                continue
            for name, p in model.named_parameters():
                assert torch.equal(found.get_parameter(name), p)


# Memory


MEASURE = """
import sys, threading, time
import torch
from fusedlm.checkpoint.gguf import GGUFFile, load_gguf
from fusedlm.models import PRESETS, build_model

build_model(PRESETS["tiny-llama"], device="meta").to(torch.bfloat16)  # what torch imports when it is first used

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def sample():
    while not done.is_set():
        peaks.append(anonymous())
        time.sleep(0.001)

before, peaks, done = anonymous(), [], threading.Event()
sampler = threading.Thread(target=sample)
sampler.start()
model = load_gguf(GGUFFile(sys.argv[1]), dtype=getattr(torch, sys.argv[2]), device=torch.device("cpu"))
done.set()
sampler.join()
sizes = [p.numel() * p.element_size() for p in model.parameters()]
print(max(peaks) - before, sum(sizes), max(sizes), len(peaks))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_holds_little_beside_the_model(tmp_path: Path) -> None:
    """The bound is 1.2 models and one tensor; this one is tighter, so that a copy of the 78 MB file would break it."""
    V, C, F, n_layers = 49152, 512, 1536, 16
    blocks = random_blocks("Q8_0", V, C)

    def tensor(rows: int, width: int) -> tuple[np.ndarray, str]:
        return blocks.reshape(-1)[: rows * width // 32 * 34].reshape(rows, -1), "Q8_0"

    ones = (np.ones(C, np.float32), "F32")
    tensors: Tensors = {"token_embd.weight": tensor(V, C), "output_norm.weight": ones}
    shapes = {"attn_q": (C, C), "attn_k": (128, C), "attn_v": (128, C), "attn_output": (C, C)}
    shapes |= {"ffn_gate": (F, C), "ffn_up": (F, C), "ffn_down": (C, F)}
    for i in range(n_layers):
        tensors |= {f"blk.{i}.{name}.weight": tensor(*shape) for name, shape in shapes.items()}
        tensors |= {f"blk.{i}.attn_norm.weight": ones, f"blk.{i}.ffn_norm.weight": ones}
    metadata = {
        "llama.context_length": 2048,
        "llama.embedding_length": C,
        "llama.block_count": n_layers,
        "llama.feed_forward_length": F,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.tokens": [f"token {i}" for i in range(V)],
        "tokenizer.ggml.token_type": [1] * V,
    }
    path = write_gguf(tmp_path / "m.gguf", "llama", metadata, tensors)
    assert path.stat().st_size > 75e6
    for dtype in ("float32", "bfloat16"):
        command = [sys.executable, "-c", MEASURE, str(path), dtype]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peak, model, largest, samples = map(int, output.split())
        assert samples > 100
        assert peak <= 1.2 * model + largest
        assert peak <= model + 60e6, dtype
