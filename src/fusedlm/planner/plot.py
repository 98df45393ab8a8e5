"""A picture of where memory goes over context length. Needs matplotlib, which nothing else of the planner does."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from fusedlm.planner.memory import training_memory
from fusedlm.planner.plan import Plan
from fusedlm.planner.training import ACTIVATIONS, PARTS

# Okabe and Ito's palette, which colour-blind people tell apart.
_COLORS = {
    "weights": "#0072B2",
    "gradients": "#56B4E9",
    "masters": "#CC79A7",
    "optimizer": "#E69F00",
    "residual": "#00664A",
    "attention": "#009E73",
    "mlp": "#7FD1B9",
    "logits": "#D55E00",
    "workspace": "#999999",
}
_LABELS = {"optimizer": "moments", "logits": "logits, loss", **{kind: f"activations, {kind}" for kind in ACTIVATIONS}}
_INK = "#333333"
_POINTS = 48


def memory_figure(plan: Plan, name: str, longest: int | None = None) -> Any:
    """A matplotlib figure: memory at the peak of a step, by part, over context lengths at the plan's batch.

    Left in GiB, right as shares. name: of the model, for the title. longest: the last context length, by default four
    times the plan's. The model is planned as if its context were as long as need be (GPT-2's table of positions grows).
    Raises ValueError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a picture needs matplotlib, which is not installed: pip install 'fusedlm[plot]'") from None

    training, gpu = plan.training, plan.gpu
    end = longest or 4 * training.context
    contexts = sorted({max(1, end * i // _POINTS) for i in range(1, _POINTS + 1)})
    found = []
    for T in contexts:
        config = replace(plan.config, context_length=max(T, plan.config.context_length))
        found.append(training_memory(config, replace(training, context=T), gpu))
    parts = [{**memory.parts, **memory.activations} for memory in found]
    order = [kind for part in PARTS for kind in (ACTIVATIONS if part == "activations" else (part,))]
    shown = [part for part in order if any(sizes[part] for sizes in parts)]
    gib = [[sizes[part] / 2**30 for sizes in parts] for part in shown]
    shares = [[sizes[part] / memory.total for sizes, memory in zip(parts, found, strict=True)] for part in shown]

    figure = Figure(figsize=(11, 4.6), dpi=160, layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, values in ((left, gib), (right, shares)):
        axes.stackplot(contexts, values, colors=[_COLORS[part] for part in shown], labels=shown, linewidth=0)
        axes.axvline(training.context, color=_INK, linewidth=1, linestyle=":")
        axes.set_xlim(contexts[0], contexts[-1])
        axes.set_xlabel("context length, tokens")
        axes.set_xticks([end * i // 4 for i in range(1, 5)])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.spines[["top", "right"]].set_visible(False)
    top, size = max(memory.total for memory in found) / 2**30, gpu.memory / 2**30
    if size < 3 * top:
        left.axhline(size, color=_INK, linewidth=1.2, linestyle="--")
        text = f"{gpu.name}, {size:.0f} GiB"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        left.annotate(text, (0, size), (6, 6), ("axes fraction", "data"), "offset points", bbox=box)
        top = min(max(top, size), 1.5 * size)
    left.set_ylim(0, top * 1.1)
    left.set_ylabel("GiB at the peak of a training step")
    right.set_ylim(0, 1)
    right.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    right.set_ylabel("share of it")
    what = f"{training.batch} sequences a GPU, {training.dtype}, recompute {training.recompute}"
    here = f"{plan.memory.total / 2**30:.1f} GiB at {training.context:,} tokens"
    figure.suptitle(f"{name}: {what}: {here}", x=0.01, ha="left", fontsize=11)
    handles, _ = left.get_legend_handles_labels()
    names = [_LABELS.get(part, part) for part in shown]
    figure.legend(handles[::-1], names[::-1], loc="outside right upper", frameon=False)  # in the order of the stack
    return figure


def save_memory_figure(plan: Plan, name: str, path: Path) -> None:
    """The picture as a file of the kind that its name says (.png, .svg, .pdf). Raises ValueError for another."""
    figure = memory_figure(plan, name)
    known = sorted(figure.canvas.get_supported_filetypes())
    if path.suffix.lstrip(".").lower() not in known:
        raise ValueError(f"the picture is to be {path.name!r}; expected a name with one of .{', .'.join(known)}")
    figure.savefig(path, facecolor="white")
