"""The results as a bar chart: tokens a second of each model and precision, ours beside the peers'."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind people tell apart.
_COLOURS = {"fusedlm": "#D55E00", "llama.cpp": "#0072B2", "transformers": "#999999"}


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Put `decode_figure` into a PNG."""
    decode_figure(rows).savefig(path)


def decode_figure(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """One panel a model, one group of bars a precision; needs matplotlib."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(9, 3.6), dpi=160, layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        here = [row for row in rows if row["model"] == model]
        place, ticks = 0.0, []
        for precision in dict.fromkeys(row["precision"] for row in here):
            group = [row for row in here if row["precision"] == precision]
            for row in group:
                speed, family = 1 / row["token_seconds"], row["runner"].split()[0].rstrip(",")
                axes.barh(place, speed, color=_COLOURS.get(family, "#666666"))
                axes.text(speed, place, f" {speed:.0f}", va="center", fontsize=8)
                ticks.append((place, f"{row['runner']}, {precision}" if family == "fusedlm" else row["runner"]))
                place -= 1
            place -= 0.5
        axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=8)
        axes.set_title(model, fontsize=10)
        axes.set_xlabel("tokens a second, batch 1", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12)
    return figure
