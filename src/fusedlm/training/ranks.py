"""The processes of a run: which this one is, on which device, and sums over all of them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    control, saving: groups on the CPU, for what the host decides, and for a thread that saves; None of one alone.
    one_host: whether all are on one.
    """

    rank: int
    size: int
    device: torch.device
    control: Any = None
    saving: Any = None
    one_host: bool = True

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and talks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Of all ranks; the tensor itself is overwritten where there are several."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """Of all ranks, of a copy."""
        return self.sum(tensor.detach().clone()) / self.size

    def any(self, flag: int) -> int:
        """The highest of all ranks' flags, without the GPU."""
        if self.size == 1:
            return flag
        highest = torch.tensor(flag)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.control)
        return int(highest)

    def gather(self, value: Any) -> list[Any]:
        """Of all ranks, in order. Anything that pickles."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values


@contextmanager
def join_ranks(device: str = "auto") -> Iterator[Ranks]:
    """The ranks that torchrun started, or this process alone. A process group that is there already is used and stays.

    device: "auto", "cuda" (of several processes each has its own) or "cpu". Raises ValueError for one that is not here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.partition(":")[0] not in ("cuda", "cpu"):
        raise ValueError(f"device is {device!r}; expected auto, cuda or cpu")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, and there is no GPU here; expected auto or cpu")
    place = torch.device(device)
    several = dist.is_torchelastic_launched()
    if place.type == "cuda":
        number = int(os.environ["LOCAL_RANK"]) if several else torch.cuda.current_device()  # torchrun's
        place = place if place.index is not None and not several else torch.device("cuda", number)
        torch.cuda.set_device(place)
    if not several:
        yield Ranks(0, 1, place)
        return
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    groups: list[Any] = []
    try:
        groups += [dist.new_group(backend="gloo") for _ in range(2)]
        size = dist.get_world_size()
        control, saving = groups
        one_host = int(os.environ["LOCAL_WORLD_SIZE"]) == size  # torchrun's
        yield Ranks(dist.get_rank(), size, place, control, saving, one_host)
        # Together: torchrun ends all processes when one has failed, and one that exits right behind a collective can
        # crash, for gloo's threads then ask a Python that is gone to let go of tensors.
        dist.barrier(group=groups[0])
    finally:
        if ours:
            dist.destroy_process_group()
        else:
            for group in groups:
                dist.destroy_process_group(group)


def local(tensor: Any) -> Tensor:
    """This rank's part of a sharded tensor; any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
