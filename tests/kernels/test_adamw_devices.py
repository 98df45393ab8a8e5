"""AdamW over two processes, in a CUDA graph, and ahead of the GPU."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from adamw_steps import DEVICE, GPU, error, parameters, tensors, train, with_masters_whole
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


@pytest.mark.skipif(GPU, reason="two processes that share one GPU would need its own set-up")
def test_masters_are_sharded_as_their_parameters(tmp_path: Path) -> None:
    """To the last bit; what earlier versions saved is loaded half way."""
    torch.multiprocessing.spawn(_master_worker, args=(str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    for kernels in ("triton", "torch"):
        with backend(kernels):  # type: ignore[arg-type]
            params = parameters(torch.bfloat16)
            optimizer = AdamW(params, lr=1e-4)
            train(optimizer, 2)
        for rank in range(2):
            for p, (found, low) in zip(params, torch.load(tmp_path / f"{kernels}{rank}.pt"), strict=True):
                assert torch.equal(found, p)
                assert torch.equal(low, optimizer.state[p]["master_low"])


def _mesh(rank: int, store: str) -> Any:
    """Of two processes, of which this is one."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    return init_device_mesh("cpu", (2,))


def _leave() -> None:
    """Without the end of a process, in which a thread of gloo's that still runs aborts it now and then."""
    torch.distributed.barrier()  # nobody waits for one that has gone
    os._exit(0)


def _spread(listed: list[Tensor], mesh: Any) -> list[Tensor]:
    """The first in shards, the second replicated, the third plain. Every process has them all, so nothing is sent."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    pairs = zip(listed, ([Shard(0)], [Replicate()], None), strict=True)
    return [t if how is None else distribute_tensor(t.detach(), mesh, how, src_data_rank=None) for t, how in pairs]


def _whole(t: Any) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def _master_worker(rank: int, store: str, out: str) -> None:
    from torch.distributed.tensor import DTensor

    mesh = _mesh(rank, store)
    for kernels in ("triton", "torch"):
        params = [torch.nn.Parameter(p) for p in _spread(parameters(torch.bfloat16), mesh)]
        with backend(kernels):  # type: ignore[arg-type]
            optimizer = AdamW(params, lr=1e-4)
            for i in range(2):
                grads = [g.bfloat16() for g in tensors(100 + i, torch.float16)]
                for p, g in zip(params, _spread(grads, mesh), strict=True):
                    p.grad = g
                optimizer.step()
                if i == 0:
                    optimizer.load_state_dict(with_masters_whole(optimizer))
        lows = [optimizer.state[p]["master_low"] for p in params]
        assert isinstance(lows[0], DTensor)
        pairs = zip(params, lows, strict=True)  # gloo and NCCL move no int16
        torch.save([(_whole(p.detach()), _whole(low.int()).short()) for p, low in pairs], f"{out}/{kernels}{rank}.pt")
    _leave()


def _shard_worker(rank: int, store: str, out: str) -> None:
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    mesh = _mesh(rank, store)
    for kernels in ("triton", "torch"):
        whole = tensors(7)[1:]
        with backend(kernels):  # type: ignore[arg-type]
            norm = global_norm([distribute_tensor(whole[0], mesh, [Replicate()]), whole[1]])
        assert float(norm) == pytest.approx(float(torch.cat(whole).double().norm()), rel=1e-6)  # nobody shards anything
        params = [torch.nn.Parameter(p) for p in _spread(parameters(), mesh)]
        with backend(kernels):  # type: ignore[arg-type]
            optimizer = AdamW(params, lr=0.01, eps=0.1, max_norm=0.5)
            for i in range(2):
                grads = [g.float() for g in tensors(100 + i, torch.float16)]
                for p, g in zip(params, _spread(grads, mesh), strict=True):
                    p.grad = g
                optimizer.step()
        assert isinstance(optimizer.state[params[0]]["exp_avg"], DTensor)
        whole = [_whole(p.detach()) for p in params]
        torch.save(([w.double() for w in whole], float(optimizer.total_norm)), f"{out}/{kernels}{rank}.pt")
    _leave()


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
