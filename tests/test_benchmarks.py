"""The benchmark harness without a GPU: what it would time, and what it makes of the figures."""

import argparse
import json
import math
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the benchmarks need Triton")

from benchmarks import ops
from benchmarks.cache import PeerCache
from benchmarks.host import host_rows
from benchmarks.ops import OURS, Limits, directions_of, run_shape, shapes_of, told
from benchmarks.peers import Peer, peers_of
from benchmarks.peers.eager import COMPILED, EAGER, MORE
from benchmarks.prepare import Job, jobs_of, prepare
from benchmarks.report import refuse_cached, write_report
from benchmarks.tables import embedding_table, figures, grouped, host_table, ops_table, summary
from benchmarks.timing import host_seconds, input_sets
from benchmarks.work import disagreement, make_inputs, own_copy, works
from fusedlm.testing import OpCase
from fusedlm.testing.cases import CASES

CPU = torch.device("cpu")
LIMITS = Limits(copy=1e12, matmul=1e15, cache=1.0)
MACHINE = {"gpu": "G", "driver": "1", "torch": "2", "triton": "3", "python": "3.12", "commit": None, "date": "today"}


def _row(variant: str, seconds: float, **more: Any) -> dict[str, Any]:
    row = {"op": "op", "shape": {"M": 4, "N": 8}, "direction": "forward", "variant": variant, "dtype": "bfloat16"}
    return {**row, "seconds": seconds, "bytes_per_second": 1e12, "share_of_copy": 0.5, **more}


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
    assert cache.get(case, "torch", Peer(torch.relu, source=_row), case.bench[0], "forward") is None
    assert (
        cache.get(replace(case, bench_dtype=torch.float16), "torch", peers["torch"], case.bench[0], "forward") is None
    )


def test_a_run_writes_all_it_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setitem(CASES, "gelu", _small("gelu"))
    monkeypatch.setattr("benchmarks.ops.environment", lambda commit: MACHINE)
    monkeypatch.setattr("benchmarks.ops.measured_limits", lambda device: LIMITS)
    monkeypatch.setattr("benchmarks.ops.prepare", lambda jobs, processes: dict.fromkeys(jobs, 1.5))
    monkeypatch.setattr(
        "benchmarks.ops.run_shape",
        lambda case, shape, limits, device, cache, compare: [_row(OURS, 1e-5), _row("torch", 2e-5)],
    )
    options = {"names": ["gelu"], "out": tmp_path, "commit": None, "quick": False, "cache": tmp_path, "processes": 0}
    ops._run(argparse.Namespace(**options))
    results = json.loads((tmp_path / "ops.json").read_text())
    assert results["matmul_flops_per_second"] == 1e15
    assert results["environment"] == MACHINE
    assert len(results["rows"]) == 2
    assert results["seconds"]["gelu"].pop("timing") >= 0
    assert results["seconds"] == {"gelu": {"contract": 4.5 - 1.5, "compile": 1.5}}
    assert "product 1000 TFLOP/s" in capsys.readouterr().out


def test_which_shapes_and_jobs_make_a_run() -> None:
    count = len(CASES["gelu"].bench)
    assert shapes_of(CASES["gelu"], quick=True) == [0, count - 1]
    assert shapes_of(CASES["gelu"], quick=False) == list(range(count))
    assert shapes_of(CASES["softmax_masked"], quick=True) == []
    quick = jobs_of("gelu", [0, 9], quick=True, compiled=[9])
    assert quick == [Job("compile", "gelu", shape=9), Job("check", "gelu", shape=0), Job("check", "gelu", shape=9)]
    whole = jobs_of("gelu", [0], quick=False, compiled=[])
    assert [(j.kind, j.dtype) for j in whole] == [
        ("contract", torch.bfloat16),
        ("contract", torch.float32),
        ("check", None),
    ]


def test_a_red_contract_stops_the_run() -> None:
    def do(job: Job) -> float:
        if job.op == "b":
            raise AssertionError("b is off")
        return 2.0

    assert prepare([Job("check", "a")], processes=0, do=do) == {Job("check", "a"): 2.0}
    with pytest.raises(AssertionError, match="b is off"):
        prepare([Job("check", "a"), Job("check", "b")], processes=0, do=do)


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
    assert prepare(jobs, processes=2, do=do) == dict.fromkeys(jobs, 1.0)
    assert sorted(tried) == ["large", "large", "small"]
    assert pools == [2, 1]
    with pytest.raises(RuntimeError, match="illegal"):
        prepare([Job("check", "broken")], processes=1, do=do)


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


def test_tables() -> None:
    rows = [_row("fusedlm", 1e-5), _row("torch", 2e-5), _row("liger", 5e-6, graph=False)]
    rows += [_row("fusedlm", 2e-3, direction="both", extra_bytes=2e9, share_of_matmul=0.75)]
    rows += [_row("torch", 4e-3, direction="both", extra_bytes=3e6, share_of_matmul=0.4)]
    assert ops_table(rows[:2]).splitlines() == [
        "| op | shape | pass | us | share | against |",
        "|---|---|---|---:|---:|---|",
        "| op | 4 x 8 | forward | 10.0 | 50% | torch 2.00x |",
    ]
    lines = ops_table(rows).splitlines()
    assert lines[2] == "| op | 4 x 8 | forward | 10.0 | 50% | torch 2.00x, liger 0.50x* |  |"
    assert lines[3] == "| op | 4 x 8 | both | 2,000 | 75% of matmul | torch 2.00x | 2.00 GB, torch 3.0 MB |"
    assert [len(peers) for _, peers in grouped(rows)] == [2, 1]
    shape = {"B": 2, "T": 3, "C": 4, "V": 9, "p": 0.1}
    rows = [_row(v, t, op="embedding", shape=shape) for v, t in (("fusedlm", 1e-5), ("torch", 3e-5), ("compile", 2e-5))]
    assert embedding_table(rows).splitlines()[2] == "| 2 x 3 x 4 | forward | 30.0 | 20.0 | 10.0 | 3.00x | 2.00x |"


def test_figures_of_a_page_show_three_sizes_and_tell_of_all() -> None:
    rows = []
    for i, size in enumerate((64, 8, 16, 32, 128)):  # the middle one by size is 32
        for direction in ("forward", "backward"):
            shape = {"M": 4, "N": size}
            rows += [_row("fusedlm", 1e-5, shape=shape, direction=direction, share_of_copy=0.5 + i / 10)]
            rows += [_row("torch", (i + 1) * 1e-5, shape=shape, direction=direction)]
            rows += [_row("liger", (7 - i) * 1e-5, shape=shape, direction=direction)] if size < 128 else []
    rows += [_row("fusedlm", 1e-6, op="alone", shape={"B": 2}, share_of_copy=0.004)]
    rows += [_row("novel", 3e-6, op="alone", shape={"B": 2})]
    assert figures(rows, ["op"], "a GPU").split("\n") == [
        "| M x N | pass | us | share of a copy | torch | Liger |",
        "|---|---|---:|---:|---:|---:|",
        "| 4 x 8 | forward | 10.0 | 60% | 2.00x | 6.00x |",
        "| 4 x 8 | backward | 10.0 | 60% | 2.00x | 6.00x |",
        "| 4 x 32 | forward | 10.0 | 80% | 4.00x | 4.00x |",
        "| 4 x 32 | backward | 10.0 | 80% | 4.00x | 4.00x |",
        "| 4 x 128 | forward | 10.0 | 90% | 5.00x |  |",
        "| 4 x 128 | backward | 10.0 | 90% | 5.00x |  |",
        "",
        "op, all 5 sizes: forward 50% to 90%, backward 50% to 90% of the limit; the fastest peer's time over ours: "
        "forward 1.00 to 5.00, backward 1.00 to 5.00.\\",
        "a GPU; bfloat16; peers' times over ours.",
    ]
    both = figures(rows, ["op", "alone"], "a GPU").split("\n")
    assert both[0] == "| op | shape | pass | us | share of a copy | torch | Liger | novel |"
    assert both[8] == "| alone | 2 | forward | 1.0 | 0.4% |  |  | 3.00x |"
    assert figures(rows, ["alone"], "a GPU").split("\n")[0] == "| B | us | share of a copy | novel |"
    three = figures([*rows, _row("fusedlm", 1e-6, op="third")], ["op", "alone", "third"], "a GPU").split("\n")
    assert [line.split(" | ")[:2] for line in three[2:6]] == [
        ["| op", "4 x 32"],
        ["| op", "4 x 32"],
        ["| alone", "2"],
        ["| third", "4 x 8"],
    ]
    assert three[7].startswith("op, all 5 sizes: ")


def test_figures_of_products_tell_memory_and_who_waits() -> None:
    rows = [_row("fusedlm", 2e-3, direction="both", extra_bytes=2e9, share_of_matmul=0.75)]
    rows += [_row("liger", 4e-3, direction="both", extra_bytes=3e6, share_of_matmul=0.4, graph=False)]
    lines = figures(rows, ["op"], "a GPU").split("\n")
    assert lines[0] == "| M x N | pass | us | share of the products' rate | memory | Liger |"
    assert lines[2] == "| 4 x 8 | forward + backward | 2,000 | 75% | 2.00 GB | 2.00x*, 3.0 MB |"
    assert lines[4].startswith("a GPU; bfloat16; peers' times over ours. Memory is the most")
    assert lines[4].endswith("\\* waits for the GPU inside, so it is timed from the host.")


def test_the_summary_tells_the_worst_too() -> None:
    rows = [_row("fusedlm", 1e-5, op=f"op{i}", direction=d) for i in range(4) for d in ("forward", "backward")]
    for i, row in enumerate(list(rows)):
        row["share_of_copy"] = 0.6 + 0.1 * i
        ratio = (0.97, 0.99, 1.2, 1.3, 1.4, 1.5, 1.6, 1.67)[i]  # 0.99 is no slower
        rows.append(_row("torch", ratio * 1e-5, op=row["op"], direction=row["direction"]))
        rows.append(_row("compile", 9e-5, op=row["op"], direction=row["direction"]))
    rows.append(_row("fusedlm", 1e-5, op="alone", share_of_copy=0.01))  # no backward pass: not among the shares
    assert summary(rows, "a GPU") == (
        "a GPU: forward passes run at 60% to 120% of the speed of a plain copy, half of them at 90% or more. Of 8 "
        "measurements, 7 are as fast as the fastest of torch and torch.compile or faster (within 2%), from 0.97x "
        "(op0 forward) to 1.67x (op3 backward)."
    )


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """A folder of docs with two pages, a README beside it, and the results they are filled from."""
    (tmp_path / "docs/deep").mkdir(parents=True)
    rows = [_row(v, t, direction=d) for d in ("forward", "backward") for v, t in (("fusedlm", 1e-5), ("torch", 2e-5))]
    results = {"environment": MACHINE, "copy_bytes_per_second": 1e12, "rows": rows}
    (tmp_path / "ops.json").write_text(json.dumps(results))
    (tmp_path / "README.md").write_text("# Us\n\n<!-- figures: summary -->\nold\n<!-- end -->\nmore\n")
    (tmp_path / "docs/deep/op.md").write_text("<!-- figures: op -->\n<!-- end -->\n\nText\n<!-- end -->\n")
    (tmp_path / "docs/other.md").write_text("Nothing, not even `<!-- figures: op -->`\n")
    return tmp_path


def test_pages_are_filled_between_their_marks(pages: Path) -> None:
    other = (pages / "docs/other.md").stat().st_mtime_ns
    for _ in range(2):  # what was filled once is filled again
        written = write_report(pages, pages / "docs", plots=False)
        names = {path.relative_to(pages).as_posix() for path in written}
        assert names == {"README.md", "docs/deep/op.md", "docs/kernels/results.md"}
        begin, sentence, empty, picture, *end = (pages / "README.md").read_text().split("\n")[2:]
        assert begin == "<!-- figures: summary -->"
        assert sentence.startswith("G, torch 2, Triton 3: forward passes run at 50% of the speed of a plain copy. Of 2")
        assert empty == ""
        assert picture.endswith("](docs/ops.png)")
        assert end == ["<!-- end -->", "more", ""]
        lines = (pages / "docs/deep/op.md").read_text().split("\n")
        assert "| 4 x 8 | backward | 10.0 | 50% | 2.00x |" in lines
        assert lines[-6] == "G, torch 2, Triton 3; bfloat16; peers' times over ours."
        assert lines[-5:] == ["<!-- end -->", "", "Text", "<!-- end -->", ""]
    assert (pages / "docs/other.md").stat().st_mtime_ns == other


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- figures: op -->\n", "have no line '<!-- end -->'"),
        ("<!-- figures: op -->\n<!-- figures: op -->\n<!-- end -->\n", "have no line '<!-- end -->'"),
        ("<!-- figures: summary -->\n<!-- figures: op -->\n", "have no line '<!-- end -->'"),
        ("<!-- figures: op, pop -->\n<!-- end -->\n", r"asks for figures of 'op, pop'; there are those of \['op'\]"),
    ],
)
def test_pages_that_cannot_be_filled_stay_as_they_are(pages: Path, text: str, message: str) -> None:
    (pages / "docs/z.md").write_text(text)
    before = (pages / "README.md").read_text()
    with pytest.raises(ValueError, match=message):
        write_report(pages, pages / "docs", plots=False)
    assert (pages / "docs/z.md").read_text() == text
    assert (pages / "README.md").read_text() == before


def test_there_is_no_summary_of_what_nobody_was_compared_with() -> None:
    with pytest.raises(ValueError, match="no forward pass beside a peer"):
        summary([_row("fusedlm", 1e-5)], "a GPU")


def test_lists_of_sizes_are_told_as_a_number() -> None:
    assert told({"sizes": ((2, 3), (5,)), "step": 0}) == {"N": 11, "step": 0}
    assert own_copy({"n": 3, "x": torch.ones(2, requires_grad=True)})["x"].requires_grad


RESULTS = Path(__file__).parents[1] / "benchmarks/results"


def test_the_committed_report_is_that_of_the_committed_results(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    shutil.copytree(root / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("*.png"))
    shutil.copy(root / "README.md", tmp_path)
    for path in write_report(RESULTS, tmp_path / "docs", plots=False):
        made = path.read_text(encoding="utf-8").split("## Plots")[0].rstrip()
        committed = (root / path.relative_to(tmp_path)).read_text(encoding="utf-8").split("## Plots")[0].rstrip()
        assert made == committed, f"{path.name}: run python -m benchmarks report"


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install '.[bench]'")
    from benchmarks.plots import LONGEST_BAR, op_figure, summary_figure

    rows = []
    for i, size in enumerate((768, 1024, 2048)):
        for option in ("tanh", "none"):
            shape = {"M": 64, "N": size, "approximate": option}
            for direction in ("forward", "backward"):
                rows += [_row("fusedlm", (i + 1) * 1e-5, shape=shape, direction=direction)]
                rows += [_row("torch", (i + 1) * 8e-5, shape=shape, direction=direction)]
    figure = op_figure("op", rows)
    titles = [axes.get_title("left") for axes in figure.axes if axes.get_title("left")]
    assert titles == [f"op, {d}, approximate={o}" for d in ("forward", "backward") for o in ("tanh", "none")]
    ours = next(line for line in figure.axes[0].get_lines() if line.get_label() == "fusedlm")
    assert list(ours.get_ydata()) == pytest.approx([10, 20, 30])
    assert figure.axes[0].get_ylabel() == "time, µs"
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["768", "1024", "2048"]
    bars = summary_figure(rows).axes[0].patches
    assert [bar.get_width() for bar in bars] == [LONGEST_BAR] * 2  # 8 times, cut
    spread = [_row(v, t, shape={"N": n}) for n in (1, 2, 3) for v, t in (("fusedlm", 1.0), ("torch", 2.0 / n))]
    axes = summary_figure(spread).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [1.0]  # the middle size
    assert axes.collections[0].get_segments()[0].tolist() == pytest.approx(np.array([[2 / 3, 0], [2, 0]]))
    single = op_figure("op", spread[:2])
    assert single.axes[0].get_title("left") == "op"  # without a backward pass there is nothing to tell apart
    assert [bar.get_height() for bar in single.axes[0].patches] == [2000, 1000]
    (tmp_path / "ops.json").write_text(
        json.dumps({"environment": MACHINE, "copy_bytes_per_second": 1e12, "rows": rows})
    )
    written = write_report(tmp_path, tmp_path / "docs")
    assert {p.name for p in written} == {"results.md", "op.png", "ops.png"}
    assert all(p.stat().st_size > 500 for p in written)
    first = (tmp_path / "docs/ops.png").read_bytes()
    write_report(tmp_path, tmp_path / "docs")
    assert (tmp_path / "docs/ops.png").read_bytes() == first
