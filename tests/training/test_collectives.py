"""What is summed on one host, without processes: the exchange gives prepared numbers."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from fusedlm.training.collectives import DirectReduceScatter


@pytest.mark.parametrize("op", [dist.ReduceOp.AVG, dist.ReduceOp.SUM])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_are_rounded_once(monkeypatch: pytest.MonkeyPatch, op: Any, dtype: torch.dtype) -> None:
    """Of three ranks' parts, small ones beside a large one: in 16 bits these are lost where sums are rounded midway."""
    ranks, n = 3, 1000
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(ranks, n, generator=generator).to(dtype)
    parts[0] *= 128
    sent = torch.randn(ranks * n, generator=generator).to(dtype)

    def exchange(received: torch.Tensor, given: torch.Tensor, group: Any) -> None:
        assert given is sent
        received.copy_(parts.flatten())

    monkeypatch.setattr(dist, "all_to_all_single", exchange)
    monkeypatch.setattr(dist, "get_world_size", lambda group: ranks)
    reduce_scatter = DirectReduceScatter()
    for _ in range(2):
        shape = {"dtype": dtype, "device": torch.device("cpu")}
        assert reduce_scatter.allocate((ranks * n,), **shape).shape == (ranks * n,)
        output = reduce_scatter.allocate((n,), **shape)
        reduce_scatter(output, sent, "a group", op)
        want = parts.double().sum(0) / (ranks if op == dist.ReduceOp.AVG else 1)
        if dtype == torch.bfloat16 and op == dist.ReduceOp.SUM:
            unit = torch.exp2(torch.floor(torch.log2(want.abs())) - 7)
            assert ((output.double() - want).abs() <= 0.505 * unit).all()
        else:  # a mean may divide what is rounded
            bound = torch.finfo(dtype).eps * parts.double().abs().sum(0)
            assert ((output.double() - want).abs() <= bound).all()
