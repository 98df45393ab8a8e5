"""Files that were cut short, and files with a bit flipped."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from gguf_files import (
    LLAMA3,
    TOKENS,
    Tensors,
    gpt2,
    gpt2_metadata,
    gpt2_tensors,
    llama,
    llama_metadata,
    llama_tensors,
    load,
    packed,
    write_gguf,
)

from fusedlm.checkpoint.errors import CheckpointError
from fusedlm.checkpoint.gguf import GGUFFile, config_from_gguf

# It would let torch write to memory that must not be written to.
pytestmark = pytest.mark.filterwarnings("error:The given NumPy array is not writable")


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
