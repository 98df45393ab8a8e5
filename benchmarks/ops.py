"""`python -m benchmarks ops`: the contract first, then every op beside its peers at the shapes of its case."""

import argparse
import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.peers import peers_of
from benchmarks.tables import ops_table
from benchmarks.timing import Work, copy_bandwidth, time_variants
from fusedlm.testing import OpCase, Shape, check, checks
from fusedlm.testing.cases import CASES

DTYPE = torch.bfloat16
L2_BYTES = 50e6


def head() -> str | None:
    """The commit that is checked out, where this is a git checkout."""
    done = subprocess.run(["git", "rev-parse", "--verify", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def environment(commit: str | None) -> dict[str, Any]:
    """What a figure depends on: GPU, driver, versions, commit."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": subprocess.run(query, capture_output=True, text=True).stdout.strip(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def _inputs(case: OpCase, shape: Shape, seed: int) -> dict[str, Any]:
    made = case.inputs(shape, torch.Generator("cuda").manual_seed(seed))
    cast = {}
    for name, value in made.items():
        if isinstance(value, torch.Tensor):
            value = value.to("cuda")
            if value.is_floating_point():
                value = value.to(torch.float32 if name in case.fixed else DTYPE)
            if name in case.gradients:
                value.requires_grad_()
        cast[name] = value
    return cast


def _work(case: OpCase, op: Any, sets: list[dict[str, Any]]) -> tuple[Work, Work | None]:
    """The forward pass, and the backward pass of outputs computed before."""

    def forward(i: int) -> object:
        with torch.no_grad():
            return op(**sets[i])

    if not case.gradients:
        return forward, None
    prepared = []
    for s in sets:
        result = op(**s)
        outputs = [o for o in (result if isinstance(result, tuple) else (result,)) if o.requires_grad]
        prepared.append((outputs, [s[name] for name in case.gradients], [torch.randn_like(o) for o in outputs]))

    def backward(i: int) -> object:
        outputs, wanted, upstream = prepared[i]
        return torch.autograd.grad(outputs, wanted, upstream, retain_graph=True)

    return forward, backward


def run_op(case: OpCase, copy: float) -> list[dict[str, Any]]:
    """Rows of results: one a shape, direction and variant. Raises AssertionError where the contract is broken."""
    device = torch.device("cuda")
    for shape, options in checks(case, dtypes=(DTYPE, torch.float32)):
        check(case, shape, device=device, **options)
    rows = []
    for shape in case.bench:
        assert case.traffic is not None
        sizes = dict(zip(("forward", "backward"), case.traffic(shape), strict=True))
        check(case, shape, dtype=DTYPE, device=device)
        count = 2 + int(2 * L2_BYTES // (sizes["forward"] * DTYPE.itemsize))
        made = [_inputs(case, shape, seed) for seed in range(count)]
        variants = {"fusedlm": case.op, **peers_of(case)}
        works = {name: _work(case, op, made) for name, op in variants.items()}
        for which, direction in enumerate(("forward", "backward")):
            chosen = {name: w[which] for name, w in works.items() if w[which] is not None}
            if not chosen:
                continue
            seconds = time_variants(chosen, sets=count)  # type: ignore[arg-type]
            for name, t in seconds.items():
                rate = sizes[direction] * DTYPE.itemsize / t
                rows.append(
                    {
                        "op": case.name,
                        "shape": dict(shape),
                        "direction": direction,
                        "variant": name,
                        "dtype": str(DTYPE).removeprefix("torch."),
                        "seconds": t,
                        "bytes_per_second": rate,
                        "share_of_copy": rate / copy,
                    }
                )
    return rows


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks ops", description=__doc__)
    parser.add_argument("names", nargs="*", help="ops; all where none is named")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the JSON")
    parser.add_argument("--commit", default=head(), help="of the code that runs, where it is not a git checkout")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - CASES.keys()
    if unknown:
        parser.error(f"unknown ops {sorted(unknown)}; expected some of {sorted(CASES)}")
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    with torch.cuda.stream(torch.cuda.Stream()):  # graphs cannot be captured on the default one
        _run(options.names or list(CASES), options.out, options.commit)


def _run(names: list[str], out: Path, commit: str | None) -> None:
    copy = copy_bandwidth()
    results: dict[str, Any] = {"environment": environment(commit), "copy_bytes_per_second": copy, "rows": []}
    for name in names:
        start = time.perf_counter()
        results["rows"] += run_op(CASES[name], copy)
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "ops.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"copy {copy / 1e12:.2f} TB/s")
    print(ops_table(results["rows"]))
