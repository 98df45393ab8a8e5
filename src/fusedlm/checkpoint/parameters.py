"""Fill a model's parameters from a file, one tensor at a time, so that memory never holds much more than the model."""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from fusedlm.checkpoint.errors import CheckpointError
from fusedlm.checkpoint.names import NameMap, Piece
from fusedlm.models import DecoderModel, ModelConfig, build_model
from fusedlm.models.quantized import Int8Weight


class TensorReader(Protocol):
    """A file (or several) of named tensors."""

    def names(self) -> Iterable[str]:
        """Names of all tensors there."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as torch has it, rows first, without reading the data."""
        ...

    def read(self, name: str, out: Tensor) -> None:
        """Write the tensor into out, of its shape and any dtype and strides, by way of at most a small buffer."""
        ...


def _file_shape(piece: Piece, parameter: Tensor) -> tuple[int, ...]:
    shape = (piece.stop - piece.start, *parameter.shape[1:])
    return shape[::-1] if piece.transposed else shape


def _check(where: str, names: NameMap, ignored: Iterable[str], reader: TensorReader, model: nn.Module) -> None:
    """Everything that can be known without reading data: no tensor missing, none too many, every shape as expected."""
    parameters = dict(model.named_parameters())
    expected = {piece.name: _file_shape(piece, parameters[ours]) for ours, pieces in names.items() for piece in pieces}
    there = set(reader.names())
    missing = sorted(expected.keys() - there)
    if missing:
        raise CheckpointError(f"{where}: {_some(missing)} missing; the config asks for {len(expected)} tensors")
    unknown = sorted(there - expected.keys() - set(ignored))
    if unknown:
        raise CheckpointError(f"{where}: {_some(unknown)} not known for this architecture")
    for name, shape in expected.items():
        if tuple(reader.shape(name)) != shape:
            raise CheckpointError(f"{where}: {name} has shape {tuple(reader.shape(name))}; the config asks for {shape}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    verb = "are" if len(names) > 1 else "is"
    return f"{', '.join(names[:3])}{more} {verb}"


@torch.no_grad()
def load_parameters(
    config: ModelConfig,
    reader: TensorReader,
    names: NameMap,
    *,
    where: str,
    dtype: torch.dtype,
    device: torch.device,
    ignored: Iterable[str] = (),
) -> DecoderModel:
    """The model of a config with its parameters read from a file, ready for evaluation.

    dtype: torch.int8 makes an `Int8Weight` of every matrix that is read whole at each token, as soon as it has been
    read, and keeps the rest in float32.
    where: how errors name the file. ignored: tensors there that the model computes by itself.
    Raises CheckpointError where a tensor is missing, unknown or of another shape, before any data is read.
    """
    model = build_model(config, device="meta")
    _check(where, names, ignored, reader, model)
    quantized = dtype == torch.int8
    dtype = torch.float32 if quantized else dtype
    model.to(dtype)
    for name, parameter in list(model.named_parameters()):
        full = torch.empty(parameter.shape, dtype=dtype, device=device)
        for piece in names[name]:
            _read_piece(reader, piece, full[piece.start : piece.stop])
        owner, _, leaf = name.rpartition(".")
        value = Int8Weight.quantize(full) if quantized and _is_product(name, full) else full
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=not quantized))
    return model.eval()


def _is_product(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix that is read whole at every token, the tied embedding among them."""
    return parameter.ndim == 2 and name != "positions.weight"


def _read_piece(reader: TensorReader, piece: Piece, rows: Tensor) -> None:
    if piece.rotary_heads:
        # The file interleaves the halves of each head (h, D/2, 2); ours keeps them apart (h, 2, D/2).
        h, D = piece.rotary_heads, rows.shape[0] // piece.rotary_heads
        whole = torch.empty_like(rows)
        reader.read(piece.name, whole)
        rows.view(h, 2, D // 2, -1).copy_(whole.view(h, D // 2, 2, -1).transpose(1, 2))
    else:
        reader.read(piece.name, rows.t() if piece.transposed else rows)
