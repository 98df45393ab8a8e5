"""Run every kernel under NVIDIA's compute-sanitizer: memory errors, then races in shared memory. Needs a GPU.

    python tests/kernels/sanitize.py [NAMES] [--tools memcheck racecheck]

Ops run forward and backward on the contract's shapes (of the large ones on those that are not very), in bf16 and fp32,
with every tensor an allocation of its own, so that a read past its end is one. The exit status is 1 where something is
found, 2 where there is no compute-sanitizer.
Under racecheck the kernels for every GPU serve in place of those for Hopper: it does not follow how warps of these wait
for each other (docs/kernels/README.md says why they may). What it says of cuBLAS's own kernels does not count.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch

from fusedlm.kernels import _launch, backend
from fusedlm.testing import OpCase
from fusedlm.testing.cases import CASES
from fusedlm.testing.contract import Shape

DTYPES = (torch.bfloat16, torch.float32)
MOST = 2**21  # numbers that go in: more would take minutes
FOUND = 86  # the exit status that compute-sanitizer is told to end with


@contextmanager
def no_hopper_kernels() -> Iterator[None]:
    """Inside, the kernels for every GPU serve on Hopper too."""
    with patch.object(_launch, "_capability", lambda _: 80):
        yield


def numbers(case: OpCase, shape: Shape) -> int:
    """How many go in."""
    with torch.device("meta"):
        return sum(v.numel() for v in case.inputs(shape, None).values() if isinstance(v, torch.Tensor))


def run(names: list[str]) -> None:
    """The work that is watched."""
    for name in names:
        case = CASES[name]
        for shape in (*case.shapes, *(shape for shape in case.large if numbers(case, shape) <= MOST)):
            for dtype in DTYPES:
                made = case.inputs(shape, torch.Generator().manual_seed(0))
                inputs = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in made.items()}
                for key, value in inputs.items():
                    if isinstance(value, torch.Tensor) and value.is_floating_point():
                        value = value.to(torch.float32 if key in case.fixed else dtype)
                        inputs[key] = value.requires_grad_(key in case.gradients)
                with backend("triton"):  # never another library's
                    result = case.op(**inputs)
                outputs = [o for o in (result if isinstance(result, tuple) else (result,)) if o is not None]
                wanted = [o for o in outputs if o.requires_grad]
                if wanted:
                    torch.autograd.backward(wanted, [torch.ones_like(o) for o in wanted])
    torch.cuda.synchronize()


def only_of_others(report: str) -> bool:
    """Whether all that racecheck reports, and it shows all, is between accesses of cuBLAS's kernels."""
    shown = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)", report)
    kernels = re.findall(r"access at ([^\s+]+)\+0x", report)
    if shown is None or not kernels:
        return False
    displayed, errors, warnings = map(int, shown.groups())
    everything = displayed == errors + warnings == report.count("Race reported between")
    return everything and all(kernel.startswith("nvjet_") for kernel in kernels)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="ops; all where none is named")
    parser.add_argument("--tools", nargs="*", default=["memcheck", "racecheck"])
    parser.add_argument("--run", choices=["all", "no-hopper"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.names or list(CASES)
    if options.run:
        with no_hopper_kernels() if options.run == "no-hopper" else nullcontext():
            run(names)
        return 0
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None or not torch.cuda.is_available():
        print("compute-sanitizer and a GPU are needed", file=sys.stderr)
        return 2
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = False
    for tool in options.tools:
        kernels = "no-hopper" if tool == "racecheck" else "all"
        command = [sys.executable, __file__, "--run", kernels, *names]
        subprocess.run(command, check=True, env=environment)  # compiles, so that the watched run need not
        start = time.perf_counter()
        limits = ["--error-exitcode", str(FOUND), "--print-limit", "100"]
        watched = [sanitizer, "--tool", tool, *limits, *command]
        done = subprocess.run(watched, env=environment, capture_output=True, text=True)
        left_out = ", without the kernels for Hopper" if kernels == "no-hopper" else ""
        report = done.stdout + done.stderr
        clean = done.returncode == 0 or (done.returncode == FOUND and only_of_others(report))
        print(f"{tool}: {'clean' if clean else 'FAILED'}, {time.perf_counter() - start:.0f} s{left_out}")
        if done.returncode:
            failed |= not clean
            print(report[-4000:])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
