"""The benchmark harness without a GPU: its peers, what it would time, and what a run writes."""

import argparse
import json
import math
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_rows import MACHINE, measured

pytest.importorskip("triton", reason="the benchmarks need Triton")

from benchmarks import ops
from benchmarks.cache import PeerCache
from benchmarks.host import host_rows
from benchmarks.ops import OURS, Limits, directions_of, run_shape, shapes_of, told
from benchmarks.peers import Peer, peers_of
from benchmarks.peers.eager import COMPILED, EAGER, MORE
from benchmarks.prepare import Job, Prepared, begin_process, jobs_of, prepare, run_job
from benchmarks.processes import alike_gpus
from benchmarks.report import refuse_cached
from benchmarks.tables import host_table
from benchmarks.timing import host_seconds, input_sets
from benchmarks.work import disagreement, make_inputs, own_copy, works
from fusedlm.testing import OpCase, checks
from fusedlm.testing.cases import CASES

CPU = torch.device("cpu")
LIMITS = Limits(copy=1e12, matmul=1e15, cache=1.0)


def _small(name: str, **changes: Any) -> OpCase:
    """A case that is timed in fp32 at the first shape of its contract."""
    case = CASES[name]
    return replace(case, bench_dtype=torch.float32, bench=case.shapes[:1], **changes)


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Peer]:
    """What stands in for the peers: the reference, and a copy of it that writes into its inputs."""
    found: dict[str, Peer] = {}
    monkeypatch.setattr("benchmarks.ops.peers_of", lambda case, shape: found)
    return found


def _call_all(variants: dict[str, Callable[[int], Any]], *, sets: int, waits: Any = ()) -> dict[str, float]:
    """A timer that calls every work and says 1 s, 2 s, ..."""
    for work in variants.values():
        for i in range(sets):
            work(i)
    return {name: float(i + 1) for i, name in enumerate(variants)}


@pytest.mark.parametrize("name", [n for n, peer in EAGER.items() if n in CASES and not peer.random])
def test_adapters_compute_what_the_reference_does(name: str) -> None:
    case = _small(name)
    for peer in (EAGER[name], COMPILED.get(name)):
        for shape in case.shapes:
            drops = shape.get("p") or shape.get("z_loss")  # dropout draws, and z_loss is ours
            if peer is not None and peer.takes(shape) and not drops:
                assert disagreement(case, peer.function, make_inputs(case, shape, 0, CPU)) < 1e-5


def test_peers_by_name() -> None:
    expected = {
        "layer_norm": {"torch", "compile", "liger"},
        "gelu": {"torch", "compile"},
        "dropout": {"torch", "compile"},
    }
    for name, names in expected.items():
        found = peers_of(CASES[name], CASES[name].bench[0])
        assert found.keys() - {"liger"} == names - {"liger"}
        assert ("liger" in found) == ("liger" in names and find_spec("liger_kernel") is not None)
    assert peers_of(replace(CASES["gelu"], name="adamw"), CASES["gelu"].bench[0]).keys() == {"torch"}


def test_random_peers_drop_and_draw_as_they_should() -> None:
    x = torch.ones(4000)
    assert float((EAGER["dropout"].function(x=x, p=0.3, seed=None, stream=1) == 0).float().mean()) == pytest.approx(
        0.3, abs=0.05
    )
    ids, weight, position_weight = torch.tensor([[1, 0], [2, 2]]), torch.randn(3, 8), torch.randn(5, 8)
    for positions in (3, torch.tensor([3, 4])):
        y = EAGER["embedding"].function(ids, weight, position_weight, positions)
        assert torch.equal(y, weight[ids] + position_weight[3:5])
    logits = torch.tensor([[0.0, 3.0, 2.0, -1.0]]).expand(4000, 4)
    uniform = torch.full((4000,), 0.5)
    expected = torch.tensor([0, math.e / (1 + math.e), 1 / (1 + math.e), 0])  # 3 and 2 reach 0.9, 0 is cut off
    for peer in (EAGER["sample"], *MORE["sample"].values()):
        drawn = peer.function(logits=logits, uniform=uniform, top_k=3, top_p=0.9)
        assert torch.allclose(torch.bincount(drawn, minlength=4) / 4000, expected, atol=0.04)
        assert peer.function(logits=logits, uniform=uniform, top_p=0.6).unique().tolist() == [1]
        assert peer.function(logits=logits, temperature=0.0).unique().tolist() == [1]


def test_the_adamw_peer_is_adamw() -> None:
    g = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}{i}": torch.rand(5, generator=g)
        for i in range(2)
        for name in ("param", "grad", "exp_avg", "exp_avg_sq")
    }
    expected = [torch.nn.Parameter(tensors[f"param{i}"].clone()) for i in range(2)]
    optimizer = torch.optim.AdamW(expected, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for i, p in enumerate(expected):
        p.grad = tensors[f"grad{i}"].clone()
        averages = {name: tensors[f"{name}{i}"].clone() for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.tensor(3.0), **averages}
    torch.nn.utils.clip_grad_norm_(expected, 0.5)
    optimizer.step()
    EAGER["adamw"].function(step=torch.tensor([3.0]), max_norm=0.5, **tensors)
    for i, p in enumerate(expected):
        assert torch.allclose(tensors[f"param{i}"], p, rtol=1e-6)


def test_a_peer_that_computes_something_else_is_refused(peers: dict[str, Peer]) -> None:
    case = _small("gelu")
    peers["wrong"] = Peer(lambda x, approximate: torch.relu(x))
    with pytest.raises(ValueError, match=r"gelu .*: wrong is .* away from the reference"):
        run_shape(case, case.bench[0], LIMITS, device=CPU, compare=True, timer=_call_all)


def test_rows_of_a_forward_and_a_backward_pass(peers: dict[str, Peer]) -> None:
    case = _small("gelu")
    peers["torch"] = Peer(case.reference)
    rows = run_shape(case, case.bench[0], LIMITS, device=CPU, compare=True, timer=_call_all)
    assert [(r["direction"], r["variant"], r["seconds"]) for r in rows] == [
        ("forward", OURS, 1.0),
        ("forward", "torch", 2.0),
        ("backward", OURS, 1.0),
        ("backward", "torch", 2.0),
    ]
    elements = 7 * 123
    assert rows[0]["bytes_per_second"] == 2 * elements * 4
    assert rows[2]["share_of_copy"] == pytest.approx(3 * elements * 4 / 1e12)
    assert not any("cached" in r or "extra_bytes" in r for r in rows)


def test_rows_of_both_passes_as_one(peers: dict[str, Peer]) -> None:
    """Traffic is summed, the share is the product's, memory is recorded, what waits is marked."""
    case = replace(_small("gelu"), together=True, flops=lambda s: (4 * 10**8, 6 * 10**8))
    peers["liger"] = Peer(case.reference, waits=True)
    rows = run_shape(case, case.bench[0], LIMITS, device=CPU, timer=_call_all, memory=lambda work: 5)
    assert [(r["direction"], r["variant"], r.get("graph")) for r in rows] == [
        ("both", OURS, None),
        ("both", "liger", False),
    ]
    assert rows[0]["bytes_per_second"] == 5 * 7 * 123 * 4
    assert rows[1]["share_of_matmul"] == 1e9 / 2.0 / 1e15
    assert {r["extra_bytes"] for r in rows} == {5}
    assert "share_of_copy" not in rows[0]


def test_a_peer_that_writes_into_its_inputs_has_its_own(peers: dict[str, Peer]) -> None:
    case = _small("gelu")
    seen = []

    def ours(x: torch.Tensor, approximate: str) -> torch.Tensor:
        seen.append(x.detach().clone())
        return case.reference(x, approximate)

    def writes(x: torch.Tensor, approximate: str) -> torch.Tensor:
        x.detach().fill_(7.0)
        return case.reference(x, approximate)

    peers["liger"] = Peer(writes, writes_inputs=True)
    for _ in range(2):
        run_shape(replace(case, op=ours), case.bench[0], LIMITS, device=CPU, timer=_call_all)
    assert not any((x == 7).all() for x in seen)


def test_what_is_timed_may_differ_from_the_op(peers: dict[str, Peer]) -> None:
    case = _small("gelu")
    called = []
    timed = replace(case, gradients=(), timed=lambda x, approximate: called.append(x))
    rows = run_shape(timed, case.bench[0], LIMITS, device=CPU, timer=_call_all)
    assert called
    assert [r["direction"] for r in rows] == ["forward"] == list(directions_of(timed))


def test_the_backward_pass_runs_again_without_a_new_forward_pass() -> None:
    case = _small("gelu")
    inputs = make_inputs(case, case.bench[0], 0, CPU)
    calls = []

    def op(x: torch.Tensor, approximate: str) -> torch.Tensor:
        calls.append(1)
        return case.reference(x, approximate)

    work = works(case, op, [inputs])["backward"]
    (first,), (second,) = work(0), work(0)  # type: ignore[misc]
    assert torch.equal(first, second)
    assert len(calls) == 1


def test_cached_figures_are_found_again_marked_and_refused(peers: dict[str, Peer], tmp_path: Path) -> None:
    case = _small("gelu")
    cache = PeerCache(tmp_path / "cache", MACHINE)
    peers["torch"] = Peer(case.reference)
    first = run_shape(case, case.bench[0], LIMITS, device=CPU, cache=cache, timer=_call_all)
    refuse_cached({"rows": first})
    timed: list[str] = []

    def timer(variants: Any, **_: Any) -> dict[str, float]:
        timed.extend(variants)
        return dict.fromkeys(variants, 0.25)

    again = run_shape(case, case.bench[0], LIMITS, device=CPU, cache=cache, timer=timer)
    assert timed == [OURS, OURS]
    assert [(r["seconds"], r.get("cached")) for r in again] == [(0.25, None), (2.0, True)] * 2
    with pytest.raises(ValueError, match=r"gelu come from a cache; measure without --cache"):
        refuse_cached({"rows": again})
    other = PeerCache(tmp_path / "cache", {**MACHINE, "driver": "2"})
    assert other.get(case, "torch", peers["torch"], case.bench[0], "forward") is None
    assert cache.get(case, "torch", Peer(torch.relu, source=measured), case.bench[0], "forward") is None
    assert (
        cache.get(replace(case, bench_dtype=torch.float16), "torch", peers["torch"], case.bench[0], "forward") is None
    )


def test_a_run_writes_all_it_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setitem(CASES, "gelu", _small("gelu"))
    monkeypatch.setattr("benchmarks.ops.environment", lambda commit: MACHINE)
    monkeypatch.setattr("benchmarks.ops.measured_limits", lambda device: LIMITS)
    monkeypatch.setattr("benchmarks.ops.prepare", lambda jobs, **_: Prepared(dict.fromkeys(jobs, 1.5), {}))
    monkeypatch.setattr(
        "benchmarks.ops.run_shape",
        lambda case, shape, limits, device, cache, compare: [measured(OURS, 1e-5), measured("torch", 2e-5)],
    )
    options = {"names": ["gelu"], "out": tmp_path, "commit": None, "quick": False, "cache": tmp_path, "processes": 0}
    ops._run(argparse.Namespace(**options))
    results = json.loads((tmp_path / "ops.json").read_text())
    assert results["matmul_flops_per_second"] == 1e15
    assert results["environment"] == MACHINE
    assert len(results["rows"]) == 2
    assert results["seconds"]["gelu"].pop("timing") >= 0
    assert results["seconds"] == {"gelu": {"contract": 4 * 1.5, "compile": 1.5}}
    assert "product 1000 TFLOP/s" in capsys.readouterr().out


def test_which_shapes_and_jobs_make_a_run() -> None:
    count = len(CASES["gelu"].bench)
    assert shapes_of(CASES["gelu"], quick=True) == [0, count - 1]
    assert shapes_of(CASES["gelu"], quick=False) == list(range(count))
    assert shapes_of(CASES["softmax_masked"], quick=True) == []
    quick = jobs_of("gelu", [0, 9], quick=True, compiled=[9])
    assert quick == [Job("compile", "gelu", shape=9), Job("check", "gelu", shape=0), Job("check", "gelu", shape=9)]
    whole = jobs_of("gelu", [0], quick=False, compiled=[])
    small = range(len(CASES["gelu"].shapes))
    assert whole == [
        *(Job("contract", "gelu", torch.bfloat16, i) for i in small),
        *(Job("contract", "gelu", torch.float32, i) for i in small),
        Job("check", "gelu"),
    ]


def test_a_contracts_jobs_are_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    monkeypatch.setattr("benchmarks.prepare.check", lambda case, shape, **options: done.append((shape, options)))
    case = CASES["gelu"]
    for job in jobs_of("gelu", [], quick=False, compiled=[]):
        run_job(job, "cpu")
    for options in done:
        assert options[1].pop("device") == torch.device("cpu")
    every = list(checks(case, dtypes=(torch.bfloat16, torch.float32)))
    assert len(done) == len(every)
    assert all(one in done for one in every)


def test_an_op_with_a_red_contract_is_refused() -> None:
    def do(job: Job) -> float:
        if job.op == "b":
            raise AssertionError("b is off\nby much")
        return 2.0

    jobs = [Job("check", "b"), Job("check", "a")]
    assert prepare(jobs, processes=0, do=do) == Prepared({Job("check", "a"): 2.0}, {"b": "b is off"})


def test_a_peer_without_a_backward_pass_is_timed_forward_alone(peers: dict[str, Peer]) -> None:
    case = _small("linear_gelu")
    peers["torch"] = Peer(case.reference)
    peers["cublaslt"] = replace(MORE["linear_gelu"]["cublaslt"], random=False)
    # On a CPU torch takes the exact form.
    assert disagreement(case, peers["cublaslt"].function, make_inputs(case, case.bench[0], 0, CPU)) < 1e-3
    rows = run_shape(case, case.bench[0], LIMITS, device=CPU, timer=_call_all)
    assert [(r["direction"], r["variant"]) for r in rows] == [
        ("forward", OURS), ("forward", "torch"), ("forward", "cublaslt"), ("backward", OURS), ("backward", "torch")
    ]  # fmt: skip


def test_a_peer_without_a_backward_pass_is_compiled_forward_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    directions = []

    def function(x: torch.Tensor, **_: Any) -> torch.Tensor:
        directions.append("backward" if torch.is_grad_enabled() else "forward")
        return x

    monkeypatch.setitem(CASES, "linear_gelu", _small("linear_gelu"))
    monkeypatch.setattr("benchmarks.prepare.peers_of", lambda case, shape: {"peer": Peer(function, trains=False)})
    run_job(Job("compile", "linear_gelu"), "cpu")
    assert directions == ["forward"]


def test_what_is_refused_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.ops.environment", lambda commit: MACHINE)
    monkeypatch.setattr("benchmarks.ops.measured_limits", lambda device: LIMITS)
    monkeypatch.setattr("benchmarks.ops.prepare", lambda jobs, **_: Prepared({}, {"gelu": "is off"}))
    monkeypatch.setattr("benchmarks.ops.run_shape", lambda case, *_, **__: [measured(OURS, 1e-5, op=case.name)])
    options = {"names": ["gelu", "swiglu"], "out": tmp_path, "commit": None, "quick": True, "cache": None}
    with pytest.raises(SystemExit, match="not timed: gelu: is off"):
        ops._run(argparse.Namespace(**options, processes=0))
    results = json.loads((tmp_path / "ops.json").read_text())
    assert {row["op"] for row in results["rows"]} == {"swiglu"}
    assert results["refused"] == {"gelu": "is off"}


def test_jobs_that_find_no_memory_are_done_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = []

    class Pool(ThreadPoolExecutor):  # threads for processes, which would take seconds to start
        def __init__(self, processes: int, *_: Any, **__: Any) -> None:
            pools.append(processes)
            super().__init__(processes)

    tried: list[str] = []

    def do(job: Job) -> float:
        tried.append(job.op)
        if job.op == "large" and len(pools) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        if job.op == "broken":
            raise RuntimeError("an illegal memory access")
        return 1.0

    monkeypatch.setattr("benchmarks.prepare.ProcessPoolExecutor", Pool)
    jobs = [Job("check", op) for op in ("small", "large")]
    assert prepare(jobs, processes=2, do=do) == Prepared(dict.fromkeys(jobs, 1.0), {})
    assert sorted(tried) == ["large", "large", "small"]
    assert pools == [2, 1]
    broken = prepare([Job("check", "broken")], processes=1, do=do)
    assert broken.refused == {"broken": "an illegal memory access"}


def _crash(job: Job) -> float:
    """A kernel that takes its process along; what it does not name is well."""
    if job.op == "crashes":
        os._exit(1)
    return 1.0


def test_an_op_that_takes_its_process_along_costs_no_other_its_figures() -> None:
    well = Job("check", "well")  # in the same process, behind it
    done = prepare([Job("check", "crashes"), well], processes=1, do=_crash)
    assert done.seconds == {well: 1.0}
    assert done.refused.keys() == {"crashes"}


def _where(job: Job) -> float:
    return float(os.environ["CUDA_VISIBLE_DEVICES"])


def test_processes_are_spread_over_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("check", "op")
    assert prepare([job], processes=1, gpus=["7"], do=_where).seconds == {job: 7.0}
    count = multiprocessing.get_context("spawn").Value("i", 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    taken = []
    for _ in range(3):
        begin_process(count, ["2", "5"])
        taken.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert taken == ["2", "5", "2"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.get_device_name", ["H100", "L4", "H100"].__getitem__)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,3")
    assert alike_gpus() == ["4", "3"]


def test_sets_of_inputs_go_past_the_cache() -> None:
    assert input_sets(100e6, 50e6) == 3
    assert input_sets(1e6, 50e6) == 102
    assert input_sets(1, 50e6) == 128


def test_host_time_of_every_op() -> None:
    case = _small("gelu")
    rows = host_rows(case, CPU, timer=lambda calls: host_seconds(calls, calls=2, rounds=2, wait=lambda: None))
    assert {(r["variant"], r["grad"]) for r in rows} == {
        (variant, grad) for variant in ("addition", "fusedlm", "torch") for grad in (False, True)
    }
    assert all(0 < r["seconds"] < 1 for r in rows)
    assert host_table(rows).splitlines()[2].startswith("| gelu | ")


def test_lists_of_sizes_are_told_as_a_number() -> None:
    assert told({"sizes": ((2, 3), (5,)), "step": 0}) == {"N": 11, "step": 0}
    assert own_copy({"n": 3, "x": torch.ones(2, requires_grad=True)})["x"].requires_grad
