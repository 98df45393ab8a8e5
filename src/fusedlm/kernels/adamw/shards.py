"""What of DTensors is this process's, and over which processes their squares are added up."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Sums(NamedTuple):
    """What squares are added up in. of: of each tensor, the number of its sum. groups: of each sum, the process groups
    that it is to be added up over; none where every process has all of it."""

    of: list[int]
    groups: list[tuple[Any, ...]]

    @property
    def here(self) -> bool:
        """Whether there is one sum, and this process has all of it."""
        return self.groups == [()]

    def norm(self, squares: Tensor) -> Tensor:
        """The norm over all processes, from this process's sums of squares, which are overwritten."""
        for number, over in enumerate(self.groups):
            for group in over:
                torch.distributed.all_reduce(squares[number : number + 1], group=group)
        return squares.sum().sqrt()


def _dtensor(tensors: Sequence[Any]) -> Any:
    """DTensor's type where there is one among the tensors, or None. Importing it takes long, so nothing here does."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind if kind is not None and any(issubclass(t, kind) for t in set(map(type, tensors))) else None


def local(tensors: Sequence[Any]) -> list[Any]:
    """This process's shard of each DTensor, anything else as it is."""
    kind = _dtensor(tensors)
    if kind is None:
        return list(tensors)
    return [t.to_local() if isinstance(t, kind) else t for t in tensors]


def sums_of(tensors: Sequence[Any]) -> Sums:
    """Shards add up over their mesh dimension; replicas and plain tensors are whole.

    Raises ValueError for a DTensor that is a partial sum.
    """
    kind = _dtensor(tensors)
    if kind is None:
        return Sums([0] * len(tensors), [()])
    layouts = [(t.device_mesh, t.placements) if isinstance(t, kind) else None for t in tensors]
    over = {layout: () if layout is None else _sharded_over(*layout) for layout in set(layouts)}
    numbers = {groups: number for number, groups in enumerate(dict.fromkeys(over[layout] for layout in layouts))}
    return Sums([numbers[over[layout]] for layout in layouts], list(numbers))


def _sharded_over(mesh: Any, placements: Any) -> tuple[Any, ...]:
    if any(p.is_partial() for p in placements):
        raise ValueError(f"a tensor has placements {placements}; expected it to be reduced: Shard or Replicate")
    return tuple([mesh.get_group(d) for d, p in enumerate(placements) if not p.is_replicate()])
