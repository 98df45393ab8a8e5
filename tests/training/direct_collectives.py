"""For tests/training/test_parallel.py, under torchrun on GPUs: direct collectives as FSDP2 overlaps them.

Gathers run on one stream and sums on another, in turns and without waiting on the host; every result is copied by the
main stream and compared at the end. Numbers are small integers, so sums are exact. Exits with 1 where one is wrong.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from fusedlm.training.collectives import DirectAllGather, DirectReduceScatter, SharedMemory, nccl_options

ROUNDS, SIZES = 40, (40, 5000, 1 << 20)  # numbers of a rank's part; two blocks and what is in none


def numbers(rank: int, n: int, turn: int, device: torch.device) -> torch.Tensor:
    return ((torch.arange(n, device=device) * (rank + 3) + 7 * turn) % 61).float()


def main(device: torch.device) -> int:
    rank, size = dist.get_rank(), dist.get_world_size()
    override = {"shard": ("nccl", nccl_options())}
    mesh = init_device_mesh("cuda", (size,), mesh_dim_names=("shard",), backend_override=override)  # type: ignore[arg-type]
    group = mesh.get_group()
    memory = SharedMemory(group, device)
    gather, reduce_scatter = DirectAllGather(memory, 2), DirectReduceScatter(memory)
    copying, gathering, summing = (torch.cuda.Stream() for _ in range(3))
    where, found, wanted = [], [], []
    copied = summed = None  # events: the last gather's result is copied, the last sum is done
    for turn in range(ROUNDS):
        for n in SIZES:
            main_stream = torch.cuda.current_stream()
            mine, whole = numbers(rank, n, turn, device), numbers(rank, n * size, turn, device)
            copying.wait_stream(main_stream)
            if copied is not None:
                copying.wait_event(copied)
                gathering.wait_event(copied)
            with torch.cuda.stream(copying):
                output = gather.allocate((n * size,), dtype=torch.float32, device=device)
                part = output.narrow(0, n * rank, n)
                part.copy_(mine)
            gathering.wait_stream(copying)
            with torch.cuda.stream(gathering):
                gather(output, part, group)
            if summed is not None:
                main_stream.wait_event(summed)
            sent = reduce_scatter.allocate((n * size,), dtype=torch.float32, device=device)
            sent.copy_(whole)
            summing.wait_stream(main_stream)
            with torch.cuda.stream(summing):
                total = reduce_scatter.allocate((n,), dtype=torch.float32, device=device)
                reduce_scatter(total, sent, group, dist.ReduceOp.SUM)
                summed = summing.record_event()
            main_stream.wait_stream(gathering)
            gathered = output.clone()
            copied = main_stream.record_event()
            main_stream.wait_stream(summing)
            where += [f"gather {turn} of {n}", f"sum {turn} of {n}"]
            found += [gathered, total.clone()]
            parts = [numbers(other, n * size, turn, device)[n * rank : n * (rank + 1)] for other in range(size)]
            wanted += [torch.cat([numbers(other, n, turn, device) for other in range(size)]), sum(parts)]
    wrong = [name for name, a, b in zip(where, found, wanted, strict=True) if not torch.equal(a, b)]
    print(f"rank {rank}: {len(wrong)} of {len(where)} wrong: {', '.join(wrong[:8])}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(place)
    dist.init_process_group("cpu:gloo,cuda:nccl")
    with torch.cuda.stream(torch.cuda.Stream()):
        status = main(place)
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(status)
