"""Load a checkpoint of any kind, with its tokenizer, by path or by name; save one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fusedlm.checkpoint.errors import CheckpointError
from fusedlm.checkpoint.huggingface import load_huggingface, new_directory, read_generation_config, save_huggingface
from fusedlm.checkpoint.sources import resolve
from fusedlm.models import DecoderModel
from fusedlm.tokenizer.interface import Tokenizer

__all__ = ["Checkpoint", "load_checkpoint", "new_directory", "save_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds. generation_config: as in Hugging Face's generation_config.json, empty where none is."""

    model: DecoderModel
    tokenizer: Tokenizer | None
    generation_config: dict[str, Any]


def load_checkpoint(
    name: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    offline: bool = False,
    cache_dir: Path | None = None,
    progress: bool = True,
) -> Checkpoint:
    """The model, tokenizer and generation config of a name (see `sources.resolve`), in dtype on device.

    dtype: torch.int8 keeps matrices in 8 bits, see `load_parameters`.

    Raises ValueError for an unknown name, CheckpointError (a ValueError) for what is damaged or not supported.
    """
    path = resolve(name, offline=offline, cache_dir=cache_dir, progress=progress)
    return _load_gguf(path, dtype, device) if path.is_file() else _load_directory(path, dtype, device)


def _load_gguf(path: Path, dtype: torch.dtype, device: torch.device) -> Checkpoint:
    from fusedlm.checkpoint.gguf import GGUFFile, load_gguf
    from fusedlm.tokenizer.gguf import bpe_from_gguf

    file = GGUFFile(path)
    tokenizer = bpe_from_gguf(file.metadata)
    _check_vocabulary(path, tokenizer, file.shape("token_embd.weight")[0])
    return Checkpoint(load_gguf(file, dtype=dtype, device=device), tokenizer, {})


def _load_directory(path: Path, dtype: torch.dtype, device: torch.device) -> Checkpoint:
    from fusedlm.checkpoint.huggingface import read_config
    from fusedlm.tokenizer.load import has_tokenizer, load_tokenizer

    config = read_config(path)
    tokenizer = load_tokenizer(path) if has_tokenizer(path) else None
    if tokenizer is not None:
        _check_vocabulary(path, tokenizer, config.vocab_size)
    generation_config = read_generation_config(path)
    return Checkpoint(load_huggingface(path, dtype=dtype, device=device), tokenizer, generation_config)


def _check_vocabulary(path: Path, tokenizer: Tokenizer, rows: int) -> None:
    if tokenizer.vocab_size > rows:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens and the embedding {rows} rows; expected at least "
            "as many rows"
        )


def save_checkpoint(
    model: DecoderModel,
    directory: Path,
    *,
    tokenizer: Tokenizer | None = None,
    generation_config: Mapping[str, Any] | None = None,
) -> None:
    """Write a Hugging Face directory into an existing folder (see `new_directory`)."""
    save_huggingface(model, directory, generation_config=generation_config)
    if tokenizer is not None:
        tokenizer.save(directory)
