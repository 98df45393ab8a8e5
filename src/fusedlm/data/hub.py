"""Datasets of the Hugging Face Hub, streamed at one commit."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fusedlm.data.errors import DataError
from fusedlm.data.pieces import Piece, pieces_of
from fusedlm.data.tables import content_of, optional

_STATES = 256  # rows between two places to go on from


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hugging Face Hub, streamed: nothing of it is kept. Needs the package datasets.

    revision: the commit, so that what is read cannot change; see `pinned`.
    """

    repository: str
    config: str | None = None
    hub_split: str = "train"
    key: str = "text"
    revision: str | None = None
    split: str | None = None
    ends: bool = True
    path: Path | None = field(default=None, init=False)

    def settings(self) -> dict[str, Any]:
        return {
            "repository": self.repository,
            "config": self.config,
            "hub_split": self.hub_split,
            "key": self.key,
            "revision": self.revision,
            "split": self.split,
            "ends": self.ends,
        }

    def read(self, place: Any = None) -> Iterator[Piece]:
        """place: what the library's stream gives to go on from, and the number of rows before it."""
        datasets = optional("datasets", "to read datasets of the Hugging Face Hub")
        what = f"{self.repository}{f' ({self.config})' if self.config else ''}, split {self.hub_split}"
        try:
            stream = datasets.load_dataset(
                self.repository, self.config, split=self.hub_split, revision=self.revision, streaming=True
            )
            row = 0
            if place:
                state, row = place
                stream.load_state_dict(state)
            for value in stream:
                row += 1
                state = [stream.state_dict(), row] if row % _STATES == 0 else None
                where = f"{what}, row {row}"
                yield from pieces_of(content_of(value, self.key, where), where, state, 0)
        except DataError:
            raise
        except Exception as error:  # of the library, of its HTTP library and of the readers of every format below it
            raise DataError(
                f"{what} cannot be read: {type(error).__name__}: {error}. Run again to go on where it stopped"
            ) from error


def pinned(source: HubDataset, *, endpoint: str | None = None) -> HubDataset:
    """The source with the commit that its revision is now. Raises DataError where the Hub does not say.

    endpoint: the Hub's address, where it is not huggingface_hub's default.
    """
    from huggingface_hub import HfApi, constants

    if source.revision is not None and len(source.revision) == 40:
        return source
    try:
        info = HfApi(endpoint=endpoint).dataset_info(source.repository, revision=source.revision, timeout=10)
    except Exception as error:  # the HTTP library under huggingface_hub changed twice, and has errors of its own
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(
            f"the dataset {source.repository} cannot be asked for at {endpoint or constants.ENDPOINT}: {first}. Check "
            "the name and the network; files that are on this disk can be given by path"
        ) from error
    return replace(source, revision=info.sha)
