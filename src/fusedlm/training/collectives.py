"""How the GPUs of one host divide what FSDP2 gathers and sums: straight between their memories, without kernels.

NCCL's kernels hold a few multiprocessors for as long as they run, and a matrix product with a program for each of them
then takes twice its time. The copy engines move the same bytes and take none: NCCL uses them for gathering and for
exchanging (2.28 and later: `NCCL_CTA_POLICY_ZERO`, symmetric memory), and a sum is an exchange and a short kernel.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def nccl_options() -> Any:
    """Of a process group whose collectives leave the multiprocessors alone where they can; None for NCCL's defaults."""
    if not hasattr(dist.ProcessGroupNCCL, "NCCL_CTA_POLICY_ZERO"):
        return None
    options: Any = dist.ProcessGroupNCCL.Options()
    options.config.cta_policy = dist.ProcessGroupNCCL.NCCL_CTA_POLICY_ZERO
    return options


class _Shared:
    """Buffers of collectives. among: the group whose GPUs reach each other's memory; None for buffers as any other."""

    def __init__(self, among: Any = None) -> None:
        self.among = among
        if among is not None:
            from torch.distributed import _symmetric_memory as symmetric_memory

            symmetric_memory.set_backend("NCCL")
            self.memory = symmetric_memory
            dist.barrier(among)  # NCCL's communicator is made by its first collective, and a rendezvous needs it

    def buffer(self, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.among is None:
            return torch.empty(size, dtype=dtype, device=device)
        with torch.cuda.use_mem_pool(self.memory.get_mem_pool(device)):
            return torch.empty(size, dtype=dtype, device=device)

    def meet(self, *buffers: Tensor) -> None:
        """Make them known to the group; every rank must call it with its own of the same size."""
        if self.among is not None:
            for buffer in buffers:
                self.memory.rendezvous(buffer, group=self.among.group_name)


class DirectAllGather(_Shared):
    """For `FSDPModule.set_custom_all_gather`: every rank writes its part into the others' memory."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.buffer(size, dtype, device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        self.meet(output_tensor)  # the input is a part of it
        return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)


class DirectReduceScatter(_Shared):
    """For `FSDPModule.set_custom_reduce_scatter`: every rank gets the parts that are its own, and sums them in fp32.

    Numbers travel as they are, so 16-bit gradients take half the bytes that a sum in fp32 under way would, and are
    rounded once. Sums are over ranks in their order.
    """

    def __init__(self, among: Any = None) -> None:
        super().__init__(among)
        self._input_is_there = False

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """FSDP asks for the input, then for the output. That one becomes the gradient, and is nobody else's concern."""
        if self._input_is_there:
            return torch.empty(size, dtype=dtype, device=device)
        self._input_is_there = True
        return self.buffer(size, dtype, device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        assert op in (dist.ReduceOp.AVG, dist.ReduceOp.SUM), op
        assert not async_op
        self._input_is_there = False
        received = self.buffer(input_tensor.shape, input_tensor.dtype, input_tensor.device)
        self.meet(input_tensor, received)
        dist.all_to_all_single(received, input_tensor, group=group)
        parts = received.view(dist.get_world_size(group), -1)
        reduce = torch.mean if op == dist.ReduceOp.AVG else torch.sum
        reduce(parts, dim=0, out=output_tensor)
