"""What a run tells while it goes on: rows of metrics.csv, and the same for whoever else listens."""

import csv
import io
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from fusedlm.tokenizer.files import write_text

METRICS_FILE = "metrics.csv"
_SAMPLE = re.compile(r"^--- step (\d+)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Record:
    """Some steps, or an evaluation.

    step: steps done. tokens: trained on so far. seconds: of training so far, without pauses. loss: the mean of the
    steps since the last record; norm: of the last one's gradients. mfu: the share of the GPU's peak, where that is
    known. memory: GiB, the highest so far, on a GPU what torch allocated. skipped: steps that changed nothing, in all.
    val_loss: of an evaluation, which has no loss.
    """

    step: int
    tokens: int
    seconds: float
    loss: float | None = None
    val_loss: float | None = None
    lr: float | None = None
    norm: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    memory: float | None = None
    skipped: int | None = None


COLUMNS = tuple(field.name for field in fields(Record))


class Observer(Protocol):
    """Whoever wants to hear of a run; all of it happens between steps, on the first rank."""

    def begin(self, run: Any, done: int) -> None:
        """run: the trainer. done: steps of an earlier part of this run."""
        ...

    def record(self, record: Record) -> None: ...

    def say(self, text: str) -> None:
        """A line for people: a checkpoint that was saved, a step that was skipped."""
        ...

    def sample(self, step: int, text: str) -> None:
        """What the model wrote."""
        ...

    def end(self) -> None:
        """The run is over, or was interrupted, or failed."""
        ...


class MetricsFile:
    """metrics.csv of a run, and samples.txt. One that goes on continues them behind the step it goes on from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._samples = path.with_name("samples.txt")
        self._file: io.TextIOWrapper | None = None

    def begin(self, run: Any, done: int) -> None:
        kept = run.earlier if done else []
        write_text(self.path, "".join(map(_line, [COLUMNS, *map(_values, kept)])))
        self._file = self.path.open("a", encoding="utf-8", newline="")
        self._cut_samples(done)

    def _cut_samples(self, done: int) -> None:
        """What later steps wrote, which are done once more."""
        if not self._samples.exists():
            return
        text = self._samples.read_text(encoding="utf-8")
        for found in _SAMPLE.finditer(text):
            if int(found[1]) > done:
                write_text(self._samples, text[: found.start()])
                break

    def record(self, record: Record) -> None:
        assert self._file is not None
        self._file.write(_line(_values(record)))
        self._file.flush()

    def say(self, text: str) -> None:
        pass

    def sample(self, step: int, text: str) -> None:
        with self._samples.open("a", encoding="utf-8") as file:
            file.write(f"--- step {step}\n{text}\n")

    def end(self) -> None:
        if self._file is not None:
            self._file.close()


def read_metrics(path: Path) -> list[Record]:
    """The rows of a metrics.csv, less a last line that a crash has cut. Raises ValueError for another file."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    if not rows or tuple(rows[0]) != COLUMNS:
        raise ValueError(f"{path} does not begin with the columns {', '.join(COLUMNS)}")
    kinds = {"step": int, "tokens": int, "skipped": int}
    records = []
    for row in rows[1:]:
        if len(row) == len(COLUMNS):
            given = ((name, text) for name, text in zip(COLUMNS, row, strict=True) if text)
            try:
                values: dict[str, Any] = {name: kinds.get(name, float)(text) for name, text in given}
            except ValueError:
                raise ValueError(f"{path} has the line {','.join(row)!r}; expected numbers") from None
            records.append(Record(**values))
    return records


def _values(record: Record) -> list[str]:
    values = (getattr(record, name) for name in COLUMNS)
    return ["" if value is None else f"{value:.9g}" if isinstance(value, float) else str(value) for value in values]


def _line(values: Any) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()
