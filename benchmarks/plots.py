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

from benchmarks.tables import Row, grouped, option_texts, share, sizes_of

# Okabe and Ito's palette, which colour-blind people tell apart; markers differ too.
STYLES: dict[str, dict[str, Any]] = {
    "fusedlm": {"color": "#D55E00", "marker": "o", "linewidth": 2.4, "zorder": 5},
    "torch": {"color": "#0072B2", "marker": "s"},
    "compile": {"color": "#009E73", "marker": "^"},
    "liger": {"color": "#AA6FB0", "marker": "D"},
}
NAMES = {"compile": "torch.compile", "liger": "Liger", "torch": "torch"}
DIRECTIONS = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
LONGEST_BAR = 3.0  # of the summary
UPRIGHT = 8  # labels of sizes that stand side by side; more are turned
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
    """A line for each variant over sizes that stand side by side."""
    for name, ys in values.items():
        style = {"linewidth": 1.5, "markersize": 5, **STYLES.get(name, {"color": "#888888"})}
        at = [i for i, y in enumerate(ys) if y is not None]
        axes.plot(at, [y for y in ys if y is not None], label=NAMES.get(name, name), clip_on=False, **style)
    many = len(labels) > UPRIGHT
    axes.set_xticks(range(len(labels)), labels, fontsize=7 if many else 8, rotation=90 if many else 0)
    axes.set_xlim(-0.25, len(labels) - 0.75)
    axes.grid(axis="y", color=_PALE, linewidth=0.8)
    axes.set_axisbelow(True)


def _panels(rows: Iterable[Row]) -> dict[str, list[tuple[Row, dict[str, Row]]]]:
    """What goes into one pair of panels, by its title: a direction, and an option where shapes have some."""
    panels: dict[str, list[tuple[Row, dict[str, Row]]]] = {}
    for ours, peers in grouped(rows):
        title = ", ".join((DIRECTIONS[ours["direction"]], *option_texts(ours["shape"])))
        panels.setdefault(title, []).append((ours, peers))
    for groups in panels.values():
        groups.sort(key=lambda group: math.prod(sizes_of(group[0]["shape"]).values()))
    return {title: panels[title] for title in sorted(panels, key=lambda t: not t.startswith("forward"))}


def op_figure(op: str, rows: Iterable[Row]) -> Figure:
    """For each direction (and option) two panels: the time, and the share of what limits it, over size."""
    panels = _panels(row for row in rows if row["op"] == op)
    with matplotlib.rc_context(_RC):
        height = 2.75 if max(len(groups) for groups in panels.values()) <= UPRIGHT else 3.5
        figure = Figure(figsize=(9, 0.6 + height * len(panels)), dpi=PIXELS, layout="constrained")
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
                left.yaxis.set_major_formatter(FuncFormatter(_plain))
            else:
                left.set_ylim(0, max(every) * 1.08)
            left.set_ylabel(f"time, {unit}")
            top = max(s for ss in shares.values() for s in ss if s is not None)
            right.set_ylim(0, max(1.05, top * 1.03))
            right.axhline(1, color=_INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            right.set_ylabel(f"share of {limit}")
            for axes in (left, right):
                axes.set_xlabel(" × ".join(names), fontsize=8)
            left.set_title(f"{op}, {title}", loc="left", fontsize=11, fontweight="bold")
        handles = {h.get_label(): h for row in grid for h in reversed(row[0].get_lines())}
        figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=len(handles), frameon=False)
    return figure


def representative(groups: Iterable[tuple[Row, dict[str, Row]]]) -> list[tuple[Row, dict[str, Row]]]:
    """Of every op and direction one size: the middle one of those it lists first (of those with its first option)."""
    panels: dict[tuple[str, str], list[tuple[Row, dict[str, Row]]]] = {}
    for ours, peers in groups:
        if peers:
            panels.setdefault((ours["op"], ours["direction"]), []).append((ours, peers))
    chosen = []
    for found in panels.values():
        options = option_texts(found[0][0]["shape"])
        alike = [group for group in found if option_texts(group[0]["shape"]) == options]
        chosen.append(alike[len(alike) // 2])
    return chosen


def summary_figure(rows: Iterable[Row]) -> Figure:
    """The best peer's time over ours, a bar an op and direction, at one size each."""
    every = grouped(rows)
    chosen = representative(every)
    ops = list(dict.fromkeys(ours["op"] for ours, _ in chosen))
    colors = {"forward": "#E69F00", "backward": "#0072B2", "both": "#009E73"}
    ticks, ys, widths, notes, kinds = [], [], [], [], []
    y = 0.0
    for op in ops:
        mine = [(ours, peers) for ours, peers in chosen if ours["op"] == op]
        label = _short_label(mine[0][0]["shape"], [ours["shape"] for ours, _ in every if ours["op"] == op])
        ticks.append((y + (len(mine) - 1) / 2, op, label))
        for ours, peers in mine:
            best = min(peers, key=lambda name: peers[name]["seconds"])
            ratio = peers[best]["seconds"] / ours["seconds"]
            ys.append(y)
            widths.append(ratio)
            kinds.append(ours["direction"])
            notes.append(f"{ratio:.2f}× {NAMES.get(best, best)}")
            y += 1
        y += 0.7
    end = min(max(widths), LONGEST_BAR)
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(9, 1.0 + 0.235 * y), dpi=PIXELS, layout="constrained")
        axes = figure.subplots()
        axes.barh(ys, [min(w, end) for w in widths], height=0.86, color=[colors[kind] for kind in kinds])
        for at, width, note in zip(ys, widths, notes, strict=True):
            tip = (min(max(width, 1), end), at)  # never on the line
            axes.annotate(note, tip, xytext=(5, 0), textcoords="offset points", va="center", fontsize=8.5)
        axes.axvline(1, color=_INK, linewidth=1)
        axes.set_yticks([])
        for at, op, text in ticks:
            for shift, label, size, color in ((5, op, 10, _INK), (-6, text, 8, "#777777")):
                place: dict[str, Any] = {"xytext": (-6, shift), "textcoords": "offset points", "fontsize": size}
                axes.annotate(label, (0, at), ha="right", va="center", color=color, **place)
        axes.set_ylim(y - 0.7, -0.7)
        axes.set_xlim(0, end * 1.22)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}×"))
        cut = f" (bars end at {end:g}×)" if max(widths) > end else ""
        axes.set_xlabel(f"time of the fastest peer over ours: right of the line, ours is faster{cut}")
        present = [kind for kind in colors if kind in kinds]
        bars = [Patch(color=colors[kind]) for kind in present]
        figure.legend(
            bars, [DIRECTIONS[kind] for kind in present], loc="outside upper right", ncols=len(present), frameon=False
        )
    return figure


def save(figure: Figure, path: Path) -> None:
    """As PNG, the same bytes for the same rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", facecolor="white", metadata={"Software": None})
