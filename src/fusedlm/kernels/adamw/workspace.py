"""The tables on the device through which one launch reaches many tensors, kept from call to call."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Workspace:
    """The tables that `adamw` and `global_norm` keep on the device from call to call. Give each set of tensors its own.

    A CUDA graph reads the tables it was captured with: the workspace (an `AdamW` has one) must live as long as it.
    """

    def __init__(self) -> None:
        self._last: dict[str, tuple[Any, Any]] = {}  # by name, what was made last and for which key
        self._kept: list[Any] = []  # what captured graphs read
        self._spare: Tensor | None = None  # pinned memory for a capture, in which allocating it may be forbidden

    def recall(self, name: str, key: Any, make: Callable[[], Any], device: torch.device) -> Any:
        """What was made under this name at the last call, if for the same key; else what make makes now."""
        capturing = _capturing(device)
        found = self._last.get(name)
        if found is None or found[0] != key:
            found = (key, make())
            if not capturing:  # what a capture uploads is not there before the graph runs
                self._last[name] = found
        if capturing:
            self._kept.append(found)
        return found[1]

    def upload(self, host: Tensor, device: torch.device) -> Tensor:
        """host on the device, in memory of its own, without waiting.

        torch does not hand out pinned memory again before the copies from it are done, so every upload takes its own. A
        captured copy reads it at each replay, so there it is kept.
        """
        if device.type != "cuda":
            return host.to(device)
        if not _capturing(device):
            if self._spare is None:
                self._spare = torch.empty(2**19, dtype=torch.uint8, device="cpu", pin_memory=True)
            return host.pin_memory().to(device, non_blocking=True)
        size = -(-host.nbytes // 16) * 16
        if self._spare is not None and len(self._spare) >= size:
            staged = self._spare[: host.nbytes].view(host.dtype).view(host.shape).copy_(host)
            self._spare = self._spare[size:]
        else:
            staged = host.pin_memory()
        self._kept.append(staged)
        return staged.to(device, non_blocking=True)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def own_workspace(device: torch.device) -> Workspace:
    """One for a single call, where none was given. Raises ValueError while a CUDA graph is captured."""
    if _capturing(device):
        raise ValueError("no workspace is given while a CUDA graph is captured; expected one that outlives the graph")
    return Workspace()


class Launch(NamedTuple):
    """A launch of a kernel over some chunks."""

    chunks: Tensor
    constants: dict[str, Any]


class Kinds(NamedTuple):
    """What plans depend on of tensors that are read, an entry each. offsets: their addresses modulo 16."""

    sizes: list[int]
    dtypes: list[torch.dtype]
    offsets: list[int]


def pointers(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def kinds(tensors: Sequence[Tensor], addresses: list[int]) -> Kinds:
    return Kinds(list(map(Tensor.numel, tensors)), [t.dtype for t in tensors], [a & 15 for a in addresses])


def chunk_table(members: list[int], sizes: list[int], block: int, first: int = 0) -> Tensor:
    """(C, 4): of each chunk of the tensors in members, the number of the tensor, its own number in it, its elements,
    and its number among all chunks, which begins at first."""
    counts = torch.tensor([-(-sizes[i] // block) for i in members], device="cpu")
    tensor = torch.tensor(members, device="cpu").repeat_interleave(counts)
    place = torch.arange(len(tensor), device="cpu")
    number = place - (counts.cumsum(0) - counts).repeat_interleave(counts)
    left = torch.tensor(sizes, device="cpu")[tensor] - number * block
    return torch.stack((tensor, number, left.clamp(max=block), first + place), 1).to(torch.int32)


def dense(t: Tensor) -> bool:
    """Whether t fills its piece of memory, in some order of dimensions."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True
