"""Read GGUF files, llama.cpp's format: one file with the hyperparameters, the tokenizer and quantised tensors.

The header is small and is checked whole when a file is opened; tensors stay in the memory-mapped file and are
dequantised a chunk at a time. Format: docs/gguf.md of github.com/ggml-org/ggml, versions 2 and 3, little-endian.
"""

import mmap
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize
from torch import Tensor

from fusedlm.checkpoint.errors import CheckpointError
from fusedlm.checkpoint.gguf_config import ARCHITECTURES, config_from_gguf
from fusedlm.checkpoint.names import gguf_names
from fusedlm.checkpoint.parameters import load_parameters
from fusedlm.models import DecoderModel

__all__ = ["GGUFFile", "config_from_gguf", "load_gguf"]

_VERSIONS = (2, 3)
_SUPPORTED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
_TYPE_NAMES = {type_.value: type_.name for type_ in GGMLQuantizationType}
_CHUNK = 2**18  # elements dequantised at once: their temporaries (about 4 MB) stay in the cache
_SERIAL = 2**15 - 1  # elements that torch copies in one thread: a busy machine's threads wait long for one another

_NUMBERS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
    GGUFValueType.BOOL: "<B",
}


@dataclass(frozen=True, slots=True)
class _TensorInfo:
    """shape: rows first. start, size: bytes of the file."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    size: int


class _Header:
    """A cursor over the header that refuses to step past the end of the file. Errors name what was being read."""

    def __init__(self, where: str, data: mmap.mmap) -> None:
        self.where = where
        self.data = data
        self.position = 0

    def skip(self, size: int, what: str) -> int:
        """Step over size bytes. Returns where they start."""
        start, left = self.position, len(self.data) - self.position
        if size > left:
            raise CheckpointError(
                f"{self.where}: the file is cut short or damaged: {what} takes {size} bytes at byte {start}, and "
                f"{left} are left"
            )
        self.position = start + size
        return start

    def number(self, form: str, what: str) -> Any:
        """A number in a format of the struct module."""
        return struct.unpack_from(form, self.data, self.skip(struct.calcsize(form), what))[0]

    def text(self, what: str) -> str:
        size = self.number("<Q", f"the length of {what}")
        start = self.skip(size, what)
        try:
            return self.data[start : start + size].decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.where}: {what} at byte {start} is not UTF-8") from error

    def value(self, what: str) -> Any:
        """A metadata value. Numeric arrays come as views of the file, so that an absurd length costs nothing."""
        type_ = self._value_type(what)
        if type_ == GGUFValueType.STRING:
            return self.text(what)
        if type_ != GGUFValueType.ARRAY:
            value = self.number(_NUMBERS[type_], what)
            return self._booleans(np.uint8(value), what).item() if type_ == GGUFValueType.BOOL else value
        type_, count = self._value_type(what), self.number("<Q", f"the length of {what}")
        if type_ == GGUFValueType.ARRAY:
            raise CheckpointError(f"{self.where}: {what} is an array of arrays; expected one of numbers or strings")
        if type_ == GGUFValueType.STRING:
            start = self.skip(8 * count, what)  # the least that so many take
            self.position = start
            return [self.text(what) for _ in range(count)]
        dtype = np.dtype(_NUMBERS[type_])
        array = np.frombuffer(self.data, dtype, count, self.skip(count * dtype.itemsize, what))
        return self._booleans(array, what) if type_ == GGUFValueType.BOOL else array

    def metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for i in range(count):
            key = self.text(f"the key of metadata entry {i}")
            if not key:
                raise CheckpointError(f"{self.where}: the key of metadata entry {i} is empty")
            if key in metadata:
                raise CheckpointError(f"{self.where}: metadata {key!r} is there twice")
            metadata[key] = self.value(f"metadata {key!r}")
        return metadata

    def tensors(self, count: int, alignment: int) -> dict[str, _TensorInfo]:
        """Tensors by name, with their place in the file: one behind the other, each padded to the alignment."""
        rows = [self._tensor(i) for i in range(count)]
        start = first = _align(self.position, alignment)
        end = self.position
        tensors: dict[str, _TensorInfo] = {}
        for name, shape, type_, offset in rows:
            if name in tensors:
                raise CheckpointError(f"{self.where}: tensor {name} is there twice")
            if offset != start - first:
                raise CheckpointError(
                    f"{self.where}: tensor {name} begins at offset {offset} of the data; expected {start - first}, "
                    f"where the one before it ends (padded to {alignment} bytes)"
                )
            block, block_bytes = GGML_QUANT_SIZES[type_]
            size = shape[-1] // block * block_bytes
            for rows_there in shape[:-1]:
                size *= rows_there
            tensors[name] = _TensorInfo(shape, type_, start, size)
            end = start + size
            if end > len(self.data):
                raise CheckpointError(
                    f"{self.where}: the file is cut short: tensor {name} ends at byte {end}, the file at "
                    f"{len(self.data)}"
                )
            start = _align(end, alignment)
        if len(self.data) not in (end, start):
            raise CheckpointError(f"{self.where}: the last tensor ends at byte {end}, the file at {len(self.data)}")
        return tensors

    def _tensor(self, i: int) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        """Name, shape, type and offset of one tensor."""
        name = self.text(f"the name of tensor {i}")
        what = f"{self.where}: tensor {name}"
        dimensions = self.number("<I", f"the shape of tensor {name}")
        if dimensions not in (1, 2):
            raise CheckpointError(f"{what} has {dimensions} dimensions; expected 1 or 2 (experts are not supported)")
        shape = tuple(self.number("<Q", f"the shape of tensor {name}") for _ in range(dimensions))[::-1]
        number = self.number("<I", f"the type of tensor {name}")
        if _TYPE_NAMES.get(number) not in _SUPPORTED:
            given = _TYPE_NAMES.get(number, number)
            raise CheckpointError(f"{what} has type {given}; expected one of {', '.join(_SUPPORTED)}")
        type_ = GGMLQuantizationType(number)
        block = GGML_QUANT_SIZES[type_][0]
        if 0 in shape or shape[-1] % block:
            raise CheckpointError(f"{what} has shape {shape}; expected rows of a multiple of {block} for {type_.name}")
        return name, shape, type_, self.number("<Q", f"the offset of tensor {name}")

    def _value_type(self, what: str) -> GGUFValueType:
        number = self.number("<I", f"the type of {what}")
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise CheckpointError(f"{self.where}: {what} has type {number}; expected 0 to 12") from error

    def _booleans(self, value: Any, what: str) -> Any:
        if np.any(value > 1):
            raise CheckpointError(f"{self.where}: {what} is a boolean of {np.max(value)}; expected 0 or 1")
        return value.astype(bool)


def _align(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


class GGUFFile:
    """An open GGUF file: its metadata in memory, its tensors in the memory-mapped file (a `TensorReader`).

    path: the file. metadata: its keys, as str, int, float, bool or lists of these. architecture: "gpt2" or "llama".
    Raises CheckpointError where the file is missing, cut short, damaged, big-endian, of another version than 2 or 3, of
    another architecture, or has a tensor of a type that is not supported (F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1,
    Q4_K, Q5_K and Q6_K are). Weights are not looked at: a damaged one is a wrong number.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        where = str(self.path)
        if not self.path.is_file():
            raise CheckpointError(f"{where}: no such file")
        try:
            with open(self.path, "rb") as f:
                if f.read(4) != b"GGUF":
                    raise CheckpointError(f"{where}: not a GGUF file: it does not begin with 'GGUF'")
                self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{where}: cannot be read: {error.strerror}") from error
        header = _Header(where, self._map)
        header.skip(4, "the magic number")
        version = header.number("<I", "the version")
        if version not in _VERSIONS:
            if version & 0xFFFF == 0:
                raise CheckpointError(f"{where}: the file is big-endian; expected a little-endian one")
            raise CheckpointError(f"{where}: GGUF version {version}; expected 2 or 3")
        n_tensors, n_metadata = header.number("<Q", "the tensor count"), header.number("<Q", "the metadata count")
        metadata = header.metadata(n_metadata)
        self.architecture = _architecture(where, metadata)
        self._tensors = header.tensors(n_tensors, _alignment(where, metadata))
        # glibc returns freed memory at once until a larger block has been freed, and every chunk of `read` would fault
        # its temporaries in anew, three times as slow. This is that block.
        np.empty(32 * _CHUNK, np.uint8)
        self.metadata = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in metadata.items()}

    def names(self) -> Iterable[str]:
        """Names of all tensors there, in the order of the file."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, rows first. Raises CheckpointError where there is none of that name."""
        return self._info(name).shape

    def read(self, name: str, out: Tensor) -> None:
        """Dequantise a tensor into out, which has its shape and any dtype, strides and device, by way of a few MB.

        Raises CheckpointError where there is none of that name, ValueError where out has another shape.
        """
        info = self._info(name)
        if tuple(out.shape) != info.shape:
            raise ValueError(f"out has shape {tuple(out.shape)}; {name} has {info.shape}")
        rows = out if out.ndim == 2 else out.unsqueeze(0)
        n_rows, width = rows.shape
        data = np.frombuffer(self._map, np.uint8, info.size, info.start).reshape(n_rows, -1)
        step, part = max(1, _CHUNK // width), max(1, _SERIAL // width)
        for start in range(0, n_rows, step):
            # Flat, since dequantize goes through a matrix by 16 rows, which is slower for being less at once.
            values = dequantize(data[start : start + step].reshape(-1), info.type)
            values = np.require(values, requirements="W")  # F32 is the file itself, which torch must not write to
            target, source = rows[start : start + step], torch.from_numpy(values).view(-1, width)
            for i in range(0, len(source), part):
                target[i : i + part].copy_(source[i : i + part])

    def same_data(self, a: str, b: str) -> bool:
        """Whether two tensors have the same shape, type and bytes."""
        x, y = self._info(a), self._info(b)
        if (x.shape, x.type) != (y.shape, y.type):
            return False
        steps = [(start, min(_CHUNK, x.size - start)) for start in range(0, x.size, _CHUNK)]
        return all(
            self._map[x.start + start : x.start + start + n] == self._map[y.start + start : y.start + start + n]
            for start, n in steps
        )

    def _info(self, name: str) -> _TensorInfo:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: no tensor {name}")
        return self._tensors[name]


def _architecture(where: str, metadata: dict[str, Any]) -> str:
    """The architecture of a file that holds a whole model of one we know."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        given = "no architecture" if architecture is None else f"architecture {architecture!r}"
        raise CheckpointError(
            f"{where}: {given}; expected general.architecture to be one of {', '.join(ARCHITECTURES)}"
        )
    parts = metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise CheckpointError(f"{where}: one of {parts} parts of a model; expected a whole one (merge with gguf-split)")
    return architecture


def _alignment(where: str, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"{where}: general.alignment is {alignment!r}; expected a power of two")
    return alignment


def load_gguf(file: GGUFFile, *, dtype: torch.dtype, device: torch.device) -> DecoderModel:
    """The model in a GGUF file, ready for evaluation: parameters dequantised to fp32 and rounded once to dtype.

    Memory beside the model is a few MB, plus one of its matrices. Raises CheckpointError where the file does not
    describe a model of its architecture that can be run here, before any data is read.
    """
    config = config_from_gguf(file)
    # Both are known from the config by now: a tied head's copy and the rotary frequencies.
    ignored = ("output.weight", "rope_freqs.weight")
    where = str(file.path)
    return load_parameters(config, file, gguf_names(config), where=where, dtype=dtype, device=device, ignored=ignored)
