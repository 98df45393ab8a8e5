"""`python -m benchmarks report`: write the tables of the docs from the results that are committed."""

import json
from pathlib import Path

from benchmarks.tables import ops_table

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"


def ops_page() -> str:
    """docs/kernels/results.md."""
    results = json.loads((RESULTS / "ops.json").read_text(encoding="utf-8"))
    e = results["environment"]
    return f"""# Ops beside their peers

Made by `python -m benchmarks report` from benchmarks/results/ops.json; `python -m benchmarks ops` measures anew.

{e["gpu"]}, driver {e["driver"]}, torch {e["torch"]}, Triton {e["triton"]}, {e["date"]}; bf16. A copy of 512 MB moved
{results["copy_bytes_per_second"] / 1e12:.2f} TB/s in the same run; shares count each input read once and each output
written once. Times are medians of CUDA-graph replays over inputs that rotate past the L2 cache, all variants in turns.
"against" is a peer's time over ours: above 1, ours is faster. Peers: torch's own operators in eager
mode, torch.compile of them, Liger-Kernel.

{ops_table(results["rows"])}
"""


def main(arguments: list[str]) -> None:
    if arguments:
        raise SystemExit("usage: python -m benchmarks report")
    path = DOCS / "kernels/results.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(ops_page(), encoding="utf-8")
    print(f"wrote {path}")
