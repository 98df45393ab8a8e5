"""Batches for training, a function of the dataset, the seed and the step alone; and a split once, for evaluation.

Nothing is remembered between batches. So a run that goes on at step s sees what the uninterrupted one saw, and the rows
of all ranks together are the same however many ranks, and however many micro-batches a step, there are.
"""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from fusedlm.data.dataset import Dataset
from fusedlm.data.permutation import permuted, raw_numbers
from fusedlm.data.rows import Batch, Documents, Rows, rows_of

Order = Literal["random", "shuffled"]


class Loader:
    """Batches of one split.

    batch_size: rows a step, of all ranks together. context: T, tokens a row. order: "random" draws each row anew,
    beginning at any token (as nanoGPT does); "shuffled" goes through all rows of the split in an order that each epoch
    shuffles anew, every row once; a batch may have the end of one epoch and the beginning of the next.
    documents: "joined" reads the split as one stream; "separate" too, but marks where documents begin, for attention
    within them, and has no targets across; "packed" fills rows with whole documents, best for chats. None: "packed" for
    chats, else "joined". rank, world_size: this process gets rows rank * B / world_size on, of the B of a step.
    micro_batches: parts in which a rank takes the rows of a step.

    In order "shuffled", joined or separate, the tokens behind the last whole row (fewer than T) are not seen.
    Raises ValueError for sizes that do not divide, DataError for a split that is not there or too small.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        context: int,
        seed: int,
        split: str = "train",
        order: Order = "random",
        documents: Documents | None = None,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 1,
    ) -> None:
        if order not in ("random", "shuffled"):
            raise ValueError(f"order is {order!r}; expected random or shuffled")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed is {seed}; expected 0 to 2**64 - 1")
        _check_rank(rank, world_size)
        if batch_size < 1 or micro_batches < 1 or batch_size % (world_size * micro_batches):
            raise ValueError(
                f"batch_size is {batch_size}; expected a multiple of world_size * micro_batches, {world_size} * "
                f"{micro_batches}, both 1 or more"
            )
        self._rows: Rows = rows_of(dataset.split(split), context, documents)
        self._order = order
        self._seed = seed
        self._batch_size = batch_size
        self._rank = rank
        self._micro_batches = micro_batches
        self._share = batch_size // world_size // micro_batches
        self.steps_per_epoch = self._rows.n_rows / batch_size
        self.signature: dict[str, Any] = {
            "dataset": dataset.fingerprint,
            "split": split,
            "batch_size": batch_size,
            "context": context,
            "seed": seed,
            "order": order,
            "documents": documents or ("packed" if dataset.split(split).has_mask else "joined"),
        }
        """All that decides what `batch` gives, ranks aside: a run keeps it, and compares it when it goes on."""

    def batch(self, step: int, micro_batch: int = 0) -> Batch:
        """This rank's rows of a step (counted from 0), or the part of them that is a micro-batch: share * T tokens.

        Raises ValueError for a step below 0 and a micro-batch that there is not, DataError where a shard has changed.
        """
        if step < 0 or not 0 <= micro_batch < self._micro_batches:
            raise ValueError(
                f"step {step} and micro-batch {micro_batch} are asked for; expected 0 or more, and 0 to "
                f"{self._micro_batches - 1}"
            )
        first = (self._rank * self._micro_batches + micro_batch) * self._share
        return self._drawn(step, first) if self._order == "random" else self._shuffled(step, first)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """All micro-batches of steps start to stop, in order; without stop they never end."""
        step = start
        while stop is None or step < stop:
            for micro_batch in range(self._micro_batches):
                yield self.batch(step, micro_batch)
            step += 1

    def _drawn(self, step: int, first: int) -> Batch:
        numbers = raw_numbers(self._seed, step, 0, first + self._share)[first:]
        # Times n, over 2^64: even to within n / 2^64.
        return self._rows.batch_at([number * self._rows.n_places >> 64 for number in numbers])

    def _shuffled(self, step: int, first: int) -> Batch:
        n = self._rows.n_rows
        index = step * self._batch_size + first + np.arange(self._share, dtype=np.int64)
        rows = np.empty_like(index)
        for epoch in range(int(index[0]) // n, int(index[-1]) // n + 1):
            here = index // n == epoch
            rows[here] = permuted(index[here] % n, n, self._seed, epoch)
        return self._rows.batch(rows.tolist())


class Evaluation:
    """A split once, in fixed rows: every token but the first is a target exactly once.

    Rows are those of Loader, in their order; the last has -100 behind the split's end. Each rank gets as many batches
    as every other, all of batch_size rows; rows that are too many have no targets. Documents kept apart, their first
    tokens are no targets; of chats, answers alone are.
    batch_size: rows a batch, of this rank.
    Raises ValueError and DataError as Loader does.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        context: int,
        split: str = "val",
        documents: Documents | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check_rank(rank, world_size)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
        self._rows: Rows = rows_of(dataset.split(split), context, documents, whole=False)
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size

    def __len__(self) -> int:
        """Batches of each rank."""
        return -(-self._rows.n_rows // (self._batch_size * self._world_size))

    def __iter__(self) -> Iterator[Batch]:
        for i in range(len(self)):
            first = (i * self._world_size + self._rank) * self._batch_size
            rows = range(first, first + self._batch_size)
            yield self._rows.batch([row if row < self._rows.n_rows else -1 for row in rows])


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} of {world_size}; expected 0 to world_size - 1")
