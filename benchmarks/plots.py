"""Plots from rows of results, as PNG: a figure an op, and one picture of all."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, PercentFormatter

from benchmarks.tables import (
    PASSES,
    PEERS,
    Group,
    Row,
    against_best,
    by_size,
    grouped,
    ops_without_backward,
    option_texts,
    share,
    sizes_of,
)

# Okabe and Ito's palette, which colour-blind people tell apart; markers differ too. Those alike never meet in a figure.
STYLES: dict[str, dict[str, Any]] = {
    "fusedlm": {"color": "#D55E00", "marker": "o", "linewidth": 2.4, "zorder": 5},
    "torch": {"color": "#0072B2", "marker": "s"},
    "torch-topk": {"color": "#56B4E9", "marker": "v"},
    "cublaslt": {"color": "#56B4E9", "marker": "v"},
    "cudnn": {"color": "#56B4E9", "marker": "v"},
    "flex": {"color": "#E69F00", "marker": "P"},
    "compile": {"color": "#009E73", "marker": "^"},
    "liger": {"color": "#AA6FB0", "marker": "D"},
}
LONGEST_BAR = 3.0  # of the summary
ROOMY, UPRIGHT = 5, 8  # labels of sizes that stand side by side: so many in larger type; more than so many are turned
PIXELS = 160  # an inch; at 9 inches sharp on a page that shows 900 px
_INK, _PALE = "#333333", "#DDDDDD"
_RC: Any = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
}


def _plain(value: float, _: object = None) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def _number(value: int) -> str:
    return f"{value / 1e6:.0f}M" if value >= 10**7 else str(value)


def _size_label(shape: Mapping[str, Any], names: Sequence[str], wrap: bool = True) -> str:
    """Sizes by name, two a line: "32768\\n× 768"."""
    sizes = [_number(shape[name]) for name in names]
    step = (2 if len(sizes) > 2 else 1) if wrap else len(sizes)
    return "\n× ".join(" × ".join(sizes[i : i + step]) for i in range(0, len(sizes), step))


def _varying(shapes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the sizes that tell these shapes apart; of a single shape, all."""
    names = list(sizes_of(shapes[0]))
    return [k for k in names if len({s[k] for s in shapes}) > 1] or names


def _short_label(shape: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """What tells a shape from an op's others: "32768 × 768", "B=64, top_k=50"."""
    names = _varying(others)
    sizes = _size_label(shape, names, wrap=False)
    shared = set.intersection(*(set(option_texts(other)) for other in others))
    options = [text for text in option_texts(shape) if text not in shared]
    return ", ".join((f"{names[0]}={sizes}" if len(names) == 1 else sizes, *options))


def _draw(axes: Axes, values: Mapping[str, Sequence[float | None]], labels: Sequence[str]) -> None:
    """A line for each variant over sizes that stand side by side; a bar for each where there is one size."""
    for i, (name, ys) in enumerate(values.items()):
        style = {"linewidth": 1.5, "markersize": 5, **STYLES.get(name, {"color": "#888888"})}
        if len(labels) == 1:
            axes.bar(i, ys[0] or 0.0, color=style["color"], width=0.6, zorder=2)
            continue
        at = [i for i, y in enumerate(ys) if y is not None]
        axes.plot(at, [ys[i] for i in at], label=PEERS.get(name, name), clip_on=False, **style)
    if len(labels) == 1:
        axes.set_xticks(range(len(values)), [PEERS.get(name, name) for name in values], fontsize=8)
        axes.set_xlim(-0.75, len(values) - 0.25)
    else:
        many = len(labels) > UPRIGHT
        axes.set_xticks(range(len(labels)), labels, fontsize=7 + (len(labels) <= ROOMY), rotation=90 if many else 0)
        axes.set_xlim(-0.25, len(labels) - 0.75)
    axes.grid(axis="y", color=_PALE, linewidth=0.8)
    axes.set_axisbelow(True)


def _step_below(value: float) -> float:
    """The largest of 1, 2, 5, 10, 20, ... and their fractions that is not above a value."""
    power = 10.0 ** math.floor(math.log10(value))
    return max(step * power for step in (1, 2, 5) if step * power <= value)


def _panels(rows: Iterable[Row]) -> dict[str, list[Group]]:
    """What goes into one pair of panels, by its title: the pass, and an option where shapes have some."""
    panels: dict[str, list[Group]] = {}
    groups = grouped(rows)
    alone = ops_without_backward(groups)
    for ours, peers in groups:
        what = [] if ours["op"] in alone else [PASSES[ours["direction"]]]
        title = ", ".join((ours["op"], *what, *option_texts(ours["shape"])))
        panels.setdefault(title, []).append((ours, peers))
    ordered = sorted(panels.items(), key=lambda panel: panel[1][0][0]["direction"] == "backward")
    return {title: by_size(found) for title, found in ordered}


def op_figure(op: str, rows: Iterable[Row]) -> Figure:
    """For each direction (and option) two panels: the time, and the share of what limits it, over size."""
    panels = _panels(row for row in rows if row["op"] == op)
    with matplotlib.rc_context(_RC):
        height = 2.75 if max(len(groups) for groups in panels.values()) <= UPRIGHT else 3.5
        figure = Figure(figsize=(9, 0.6 + height * len(panels)), dpi=PIXELS, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)  # type: ignore[union-attr,call-arg]
        grid = figure.subplots(len(panels), 2, squeeze=False)
        for (title, groups), (left, right) in zip(panels.items(), grid, strict=True):
            variants = list(dict.fromkeys(name for ours, peers in groups for name in (*peers, ours["variant"])))
            by_name = [{**peers, "fusedlm": ours} for ours, peers in groups]
            names = _varying([ours["shape"] for ours, _ in groups])
            labels = [_size_label(ours["shape"], names, wrap=len(groups) <= UPRIGHT) for ours, _ in groups]
            slow = max(g["fusedlm"]["seconds"] for g in by_name) > 5e-3
            unit, factor = ("ms", 1e3) if slow else ("µs", 1e6)
            times = {v: [g[v]["seconds"] * factor if v in g else None for g in by_name] for v in variants}
            shares = {v: [share(g[v])[0] if v in g else None for g in by_name] for v in variants}
            limit = {"copy": "copy bandwidth", "matmul": "matmul rate"}[share(groups[0][0])[1]]
            _draw(left, times, labels)
            _draw(right, shares, labels)
            every = [t for ts in times.values() for t in ts if t is not None]
            if max(every) > 12 * min(every):
                left.set_yscale("log")
                left.minorticks_off()
                left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                left.set_ylim(bottom=_step_below(min(every)))
            else:
                left.set_ylim(0, max(every) * 1.08)
            left.yaxis.set_major_formatter(FuncFormatter(_plain))
            left.set_ylabel(f"time, {unit}")
            top = max(s for ss in shares.values() for s in ss if s is not None)
            right.set_ylim(0, max(1.05, top * 1.03))
            right.axhline(1, color=_INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            right.set_ylabel(f"share of {limit}")
            for axes in (left, right):
                one = f" = {labels[0]}".replace("\n", " ") if len(labels) == 1 else ""
                axes.set_xlabel(" × ".join(names) + one, fontsize=8)
            left.set_title(title, loc="left", fontsize=11, fontweight="bold")
        handles = {h.get_label(): h for row in grid for h in reversed(row[0].get_lines())}
        if handles:  # bars are named where they stand
            place: dict[str, Any] = {"loc": "outside upper right", "ncols": len(handles), "frameon": False}
            figure.legend(handles.values(), handles.keys(), **place)
    return figure


def _together(groups: Iterable[Group]) -> list[list[Group]]:
    """Those of an op and a pass that have been compared with anybody, by size."""
    found: dict[tuple[str, str], list[Group]] = {}
    for ours, peers in groups:
        if peers:
            found.setdefault((ours["op"], ours["direction"]), []).append((ours, peers))
    return [by_size(some) for some in found.values()]


def representative(groups: Sequence[Group]) -> Group:
    """The middle size of an op and pass (of those with the option that comes first)."""
    options = option_texts(groups[0][0]["shape"])
    alike = [group for group in groups if option_texts(group[0]["shape"]) == options]
    return alike[len(alike) // 2]


def summary_figure(rows: Iterable[Row]) -> Figure:
    """The best peer's time over ours: a bar an op and pass at one size, a thin line over all sizes and options.

    What an op by itself leaves to torch's own is not counted.
    """
    every = [group for group in grouped(rows) if not group[0].get("left_to_torch")]
    alone = ops_without_backward(every)
    colors = {"forward": "#E69F00", "backward": "#56B4E9", "both": "#009E73", "alone": "#999999"}
    texts = {**PASSES, "alone": "has no backward pass"}
    ticks, ys, widths, spans, notes, kinds = [], [], [], [], [], []
    y = 0.0
    compared = _together(every)
    for op in dict.fromkeys(groups[0][0]["op"] for groups in compared):
        mine = [groups for groups in compared if groups[0][0]["op"] == op]
        shapes = [ours["shape"] for ours, _ in every if ours["op"] == op]
        label = _short_label(representative(mine[0])[0]["shape"], shapes)
        ticks.append((y + (len(mine) - 1) / 2, op, label))
        for groups in mine:
            ratio, best = against_best(representative(groups))
            ratios = [against_best(group)[0] for group in groups]
            ys.append(y)
            widths.append(ratio)
            spans.append((min(ratios), max(ratios)))
            kinds.append("alone" if op in alone else groups[0][0]["direction"])
            notes.append(f"{ratio:.2f}× {PEERS.get(best, best)}")
            y += 1
        y += 0.8
    longest = max(high for _, high in spans)
    end = min(longest, LONGEST_BAR)
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(9, 1.1 + 0.205 * y), dpi=PIXELS, layout="constrained")
        axes = figure.subplots()
        axes.barh(ys, [min(w, end) for w in widths], height=0.86, color=[colors[kind] for kind in kinds])
        axes.hlines(ys, [min(low, end) for low, _ in spans], [min(high, end) for _, high in spans], color=_INK, lw=1)
        for at, note in zip(ys, notes, strict=True):
            axes.annotate(note, (end, at), xytext=(8, 0), textcoords="offset points", va="center", fontsize=8.5)
        axes.axvline(1, color=_INK, linewidth=1)
        axes.set_yticks([])
        for at, op, text in ticks:
            for shift, label, size, color in ((5, op, 10, _INK), (-5.5, text, 8, "#666666")):
                place: dict[str, Any] = {"xytext": (-6, shift), "textcoords": "offset points", "fontsize": size}
                axes.annotate(label, (0, at), ha="right", va="center", color=color, **place)
        axes.set_ylim(y - 0.7, -0.7)
        axes.set_xlim(0, end * 1.25)
        axes.set_xticks([tick for tick in axes.get_xticks() if tick <= end])
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}×"))
        cut = f" (cut at {end:g}×)" if longest > end else ""
        axes.set_xlabel(
            "time of the fastest peer over ours: right of 1×, ours is faster\n"
            f"bars: the size named; thin lines: from the least to the most over all sizes and options{cut}",
            fontsize=9,
        )
        present = [kind for kind in colors if kind in kinds]
        bars = [Patch(color=colors[kind]) for kind in present]
        figure.legend(
            bars, [texts[kind] for kind in present], loc="outside upper right", ncols=len(present), frameon=False
        )
    return figure


def save(figure: Figure, path: Path) -> None:
    """As PNG, the same bytes for the same rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", facecolor="white", metadata={"Software": None})
