"""`python -m benchmarks report`: write the tables and plots of the docs from the results that are committed.

The pages of all ops' figures are made whole: docs/kernels/results.md from ops.json, a results_NAME.md from each
ops_NAME.json, which is the same of another GPU, and docs/kernels/embedding_results.md. In all others (and in the
README.md beside the folder) what stands between a line `<!-- figures: op, op -->` and a line `<!-- end -->` is replaced
by these ops' figures, by those of every size where the first line ends with `(all sizes) -->`. Where it is
`<!-- figures: summary -->` there is one sentence and the picture of all ops; where it names one of `cpu.BLOCKS` or
`training_report.BLOCKS`, those; and for `<!-- figures: forward -->` and `<!-- figures: memory -->` the tables of
`python -m benchmarks forward` and `memory`.
"""

import argparse
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import training_report
from benchmarks.cpu import BLOCKS
from benchmarks.forward import forward_table
from benchmarks.memory import memory_block
from benchmarks.tables import LEFT, embedding_table, figures, host_table, ops_table, summary, transformers_table

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
_BEGIN, _END = re.compile(r"^<!-- figures: *(.*?) *-->$"), "<!-- end -->"


def _machine(about: dict[str, Any]) -> str:
    parts = [f"driver {about['driver']}", f"torch {about['torch']}", f"Triton {about['triton']}", about["date"]]
    if about["commit"]:
        parts.append(f"commit {about['commit']}")
    return ", ".join([about["gpu"], *parts])


def refuse_cached(results: dict[str, Any]) -> None:
    """Raises ValueError where figures are of an earlier run: what is published is measured side by side."""
    cached = sorted({row["op"] for row in results["rows"] if row.get("cached")})
    if cached:
        raise ValueError(f"peers' figures of {', '.join(cached)} come from a cache; measure without --cache")


def ops_page(
    results: dict[str, Any],
    source: str,
    plots: Sequence[str] = (),
    others: Mapping[str, str] | None = None,
    host: dict[str, Any] | None = None,
    transformers: dict[str, Any] | None = None,
) -> str:
    """docs/kernels/results.md, or that of another GPU. source: the file of the results. plots: ops that have one.
    others: pages of other GPUs, by GPU. host: what `benchmarks host` measured. transformers: what the example did."""
    rows = results["rows"]
    limits = f"A copy of 512 MB moved {results['copy_bytes_per_second'] / 1e12:.2f} TB/s in the same run"
    if "matmul_flops_per_second" in results:
        limits += f", a bf16 product of 8192^3 ran at {results['matmul_flops_per_second'] / 1e12:.0f} TFLOP/s"
    parts = [
        f"""# Ops beside their peers

Made by `python -m benchmarks report` from benchmarks/results/{source}; `python -m benchmarks ops` measures anew.

{_machine(results["environment"])}; bf16 unless a table says otherwise.

{limits}.

Times are medians of CUDA-graph replays over inputs that rotate past the L2 cache, all variants in turns. A share is of
the copy's bandwidth, counting each input read once and each output written once, or of the product's rate where it says
"matmul". "against" is a peer's time over ours: above 1, ours is faster. Peers: torch's own operators in eager mode,
torch.compile of them, Liger-Kernel.
"""
    ]
    if others:
        links = ", ".join(f"[{gpu}]({page})" for gpu, page in others.items())
        parts.append(f"The same on other GPUs: {links}.\n")
    if any(row["variant"].startswith("torch-") for row in rows):
        parts.append("torch-topk and the like are other ways to do it with torch's operators.\n")
    named = {row["variant"] for row in rows}
    libraries = {"cublaslt": "cuBLASLt's fused GELU", "cudnn": "cuDNN's attention", "flex": "compiled flex attention"}
    if named & libraries.keys():
        told = ", ".join(f"{name} is {what}" for name, what in libraries.items() if name in named)
        parts.append(f"{told}, each as torch offers it.\n")
    if any(not row.get("graph", True) for row in rows):
        parts.append("\\* waits for the GPU inside, so that it cannot be in a graph; called from the host.\n")
    if any(row.get("left_to_torch") for row in rows):
        parts.append(LEFT + "\n")
    if any("extra_bytes" in row for row in rows):
        parts.append('"extra memory" is the most that a forward and a backward pass allocate, gradients included.\n')
    parts.append(ops_table(rows) + "\n")
    if host is not None:
        parts.append(f"""## Host time of a call

Microseconds until a call at a tiny size returns, medians; "grad" where inputs require gradients.
{_machine(host["environment"])}. Made by `python -m benchmarks host`.

{host_table(host["rows"])}
""")
    if transformers is not None:
        parts.append(f"""## In models of transformers

The same parameters and logits, in bf16, eager, on one {transformers["device"]}; attention and products are the same in
both. Made by `python examples/kernels_in_transformers.py --json`.

{transformers_table(transformers)}
""")
    if plots:
        parts.append("## Plots\n")
        parts += [f"![{op}: time and share of the limit over size](plots/{op}.png)\n" for op in plots]
    return "\n".join(parts)


def embedding_page(runs: Mapping[str, dict[str, Any]]) -> str:
    """docs/kernels/embedding_results.md, of each run of ops a table. runs: by the file of the results."""
    parts = [
        "# Embedding, position and dropout in one pass\n\nMade by `python -m benchmarks report`. Sizes are sequences x "
        "tokens x width.\n"
    ]
    for source, results in runs.items():
        about = results["environment"]
        parts.append(f"""## {about["gpu"]}

{_machine(about)}; benchmarks/results/{source}.

{embedding_table(results["rows"])}
""")
    return "\n".join(parts)


def fill(page: Path, results: dict[str, Any], docs: Path, blocks: Mapping[str, Callable[[], str]]) -> str | None:
    """A page with its figures' blocks made anew; None where it has none. blocks: those that are not of ops, by name.

    Raises ValueError for a block without an end, or of an op that was not measured.
    """
    about = results["environment"]
    machine = f"{about['gpu']}, torch {about['torch']}, Triton {about['triton']}"
    measured = {row["op"] for row in results["rows"]}
    lines: list[str] = []
    block = None
    found = False
    for line in page.read_text(encoding="utf-8").split("\n"):
        begin = _BEGIN.match(line)
        if block is not None and begin:
            break
        if block is None:
            lines.append(line)
        if begin:
            block, found = begin[1], True
        elif block is not None and line == _END:
            ops = block.removesuffix(" (all sizes)").split(", ")
            if block == "summary":
                made = summary(results["rows"], machine)
                picture = Path(os.path.relpath(docs / "ops.png", page.parent)).as_posix()
                made += f"\n\n![Time of the fastest peer over ours, for every op]({picture})"
            elif block in blocks:
                made = blocks[block]()
            elif set(ops) <= measured:
                made = figures(results["rows"], ops, machine, whole=block.endswith(" (all sizes)"))
            else:
                raise ValueError(f"{page} asks for figures of {block!r}; there are those of {sorted(measured)}")
            lines += [made, _END]
            block = None
    if block is not None:
        raise ValueError(f"{page}: the figures of {block!r} have no line {_END!r}")
    return "\n".join(lines) if found else None


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _blocks(results: Path, training: Mapping[str, Any]) -> dict[str, Callable[[], str]]:
    """What can be made of a folder of results beside figures of ops. training: its training suites."""
    blocks: dict[str, Callable[[], str]] = {}
    if (results / "decode_cpu.json").exists():
        decode = _read(results / "decode_cpu.json")
        blocks |= {name: partial(make, decode) for name, (part, make) in BLOCKS.items() if part in decode}
    if (results / "forward.json").exists():
        blocks["forward"] = partial(forward_table, _read(results / "forward.json"))
    if (results / "memory.json").exists():
        blocks["memory"] = partial(memory_block, _read(results / "memory.json"))
    if training:
        blocks |= {name: partial(make, training) for name, make in training_report.BLOCKS.items()}
    return blocks


def write_report(results: Path, docs: Path, *, plots: bool = True) -> list[Path]:
    """Write all that a folder of results gives into docs; returns what was written. plots: needs matplotlib."""
    runs = {path.name: _read(path) for path in (results / "ops.json", *sorted(results.glob("ops_*.json")))}
    for run in runs.values():
        refuse_cached(run)
    ops = runs["ops.json"]
    others = {name: f"results{name[len('ops') : -len('.json')]}.md" for name in runs if name != "ops.json"}
    host, transformers, decode = (
        _read(results / name) if (results / name).exists() else None
        for name in ("host.json", "transformers.json", "decode_cpu.json")
    )
    training = {found["suite"]: found for found in map(_read, sorted(results.glob("training_*.json")))}
    names = list(dict.fromkeys(row["op"] for row in ops["rows"]))
    links = {runs[name]["environment"]["gpu"]: page for name, page in others.items()}
    pages = {
        docs / "kernels/results.md": ops_page(ops, "ops.json", names if plots else [], links, host, transformers),
        **{docs / "kernels" / page: ops_page(runs[name], name) for name, page in others.items()},
    }
    if "embedding" in names:
        pages[docs / "kernels/embedding_results.md"] = embedding_page(runs)
    blocks = _blocks(results, training)
    for page in (docs.parent / "README.md", *sorted(docs.rglob("*.md"))):
        filled = fill(page, ops, docs, blocks) if page not in pages and page.exists() else None
        if filled is not None:
            pages[page] = filled
    for path, text in pages.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    written = list(pages)
    if plots:
        from benchmarks.plots import op_figure, save, summary_figure
        from fusedlm.inference.bench.chart import decode_figure

        figures = {docs / f"kernels/plots/{name}.png": op_figure(name, ops["rows"]) for name in names}
        figures[docs / "ops.png"] = summary_figure(ops["rows"])
        if decode is not None:
            figures[docs / "decode_cpu.png"] = decode_figure(decode["decode"])
        for suite, found in training.items():
            if suite.endswith("-quality"):
                figure = training_report.curves_figure(found["rows"], training_report.QUALITY_TITLES[suite])
                figures[docs / f"training_{suite.replace('-', '_')}.png"] = figure
        for path, figure in figures.items():
            save(figure, path)
        written += list(figures)
    return written


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        help="folder with ops.json, and with what else there is of the others' results",
    )
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder to write into")
    options = parser.parse_args(arguments)
    try:
        for path in write_report(options.results, options.docs):
            print(f"wrote {path}")
    except ValueError as error:
        raise SystemExit(str(error)) from None
