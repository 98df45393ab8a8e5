"""AdamW over two processes, in a CUDA graph, and ahead of the GPU."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from adamw_steps import DEVICE, GPU, error, parameters, tensors, train
from torch import Tensor

from fusedlm.kernels import backend
from fusedlm.kernels.adamw import AdamW, global_norm

pytest.importorskip("triton", reason="the kernels need Triton")


@pytest.mark.skipif(GPU, reason="two processes that share one GPU would need its own set-up")
def test_two_processes_with_shards_are_one(tmp_path: Path) -> None:
    """Rows split unevenly over two processes, one tensor replicated, one plain: the same step as without."""
    torch.multiprocessing.spawn(_shard_worker, args=(str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    for kernels in ("triton", "torch"):
        with backend("torch"):
            optimizer = AdamW(parameters(), lr=0.01, eps=0.1, max_norm=0.5)
            truth = train(optimizer, 2)
        for rank in range(2):
            found, norm = torch.load(tmp_path / f"{kernels}{rank}.pt")
            assert error(found, truth) < 1e-7
            assert norm == pytest.approx(float(optimizer.total_norm), rel=1e-6)


def _shard_worker(rank: int, store: str, out: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    placements: tuple[Any, ...] = ([Shard(0)], [Replicate()], None)

    def spread(listed: list[Tensor]) -> list[Tensor]:
        pairs = zip(listed, placements, strict=True)
        return [t if how is None else distribute_tensor(t.detach(), mesh, how) for t, how in pairs]

    for kernels in ("triton", "torch"):
        whole = tensors(7)[1:]
        with backend(kernels):  # type: ignore[arg-type]
            norm = global_norm([distribute_tensor(whole[0], mesh, [Replicate()]), whole[1]])
        assert float(norm) == pytest.approx(float(torch.cat(whole).double().norm()), rel=1e-6)  # nobody shards anything
        params = [torch.nn.Parameter(p) for p in spread(parameters())]
        with backend(kernels):  # type: ignore[arg-type]
            optimizer = AdamW(params, lr=0.01, eps=0.1, max_norm=0.5)
            for i in range(2):
                for p, g in zip(params, spread([g.float() for g in tensors(100 + i, torch.float16)]), strict=True):
                    p.grad = g
                optimizer.step()
        assert isinstance(optimizer.state[params[0]]["exp_avg"], DTensor)
        whole = [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in params]
        torch.save(([w.double() for w in whole], float(optimizer.total_norm)), f"{out}/{kernels}{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_cuda_graph_advances_at_each_replay() -> None:
    """Captured with gradients of its own; eager steps in between, with gradients elsewhere, do not disturb it."""
    truth = train(torch.optim.AdamW(parameters(torch.float64), lr=0.01), 8)
    params = parameters()
    rate = torch.tensor(0.01, device=DEVICE)
    optimizer = AdamW(params, lr=rate, max_norm=1e6, skip_nonfinite=True)
    train(optimizer, 2)
    inputs = [torch.zeros_like(p) for p in params]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for p, x in zip(params, inputs, strict=True):
            p.grad = x * 1.0  # lies in the graph's own memory
        optimizer.step()
    for i in range(2, 8):
        if i == 5:
            train(optimizer, 1, start=i)
            continue
        for x, g in zip(inputs, tensors(100 + i, torch.float16), strict=True):
            x.copy_(g)
        graph.replay()
    assert [float(optimizer.state[p]["step"]) for p in params] == [8, 8, 8]
    assert error([p.detach().double() for p in params], truth) < 1e-6
    assert int(optimizer.skipped) == 0
    inputs[0].fill_(math.nan)
    graph.replay()
    assert int(optimizer.skipped) == 1
    assert error([p.detach().double() for p in params], truth) < 1e-6
    with pytest.raises(ValueError, match="no workspace is given"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        global_norm(inputs)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_step_does_not_wait_for_the_gpu() -> None:
    optimizer = AdamW(parameters(), max_norm=1.0, skip_nonfinite=True)
    train(optimizer, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
            optimizer.step()
            optimizer.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")
