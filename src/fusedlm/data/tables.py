"""Documents in rows: JSONL and parquet."""

import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedlm.data.errors import DataError
from fusedlm.data.files import opened, unreadable
from fusedlm.data.pieces import Content, Piece, pieces_of


@dataclass(frozen=True)
class _Rows:
    """A file of rows, each of which has a document at `key`: a text, or of a chat the messages."""

    path: Path
    key: str = "text"
    split: str | None = None
    ends: bool = True

    def settings(self) -> dict[str, Any]:
        return {"path": str(self.path), "key": self.key, "split": self.split, "ends": self.ends}


class JsonLines(_Rows):
    """A document a line, also compressed (.gz): an object that has it at `key`."""

    def read(self, place: Any = None) -> Iterator[Piece]:
        """place: the byte behind the line, and the number of the line that begins there."""
        offset, number = place or (0, 1)
        with opened(self.path) as (file, raw):
            try:
                file.seek(offset)
                for line in file:
                    offset += len(line)
                    where = f"{self.path}, line {number}"
                    number += 1
                    if line.strip():
                        try:
                            row = json.loads(line)
                        except (ValueError, RecursionError) as error:
                            raise DataError(f"{where}, is not JSON: {error}") from None
                        yield from pieces_of(content_of(row, self.key, where), where, [offset, number], raw.tell())
            except (OSError, EOFError) as error:
                raise unreadable(self.path, error) from None


class Parquet(_Rows):
    """A document a row, in the column `key`. Needs pyarrow."""

    def read(self, place: Any = None) -> Iterator[Piece]:
        """place: the number of the next row."""
        parquet = optional("pyarrow.parquet", "to read parquet files")
        skip, row = place or 0, 0
        size = self.path.stat().st_size
        try:
            with parquet.ParquetFile(self.path) as file:
                if self.key not in file.schema_arrow.names:
                    raise DataError(f"{self.path} has no column {self.key!r}; there are {file.schema_arrow.names}")
                rows = max(1, file.metadata.num_rows)
                for group in range(file.num_row_groups):
                    behind = row + file.metadata.row_group(group).num_rows
                    if behind <= skip:
                        row = behind
                        continue
                    for batch in file.iter_batches(1024, row_groups=[group], columns=[self.key]):
                        if row + batch.num_rows <= skip:
                            row += batch.num_rows
                            continue
                        for value in batch.column(0).to_pylist():
                            row += 1
                            if row > skip:
                                where = f"{self.path}, row {row}"
                                content = content_of({self.key: value}, self.key, where)
                                yield from pieces_of(content, where, row, size * row // rows)
        except (OSError, optional("pyarrow", "to read parquet files").ArrowException) as error:
            raise unreadable(self.path, error) from None


def content_of(row: Any, key: str, where: str) -> Content:
    """A row's document. Raises DataError for what is no row or holds none there; where: how the error names it."""
    if not isinstance(row, dict) or key not in row:
        found = f"the keys {sorted(map(str, row))}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise DataError(f"{where}, has {found}; expected an object with {key!r}")
    value = row[key]
    if not isinstance(value, str | list):
        raise DataError(f"{where}: {key} is {value!r:.80}; expected text, or a list of messages")
    return value


def optional(module: str, purpose: str) -> Any:
    """A module of the extra `data`. Raises DataError, which says how to install it, where it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise DataError(
            f"the package {package} is needed {purpose}, and cannot be imported ({error}); "
            "install it with: pip install 'fusedlm[data]'"
        ) from None
