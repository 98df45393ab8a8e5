"""The loss curve of a run as a picture. Needs matplotlib, which nothing else of the trainer does."""

from collections.abc import Sequence
from pathlib import Path

from fusedlm.training.metrics import Record


def save_curve(records: Sequence[Record], path: Path, title: str) -> None:
    """Draw both losses over steps, and the learning rate below. Raises ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a loss curve needs matplotlib, which is not installed: pip install 'fusedlm[plot]'") from None
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    train = [(r.step, r.loss) for r in records if r.loss is not None]
    val = [(r.step, r.val_loss) for r in records if r.val_loss is not None]
    if train:
        above.plot(*zip(*train, strict=True), color="#56B4E9", linewidth=1, label="train")
    if val:
        above.plot(*zip(*val, strict=True), color="#0072B2", marker="o", markersize=3, label="val")
        best = min(val, key=lambda point: point[1])
        above.annotate(f"{best[1]:.4f}", best, textcoords="offset points", xytext=(0, 8), ha="center", fontsize=8)
    rates = [(r.step, r.lr) for r in records if r.lr is not None]
    if rates:
        below.plot(*zip(*rates, strict=True), color="#E69F00", linewidth=1)
    above.set_ylabel("loss, nats a token")
    above.set_title(title, loc="left", fontsize=10)
    if train or val:
        above.legend(frameon=False)
    below.set_ylabel("lr")
    below.set_xlabel("steps")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    figure.savefig(path)
