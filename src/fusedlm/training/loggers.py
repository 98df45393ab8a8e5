"""The same records for TensorBoard and Weights & Biases. Each needs its package, which nothing else does."""

import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fusedlm.training.config import RunConfig
from fusedlm.training.metrics import Observer, Record


def loggers(config: RunConfig, folder: Path) -> list[Observer]:
    """Those that a run asks for. Raises ValueError where one is not installed."""
    found: list[Observer] = []
    if config.log.tensorboard:
        found.append(TensorBoard(folder / "tensorboard"))
    if config.log.wandb:
        found.append(WeightsAndBiases(config, folder))
    return found


class TensorBoard:
    """Scalars of every record."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                "log.tensorboard needs a package that is not installed: pip install 'fusedlm[tensorboard]'"
            ) from None
        self._folder, self._make = folder, SummaryWriter
        self._writer: Any = None

    def begin(self, run: Any, done: int) -> None:
        self._writer = self._make(str(self._folder), purge_step=done + 1 if done else None)

    def record(self, record: Record) -> None:
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record.step)

    def say(self, text: str) -> None:
        pass

    def sample(self, step: int, text: str) -> None:
        self._writer.add_text("sample", text, step)

    def end(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """A run of that name, which goes on when the run does."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        try:
            import wandb  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            raise ValueError("log.wandb needs a package that is not installed: pip install 'fusedlm[wandb]'") from None
        self._wandb, self._config, self._folder = wandb, config, folder
        self._run: Any = None

    def begin(self, run: Any, done: int) -> None:
        kept = self._folder / "wandb.id"  # names of folders repeat, ids must not
        if not kept.exists():
            kept.write_text(secrets.token_hex(8), encoding="ascii")
        self._run = self._wandb.init(
            project=self._config.log.wandb_project,
            name=self._folder.name,
            id=kept.read_text(encoding="ascii"),
            dir=str(self._folder),
            config=self._config.model_dump(),
            resume="allow",
        )

    def record(self, record: Record) -> None:
        self._run.log(_numbers(record), step=record.step)

    def say(self, text: str) -> None:
        pass

    def sample(self, step: int, text: str) -> None:
        self._run.log({"sample": self._wandb.Html(f"<pre>{text}</pre>")}, step=step)

    def end(self) -> None:
        if self._run is not None:
            self._run.finish()


def _numbers(record: Record) -> dict[str, float]:
    return {name: value for name, value in asdict(record).items() if value is not None and name != "step"}
