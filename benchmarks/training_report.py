"""Tables and pictures in Markdown from what `python -m benchmarks training` measured."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.training_quality import quality_table

Results = Mapping[str, Any]  # of one suite

TITLES = {
    "gpt2": "GPT-2 124M, 32 x 1024",
    "llama-1b": "Llama 3.2 1B, 4 x 4096, parameters and states in bf16",
    "llama-1b-masters": "Llama 3.2 1B, 4 x 4096, fp32 masters and moments; the peer's in bf16",
    "shakespeare": "shakespeare-char, 64 x 256",
    "shakespeare-cpu": "shakespeare-char on a CPU, 4 x 256",
}
COLORS = {"fusedlm": "#D55E00", "nanoGPT": "#0072B2"}


def steps_table(measured: Mapping[str, Results]) -> str:
    """Of every suite that was timed: tokens a second, MFU, memory, and the peers' time over ours."""
    lines = ["| | tokens/s | ms a step | MFU | peak GiB | against |", "|---|---:|---:|---:|---:|---:|"]
    for suite, title in TITLES.items():
        rows = measured[suite]["rows"] if suite in measured else []
        for row in rows:
            ours = row["variant"] == "fusedlm"
            name = f"**{title}**" if ours else row["variant"]
            against = "" if ours else f"{row['seconds'] / rows[0]['seconds']:.2f}x"
            mfu = "" if row["mfu"] is None else f"{row['mfu']:.0%}"
            memory = f"{row['peak_bytes'] / 2**30:.1f}" if row["peak_bytes"] else ""
            cells = [name, f"{row['tokens_per_second']:,.0f}", f"{row['seconds'] * 1e3:,.1f}", mfu, memory, against]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *dict.fromkeys(machine(found) for found in measured.values())])


def machine(results: Results) -> str:
    """What was measured on."""
    about = results["environment"]
    where = about["gpu"] if "gpu" in about else f"{about['cpu']}, {about['threads']} threads"
    return f"{where}, torch {about['torch']}, {about['date']}."


def sentence(measured: Mapping[str, Results]) -> str:
    """Of every suite on a GPU, how many times as fast as the fastest peer, and its share of the peer's memory."""
    said = []
    for suite, title in TITLES.items():
        ours, *others = measured[suite]["rows"] if suite in measured else [None]
        peers = [row for row in others if not row["variant"].startswith("fusedlm")]
        if ours is None or not peers or not ours["peak_bytes"]:
            continue
        best = min(peers, key=lambda row: row["seconds"])
        faster, less = best["seconds"] / ours["seconds"], ours["peak_bytes"] / best["peak_bytes"]
        said.append(f"{title}: {faster:.2f}x {best['variant']}'s speed in {less:.2f} of its memory")
    return f"Training steps: {'; '.join(said)}."


def quality_block(measured: Mapping[str, Results], suite: str) -> str:
    """The seeds' best losses of a suite."""
    return f"{quality_table(measured[suite]['rows'])}\n\n{machine(measured[suite])}"


BLOCKS: Mapping[str, Callable[[Mapping[str, Results]], str]] = {
    "training": sentence,
    "training steps": steps_table,
    "training shakespeare-quality": lambda measured: quality_block(measured, "shakespeare-quality"),
    "training gpt2-quality": lambda measured: quality_block(measured, "gpt2-quality"),
}


def curves_figure(rows: Sequence[Mapping[str, Any]], title: str) -> Any:
    """A matplotlib figure: validation losses of all seeds over steps, and their means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=160, layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["variant"] for row in rows):
        curves = [row["curve"] for row in rows if row["variant"] == name]
        for curve in curves:
            axes.plot(*zip(*curve, strict=True), color=COLORS.get(name), alpha=0.25, linewidth=0.8)
        steps = [step for step, _ in curves[0]]
        means = [math.fsum(curve[i][1] for curve in curves) / len(curves) for i in range(len(steps))]
        axes.plot(steps, means, color=COLORS.get(name), linewidth=1.8, label=f"{name}, mean of {len(curves)}")
    axes.set_xlabel("steps")
    axes.set_ylabel("validation loss, nats a token")
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    return figure
