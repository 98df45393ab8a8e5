"""`python -m benchmarks ops`: the contract first, then every op beside its peers at the shapes of its case."""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cache import PeerCache
from benchmarks.environment import environment, head
from benchmarks.peers import Peer, peers_of
from benchmarks.prepare import jobs_of, prepare
from benchmarks.processes import alike_gpus
from benchmarks.tables import ops_table
from benchmarks.timing import Work, copy_bandwidth, input_sets, matmul_rate, peak_memory, time_variants
from benchmarks.work import disagreement, make_inputs, own_copy, works
from fusedlm.testing import OpCase, Shape
from fusedlm.testing.cases import CASES

OURS = "fusedlm"
FARTHEST = 0.03  # RMS of a peer's difference from the reference, relative: bf16 rounds at 0.004


@dataclass(frozen=True)
class Limits:
    """What the machine gives, measured in the same run: bytes a second of a copy, FLOP/s of a product, L2 in bytes."""

    copy: float
    matmul: float
    cache: float


def measured_limits(device: torch.device) -> Limits:
    """Those of a GPU."""
    return Limits(copy_bandwidth(), matmul_rate(), torch.cuda.get_device_properties(device).L2_cache_size)


def _figures(case: OpCase, shape: Shape, direction: str, seconds: float, limits: Limits) -> dict[str, float]:
    """A time as a rate, and as a share of what limits it: the copy's bandwidth, or the product's rate."""
    assert case.traffic is not None
    parts = dict(zip(("forward", "backward"), case.traffic(shape), strict=True))
    elements = sum(parts.values()) if direction == "both" else parts[direction]
    rate = elements * case.bench_dtype.itemsize / seconds
    if case.flops is None:
        return {"bytes_per_second": rate, "share_of_copy": rate / limits.copy}
    forward, backward = case.flops(shape)
    flops = {"forward": forward, "backward": backward, "both": forward + backward}[direction] / seconds
    return {"bytes_per_second": rate, "flops_per_second": flops, "share_of_matmul": flops / limits.matmul}


def _remembered(
    case: OpCase, shape: Shape, peers: Mapping[str, Peer], directions: Sequence[str], cache: PeerCache | None
) -> dict[str, dict[str, Any]]:
    """By peer: what is kept of it for every direction, by direction; nothing of a peer that is not kept whole."""
    kept = {}
    for name, peer in peers.items() if cache else ():
        assert cache is not None
        found = {d: cache.get(case, name, peer, shape, d) for d in directions if peer.does(d)}
        if all(found.values()):
            kept[name] = found
    return kept


def told(shape: Shape) -> dict[str, Any]:
    """A shape as results tell it: in place of a list of tensors' sizes, N, how many numbers there are in all."""
    told = {}
    for name, value in shape.items():
        if isinstance(value, tuple):
            name, value = "N", sum(math.prod(size) for size in value)
        told[name] = value
    return told


def directions_of(case: OpCase) -> tuple[str, ...]:
    """What is timed: "forward" and "backward", or "both" as one."""
    if not case.gradients:
        return ("forward",)
    return ("both",) if case.together else ("forward", "backward")


def run_shape(
    case: OpCase,
    shape: Shape,
    limits: Limits,
    *,
    device: torch.device,
    cache: PeerCache | None = None,
    compare: bool = False,
    timer: Callable[..., dict[str, float]] = time_variants,
    memory: Callable[[Work], int] = peak_memory,
) -> list[dict[str, Any]]:
    """Rows of results at one shape: one a direction and variant. compare: peers are held to the reference first."""
    assert case.traffic is not None
    peers = peers_of(case, shape)
    directions = directions_of(case)
    kept = _remembered(case, shape, peers, directions, cache)
    sets = input_sets(min(n for n in case.traffic(shape) if n) * case.bench_dtype.itemsize, limits.cache)
    made = [make_inputs(case, shape, seed, device) for seed in range(sets)]
    ours = works(case, case.timed, [own_copy(s) for s in made]) if case.timed else works(case, case.op, made)
    variants = {OURS: ours}
    for name, peer in peers.items():
        if name in kept:
            continue
        if compare and not peer.random:
            far = disagreement(case, peer.function, made[0])
            if not far <= FARTHEST:
                raise ValueError(f"{case.name} {dict(shape)}: {name} is {far:.3g} away from the reference")
        inputs = [own_copy(s) for s in made] if peer.writes_inputs else made
        variants[name] = works(case, peer.function, inputs)
    waits = {name for name, peer in peers.items() if peer.waits}
    rows = []
    for direction in directions:
        names = [OURS, *(name for name, peer in peers.items() if peer.does(direction))]
        timed = {name: variants[name][direction] for name in names if name in variants}
        seconds = timer(timed, sets=sets, waits=waits & timed.keys())
        for name in names:
            measured = kept[name][direction] if name in kept else {"seconds": seconds[name]}
            if case.together and "extra_bytes" not in measured:
                measured["extra_bytes"] = memory(variants[name][direction])
            if cache and name in peers and name not in kept:
                cache.put(case, name, peers[name], shape, direction, measured)
            row = {
                "op": case.name,
                "shape": told(shape),
                "direction": direction,
                "variant": name,
                "dtype": str(case.bench_dtype).removeprefix("torch."),
                **measured,
                **_figures(case, shape, direction, measured["seconds"], limits),
            }
            if name == OURS and case.left is not None and case.left(made[0], direction != "forward"):
                row["left_to_torch"] = True
            row |= {"graph": False} if name in waits else {}
            row |= {"cached": True} if name in kept else {}
            rows.append(row)
    return rows


def shapes_of(case: OpCase, *, quick: bool) -> list[int]:
    """Numbers of the shapes that are timed: all, or the first and the last."""
    count = len(case.bench)
    return sorted({0, count - 1}) if quick and count else list(range(count))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks ops", description=__doc__)
    parser.add_argument("names", nargs="*", help="ops; all where none is named")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for ops.json")
    parser.add_argument("--commit", default=head(), help="of the code that runs, where it is not a git checkout")
    parser.add_argument("--quick", action="store_true", help="two shapes an op, and the contract at those alone")
    parser.add_argument(
        "--cache", type=Path, help="folder that keeps peers' figures; such results are not for the docs"
    )
    parser.add_argument("--processes", type=int, help="that check and compile before timing; 0: all in this one")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - CASES.keys()
    if unknown:
        parser.error(f"unknown ops {sorted(unknown)}; expected some of {sorted(CASES)}")
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    with torch.cuda.stream(torch.cuda.Stream()):  # graphs cannot be captured on the default one
        _run(options)


def _run(options: argparse.Namespace) -> None:
    device = torch.device("cuda")
    about = environment(options.commit)
    cache = PeerCache(options.cache, about) if options.cache else None
    begin = time.perf_counter()
    jobs = []
    for name in options.names or CASES:
        case = CASES[name]
        shapes = shapes_of(case, quick=options.quick)
        compiled = []
        for i in shapes:
            peers = peers_of(case, case.bench[i])
            if len(_remembered(case, case.bench[i], peers, directions_of(case), cache)) < len(peers):
                compiled.append(i)
        jobs += jobs_of(name, shapes, quick=options.quick, compiled=compiled)
    jobs.sort(key=lambda job: job.kind != "compile")  # the longest first
    prepared = prepare(jobs, processes=options.processes, gpus=alike_gpus())
    print(f"contract and compilation: {time.perf_counter() - begin:.1f} s, {len(jobs)} jobs", flush=True)
    limits = measured_limits(device)
    seconds: dict[str, dict[str, float]] = {}
    rows: list[dict[str, Any]] = []
    for name in options.names or CASES:
        if name in prepared.refused:
            continue
        case = CASES[name]
        start = time.perf_counter()
        for i in shapes_of(case, quick=options.quick):
            rows += run_shape(case, case.bench[i], limits, device=device, cache=cache, compare=i == 0)
            torch.cuda.empty_cache()
        took = {"contract": 0.0, "compile": 0.0, "timing": time.perf_counter() - start}
        for job, t in prepared.seconds.items():
            if job.op == name:
                took["compile" if job.kind == "compile" else "contract"] += t
        seconds[name] = {what: round(t, 1) for what, t in took.items()}
        print(f"{name}: {took['timing']:.1f} s", flush=True)
    results = {
        "environment": about,
        "copy_bytes_per_second": limits.copy,
        "matmul_flops_per_second": limits.matmul,
        "seconds": seconds,
        "rows": rows,
        "refused": prepared.refused,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "ops.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"all: {time.perf_counter() - begin:.1f} s; copy {limits.copy / 1e12:.2f} TB/s", end="")
    print(f", product {limits.matmul / 1e12:.0f} TFLOP/s")
    print(ops_table(rows))
    if prepared.refused:
        sys.exit("not timed: " + "; ".join(f"{name}: {why}" for name, why in prepared.refused.items()))
