"""Hugging Face directories in and out: config.json, safetensors (one file or shards), old PyTorch files.

What we write carries the SHA-256 of every tensor in the safetensors metadata, and reading checks it.
"""

import hashlib
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fusedlm.checkpoint.config import config_from_huggingface, config_to_huggingface
from fusedlm.checkpoint.errors import CheckpointError
from fusedlm.checkpoint.names import NameMap, huggingface_names
from fusedlm.checkpoint.parameters import load_parameters
from fusedlm.models import DecoderModel, GPT2Config, ModelConfig

CHECKSUMS = "fusedlm.sha256"  # key in the safetensors metadata: a JSON object, tensor name to hexadecimal digest

# Tensors that old files carry and no model needs: the causal mask's buffers and rotary tables.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError where it is missing, not UTF-8, not JSON or no object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}; expected an object")
    return values


def read_config(directory: Path) -> ModelConfig:
    """The model config of a Hugging Face directory. Raises CheckpointError."""
    path = directory / "config.json"
    return config_from_huggingface(read_json(path), where=str(path))


def read_generation_config(directory: Path) -> dict[str, Any]:
    """generation_config.json, or nothing where there is none."""
    path = directory / "generation_config.json"
    return read_json(path) if path.exists() else {}


class _Files:
    """Named tensors spread over files that were opened already. A TensorReader."""

    def __init__(self) -> None:
        self._tensors: dict[str, tuple[Path, Any]] = {}  # name in the file -> (file, its handle)
        self._checksums: dict[str, str] = {}
        self._alias: dict[str, str] = {}  # the name asked for -> the name in the file

    def names(self) -> Iterable[str]:
        return self._alias.keys()

    def _add(self, path: Path, handle: Any, names: Iterable[str]) -> None:
        for name in names:
            if name in self._tensors:
                raise CheckpointError(f"{name} is in both {self._tensors[name][0].name} and {path.name}")
            self._tensors[name] = (path, handle)
            self._alias[name] = name

    def add_prefix(self, expected: set[str], prefix: str) -> None:
        """Answer to prefix + name too, where a file was written from the model without its head (as gpt2's was)."""
        if not expected & self._alias.keys():
            self._alias = {(prefix + name if prefix + name in expected else name): name for name in self._tensors}

    def drop(self, unneeded: Iterable[str]) -> None:
        for name in unneeded:
            self._alias.pop(name, None)


class SafetensorsFiles(_Files):
    """Memory-mapped safetensors files."""

    def __init__(self, paths: Iterable[Path]) -> None:
        super().__init__()
        for path in paths:
            try:
                handle = safe_open(path, framework="pt")
                names: list[str] = handle.keys()  # type: ignore[no-untyped-call]
            except FileNotFoundError:
                raise CheckpointError(f"{path} is missing") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error
            self._add(path, handle, names)
            metadata = handle.metadata()  # type: ignore[no-untyped-call]
            checksums = (metadata or {}).get(CHECKSUMS)
            if checksums is not None:
                try:
                    self._checksums |= json.loads(checksums)
                except (ValueError, TypeError) as error:
                    raise CheckpointError(f"{path}: its checksums cannot be read: {error}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        name = self._alias[name]
        return tuple(self._tensors[name][1].get_slice(name).get_shape())

    def read(self, name: str, out: Tensor) -> None:
        name = self._alias[name]
        path, handle = self._tensors[name]
        tensor = handle.get_tensor(name)  # a view of the mapped file
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}, a quantization that is not supported")
        if name in self._checksums and sha256_of(tensor) != self._checksums[name]:
            raise CheckpointError(f"{path}: the data of {name} differs from its checksum; the file is damaged")
        out.copy_(tensor)


class TorchFiles(_Files):
    """Old pytorch_model.bin files, unpickled with weights only, so that no code in them runs."""

    def __init__(self, paths: Iterable[Path]) -> None:
        super().__init__()
        for path in paths:
            tensors = _load_pickle(path)
            self._add(path, tensors, tensors.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        name = self._alias[name]
        return tuple(self._tensors[name][1][name].shape)

    def read(self, name: str, out: Tensor) -> None:
        name = self._alias[name]
        out.copy_(self._tensors[name][1][name])


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        try:
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            values = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} is refused: it holds more than tensors, which could run code") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is truncated or not a PyTorch file: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(v, Tensor) for v in values.values()):
        raise CheckpointError(f"{path} is not a state dict of tensors")
    return values


def sha256_of(tensor: Tensor) -> str:
    """Hexadecimal SHA-256 of a tensor's elements as they lie in a file."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to files")
    paths = [index.parent / file for file in sorted(set(weight_map.values()))]
    if any(path.resolve().parent != index.parent.resolve() and ".." in str(path) for path in paths):
        raise CheckpointError(f"{index} points outside its folder")
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise CheckpointError(f"{index}: shards are missing: {', '.join(missing)} (of {len(paths)})")
    return paths


def open_tensors(directory: Path) -> SafetensorsFiles | TorchFiles:
    """The tensors of a Hugging Face directory. Raises CheckpointError where none are there or a shard is missing."""
    for kind, single in ((SafetensorsFiles, "model.safetensors"), (TorchFiles, "pytorch_model.bin")):
        if (directory / single).exists():
            return kind([directory / single])
        if (directory / f"{single}.index.json").exists():
            return kind(_shards(directory / f"{single}.index.json"))
    raise CheckpointError(
        f"{directory} has no weights; expected model.safetensors, model.safetensors.index.json, pytorch_model.bin or "
        "pytorch_model.bin.index.json"
    )


def load_huggingface(directory: Path, *, dtype: torch.dtype, device: torch.device) -> DecoderModel:
    """The model of a Hugging Face directory, in dtype on device.

    Raises CheckpointError for whatever is missing, damaged, unsupported or does not fit the config.
    """
    config = read_config(directory)
    names = huggingface_names(config)
    reader = open_tensors(directory)
    expected = {piece.name for pieces in names.values() for piece in pieces}
    prefix = next(iter(names["embedding.weight"])).name.split(".")[0] + "."
    reader.add_prefix(expected, prefix)
    reader.drop([name for name in reader.names() if name.endswith(_BUFFERS)])
    if config.tied:
        reader.drop(["lm_head.weight"])
    return load_parameters(config, reader, names, where=str(directory), dtype=dtype, device=device)


def _file_tensors(model: DecoderModel, names: NameMap) -> Iterator[tuple[str, Tensor]]:
    parameters = dict(model.named_parameters())
    weight = model.embedding.weight
    for ours, pieces in names.items():
        for piece in pieces:
            if ours in parameters:
                rows = parameters[ours].detach()[piece.start : piece.stop]
            else:  # a bias that the file's form has, and the model has not
                rows = weight.new_zeros(piece.stop - piece.start)
            yield piece.name, rows.t() if piece.transposed else rows


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A folder that appears under its name only when everything in it has been written, or not at all.

    Raises ValueError where path is there already and is not an empty folder.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists already; expected a new name or an empty folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield partial
        for file in partial.iterdir():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        partial.chmod(0o755)
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def save_huggingface(
    model: DecoderModel,
    directory: Path,
    *,
    generation_config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write config.json, generation_config.json and safetensors into an existing folder (see `new_directory`).

    `transformers` loads them and computes the same logits; GPT-2 with grouped heads, which it does not know, is saved
    for us alone, and GPT-2 without biases with biases of 0. Tensors are written in the model's dtype, in shards of at
    most max_shard_bytes (one tensor at least).
    """
    config = replace(model.config, bias=True) if isinstance(model.config, GPT2Config) else model.config
    names = huggingface_names(config)
    dtype = model.embedding.weight.dtype
    _write_json(directory / "config.json", config_to_huggingface(config, dtype))
    if generation_config:
        _write_json(directory / "generation_config.json", dict(generation_config))
    shards: list[list[str]] = [[]]
    size = total = 0
    tensors = dict(_file_tensors(model, names))
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
        total += tensor.nbytes
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        contents = {name: tensors[name].cpu().contiguous() for name in shard}
        checksums = {name: sha256_of(tensor) for name, tensor in contents.items()}
        save_file(contents, directory / file, metadata={"format": "pt", CHECKSUMS: json.dumps(checksums)})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
