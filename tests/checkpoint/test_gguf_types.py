"""Every type of tensor against ggml's own layouts, read into any memory and in little of it."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf_files import (
    allocating_less_than,
    load,
    random_blocks,
    write_gguf,
    write_llama,
)
from torch import Tensor

from fusedlm.checkpoint.errors import CheckpointError
from fusedlm.checkpoint.gguf import GGUFFile

# It would let torch write to memory that must not be written to.
pytestmark = pytest.mark.filterwarnings("error:The given NumPy array is not writable")

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")


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
