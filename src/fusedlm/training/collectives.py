"""How the GPUs of one host divide what FSDP2 gathers and sums: straight between their memories, without kernels.

NCCL's kernels hold a few multiprocessors for as long as they run, and a matrix product with a program for each of them
then takes twice its time. The copy engines move the same bytes and take none: NCCL uses them for gathering and for
exchanging (2.28 and later: `NCCL_CTA_POLICY_ZERO`, symmetric memory), and a sum is an exchange and a short kernel.
"""

import warnings
from collections import defaultdict, deque
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusedlm.kernels import sum_parts
from fusedlm.training.ranks import Ranks


def nccl_options() -> Any:
    """Of a process group whose collectives take no multiprocessors where they can."""
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    options.config.cta_policy = nccl.NCCL_CTA_POLICY_ZERO
    return options


class SharedMemory:
    """Memory of a group's GPUs that they reach from each other.

    Every rank must ask for the same buffers in the same order, for the first of one belongs to the first of another. So
    they are kept and used again by number, and not given back: which of two free blocks an allocator takes depends on
    their addresses, which ranks do not share.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        from torch.distributed import _symmetric_memory as symmetric_memory

        symmetric_memory.set_backend("NCCL")
        self.group, self.device, self.memory = group, device, symmetric_memory
        dist.all_reduce(torch.zeros(1, device=device), group=group)  # makes the communicator, which a rendezvous needs

    def buffer(self, count: int) -> Tensor:
        """Of so many bytes."""
        with torch.cuda.use_mem_pool(self.memory.get_mem_pool(self.device)):
            buffer = torch.empty(count, dtype=torch.uint8, device=self.device)
        self.memory.rendezvous(buffer, group=self.group.group_name)
        return buffer


def shared_memory(group: Any, ranks: Ranks) -> SharedMemory | None:
    """None, with a warning, where NCCL or torch cannot set it up. Every rank of the group must call it."""
    failed = ""
    try:
        memory = SharedMemory(group, ranks.device)
        memory.buffer(16)
    except (RuntimeError, AttributeError, ImportError) as error:  # the last two: of torch's API, which may still change
        failed = str(error).partition("\n")[0] or repr(error)
    if not ranks.any(bool(failed)):
        return memory
    if ranks.first:
        warnings.warn(
            f"GPUs do not write to each other's memory ({failed or 'other ranks failed'}); NCCL's own collectives take "
            "over. parallel.direct=false asks for them",
            stacklevel=2,
        )
    return None


class _InTurn:
    """Buffers of a collective: of every size a number of them, in turn. memory: None for new ones every time."""

    def __init__(self, memory: SharedMemory | None, number: int) -> None:
        self.memory, self.number = memory, number
        self._buffers: defaultdict[int, deque[Tensor]] = defaultdict(deque)

    def __call__(self, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.memory is None:
            return torch.empty(size, dtype=dtype, device=device)
        count = prod(size) * dtype.itemsize
        buffers = self._buffers[count]
        if len(buffers) < self.number:
            buffers.append(self.memory.buffer(count))
        else:
            buffers.rotate(-1)
        return buffers[-1].view(dtype).view(*size)


class DirectAllGather:
    """For `FSDPModule.set_custom_all_gather`: every rank writes its part into the others' memory.

    number: of buffers, by how many modules one is gathered ahead of the last that still is copied from its buffer.
    """

    def __init__(self, memory: SharedMemory, number: int) -> None:
        self._buffer = _InTurn(memory, number)

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._buffer(size, dtype, device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)


class DirectReduceScatter:
    """For `FSDPModule.set_custom_reduce_scatter`: every rank gets the parts that are its own, and sums them in fp32.

    Numbers travel as they are, so 16-bit gradients take half the bytes that a sum in fp32 under way would, and are
    rounded once. Sums are over ranks in their order. One for all modules: FSDP sums for one at a time.
    """

    def __init__(self, memory: SharedMemory | None = None) -> None:
        self._sent, self._received = _InTurn(memory, 1), _InTurn(memory, 1)
        self._input_is_there = False

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """FSDP asks for the input, then for the output. That one becomes the gradient, and is nobody else's concern."""
        if self._input_is_there:
            return torch.empty(size, dtype=dtype, device=device)
        self._input_is_there = True
        return self._sent(size, dtype, device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any) -> None:
        assert op in (dist.ReduceOp.AVG, dist.ReduceOp.SUM), op
        self._input_is_there = False
        received = self._received(input_tensor.shape, input_tensor.dtype, input_tensor.device)
        dist.all_to_all_single(received, input_tensor, group=group)
        size = dist.get_world_size(group)
        scale = 1 / size if op == dist.ReduceOp.AVG else 1.0
        sum_parts(received.view(size, -1), scale, out=output_tensor)
