"""Tables and pictures in Markdown from what `python -m benchmarks training` measured."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.training_parallel import parallel_table
from benchmarks.training_quality import NANOGPT, OURS, TORCHS_OPS, quality_table, same_seed

Results = Mapping[str, Any]  # of one suite

TITLES = {
    "gpt2": "GPT-2 124M, 32 x 1024",
    "llama-1b": "Llama 3.2 1B, 4 x 4096, parameters and states in bf16",
    "llama-1b-masters": "Llama 3.2 1B, 4 x 4096, fp32 masters and moments; the peer's in bf16",
    "shakespeare": "shakespeare-char, 64 x 256",
    "shakespeare-cpu": "shakespeare-char on a CPU, 4 x 256",
}
QUALITY_TITLES = {
    "shakespeare-quality": "shakespeare-char, all of its last tenth",
    "gpt2-quality": "GPT-2 124M, 32 x 1024, held-out documents",
}
COLORS = {OURS: "#D55E00", NANOGPT: "#0072B2", TORCHS_OPS: "#000000"}


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
    on: dict[str, list[str]] = {}
    for suite in TITLES:
        if suite in measured:
            on.setdefault(machine(measured[suite]), []).append(TITLES[suite].split(",")[0])
    # A line each; where there are several, it says what was measured on which.
    told = [f"{', '.join(dict.fromkeys(what))}: {where}" for where, what in on.items()] if len(on) > 1 else list(on)
    return "\n".join([*lines, "", "\\\n".join(told)])


def machine(results: Results) -> str:
    """What was measured on."""
    about = results["environment"]
    where = about["gpu"] if "gpu" in about else f"{about['cpu']}, {about['threads']} threads"
    return f"{where}, torch {about['torch']}, {about['date']}."


def sentence(measured: Mapping[str, Results]) -> str:
    """Of every suite on a GPU, which one, how many times as fast as the fastest peer, and its share of its memory."""
    said = []
    for suite, title in TITLES.items():
        ours, *others = measured[suite]["rows"] if suite in measured else [None]
        peers = [row for row in others if not row["variant"].startswith("fusedlm")]
        if ours is None or not peers or not ours["peak_bytes"]:
            continue
        best = min(peers, key=lambda row: row["seconds"])
        faster, less = best["seconds"] / ours["seconds"], ours["peak_bytes"] / best["peak_bytes"]
        gpu = measured[suite]["environment"]["gpu"]
        said.append(f"{title}, {gpu}: {faster:.2f}x {best['variant']}'s speed in {less:.2f} of its memory")
    return f"Training steps: {'; '.join(said)}."


def quality_block(measured: Mapping[str, Results], suite: str) -> str:
    """The seeds' best losses of a suite."""
    rows = measured[suite]["rows"]
    missing = f"Not all runs are done; missing: {', '.join(measured[suite].get('missing', ()))}."
    said = [same_seed(rows), missing if "missing" in measured[suite] else "", machine(measured[suite])]
    return f"{quality_table(rows)}\n\n{' '.join(filter(None, said))}"


def parallel_block(measured: Mapping[str, Results]) -> str:
    """One model on several GPUs."""
    found = measured["llama-1b-fsdp"]
    return f"{parallel_table(found['rows'])}\n\n{machine(found)}"


BLOCKS: Mapping[str, Callable[[Mapping[str, Results]], str]] = {
    "training": sentence,
    "training steps": steps_table,
    "training shakespeare-quality": lambda measured: quality_block(measured, "shakespeare-quality"),
    "training gpt2-quality": lambda measured: quality_block(measured, "gpt2-quality"),
    "training llama-1b-fsdp": parallel_block,
}


def curves_figure(rows: Sequence[Mapping[str, Any]], title: str) -> Any:
    """A matplotlib figure: validation losses of all seeds over steps, and their means.

    Curves of one height hide each other, so beside them stand the same less the mean of nanoGPT's (of the first
    contender's where there is none), at the height that those after the first quarter need.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=160, layout="constrained")
    whole, difference = figure.subplots(1, 2, width_ratios=(1, 1.2))
    by_name: dict[str, list[dict[int, float]]] = {}
    for row in rows:
        by_name.setdefault(row["variant"], []).append(dict(map(tuple, row["curve"])))
    other = NANOGPT if NANOGPT in by_name else next(iter(by_name))
    base = _mean(by_name[other])
    for name, curves in by_name.items():
        color, mean = COLORS.get(name), _mean(curves)
        for axes, less in ((whole, {}), (difference, base)):
            for curve in curves if len(curves) > 1 else ():
                axes.plot(*_less(curve, less), color=color, alpha=0.4, linewidth=0.7)
            label = f"{name}, mean of {len(curves)}" if len(curves) > 1 else f"{name}, one seed"
            style = "-" if len(curves) > 1 else "--"
            axes.plot(*_less(mean, less), style, color=color, linewidth=1.8, label=label)
    whole.set_ylabel("validation loss, nats a token")
    whole.set_title(title, loc="left", fontsize=10)
    whole.legend(frameon=False, fontsize=8)
    difference.set_title(f"less the mean of {other}", loc="left", fontsize=10)
    late = [step for step in base if 4 * step >= max(base)]
    every = [curve for curves in by_name.values() for curve in curves]
    highest = max((abs(curve[step] - base[step]) for curve in every for step in late if step in curve), default=0.0)
    if highest:
        difference.set_ylim(-1.1 * highest, 1.1 * highest)
    for axes in (whole, difference):
        axes.set_xlabel("steps")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    return figure


def _mean(curves: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """At the steps that all of them have."""
    steps = [step for step in curves[0] if all(step in curve for curve in curves)]
    return {step: math.fsum(curve[step] for curve in curves) / len(curves) for step in steps}


def _less(curve: Mapping[int, float], base: Mapping[int, float]) -> tuple[list[int], list[float]]:
    """Steps, and what a curve is above another there; all of it above an empty one."""
    steps = [step for step in curve if not base or step in base]
    return steps, [curve[step] - base.get(step, 0.0) for step in steps]
