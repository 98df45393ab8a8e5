"""What is summed on one host, without processes: the exchange gives prepared numbers."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from fusedlm.training.collectives import DirectAllGather, DirectReduceScatter


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
        if dtype == torch.bfloat16:
            unit = torch.exp2(torch.floor(torch.log2(want.abs())) - 7)
            assert ((output.double() - want).abs() <= 0.505 * unit).all()
        else:
            bound = torch.finfo(dtype).eps * parts.double().abs().sum(0)
            assert ((output.double() - want).abs() <= bound).all()


class Memory:
    """Counts what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def buffer(self, count: int) -> torch.Tensor:
        self.asked.append(count)
        return torch.empty(count, dtype=torch.uint8)


def test_buffers_are_used_in_turn_and_of_every_size_their_own() -> None:
    """So every rank takes the same one, whatever was freed when."""
    memory: Any = Memory()
    gather = DirectAllGather(memory, 2)
    shape = {"dtype": torch.float32, "device": torch.device("cpu")}
    places = []
    for size in (8, 8, 8, 6, 8, 6, 6, 8):
        tensor = gather.allocate((size,), **shape)
        assert tensor.shape == (size,)
        assert tensor.dtype == torch.float32
        places.append(tensor.data_ptr())
    assert memory.asked == [32, 32, 24, 24]
    eights, sixes = [places[i] for i in (0, 1, 2, 4, 7)], [places[i] for i in (3, 5, 6)]
    assert eights == [eights[0], eights[1], eights[0], eights[1], eights[0]]
    assert sixes == [sixes[0], sixes[1], sixes[0]]
    assert len({*eights, *sixes}) == 4


def test_a_sum_keeps_its_input_and_gives_its_output_away(monkeypatch: pytest.MonkeyPatch) -> None:
    memory: Any = Memory()
    monkeypatch.setattr(dist, "all_to_all_single", lambda received, given, group: received.copy_(given))
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    reduce_scatter = DirectReduceScatter(memory)
    shape = {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    inputs, outputs = [], []
    for turn in range(3):
        sent = reduce_scatter.allocate((8,), **shape)
        outputs.append(reduce_scatter.allocate((4,), **shape))
        sent.copy_(torch.arange(8) + turn)
        reduce_scatter(outputs[-1], sent, "a group", dist.ReduceOp.SUM)
        inputs.append(sent.data_ptr())
    assert memory.asked == [16, 16]  # what is sent, and what is received
    assert len(set(inputs)) == 1
    assert [output.tolist() for output in outputs] == [[4 + 2 * (i + turn) for i in range(4)] for turn in range(3)]
