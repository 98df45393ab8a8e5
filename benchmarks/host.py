"""`python -m benchmarks host`: how long the host takes for a call of each op, at a size that costs the GPU nothing.

Beside torch's own operators (or the reference, where it has none) and an addition of two tensors.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment, head
from benchmarks.peers.eager import EAGER
from benchmarks.peers.peer import Peer
from benchmarks.tables import host_table
from benchmarks.timing import host_seconds
from benchmarks.work import make_inputs, own_copy
from fusedlm.testing import OpCase
from fusedlm.testing.cases import CASES


def host_rows(
    case: OpCase, device: torch.device, timer: Callable[..., dict[str, float]] = host_seconds
) -> list[dict[str, Any]]:
    """A row for ours, torch's and the addition, without gradients and with, at the first shape of the contract."""
    shape = case.shapes[0]
    ours, theirs = (own_copy(make_inputs(case, shape, 0, device)) for _ in range(2))
    x = torch.ones(16, 16, dtype=case.bench_dtype, device=device, requires_grad=bool(case.gradients))
    torchs = EAGER.get(case.name, Peer(case.reference)).function
    calls = {"fusedlm": lambda: case.op(**ours), "torch": lambda: torchs(**theirs), "addition": lambda: x + x}
    rows = []
    for grad in (False, True) if case.gradients else (False,):
        with torch.set_grad_enabled(grad):
            for name, seconds in timer(calls).items():
                row = {"op": case.name, "shape": dict(shape), "variant": name, "grad": grad, "seconds": seconds}
                rows.append(row)
    return rows


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks host", description=__doc__)
    parser.add_argument("names", nargs="*", help="ops; all where none is named")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for host.json")
    parser.add_argument("--commit", default=head(), help="of the code that runs, where it is not a git checkout")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - CASES.keys()
    if unknown:
        parser.error(f"unknown ops {sorted(unknown)}; expected some of {sorted(CASES)}")
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    rows: list[dict[str, Any]] = []
    for name in options.names or CASES:
        if CASES[name].bench and CASES[name].timed is None:  # what copies before it calls is no call
            rows += host_rows(CASES[name], torch.device("cuda"))
    options.out.mkdir(parents=True, exist_ok=True)
    results = {"environment": environment(options.commit), "rows": rows}
    (options.out / "host.json").write_text(json.dumps(results, indent=1) + "\n")
    print(host_table(rows))
