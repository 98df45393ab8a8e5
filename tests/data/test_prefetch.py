import threading
import time
from collections.abc import Callable, Iterator
from itertools import count

import pytest
import torch

from fusedlm.data.dataset import Dataset
from fusedlm.data.loader import Loader
from fusedlm.data.prefetch import Prefetch
from fusedlm.data.rows import Batch


def batch(i: int) -> Batch:
    return Batch(torch.full((2, 3), i), torch.full((2, 3), -i))


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_the_same_batches_in_the_same_order(characters_dataset: Callable[..., Dataset]) -> None:
    loader = Loader(characters_dataset(["some text"] * 30), batch_size=4, context=8, seed=0)
    with Prefetch(loader.batches(3, 60), "cpu", ahead=3) as prefetch:
        found = [b.tokens.tolist() for b in prefetch]
    assert found == [loader.batch(step).tokens.tolist() for step in range(3, 60)]
    assert threads() == []


@pytest.mark.parametrize("ahead", [1, 4])
def test_no_more_than_asked_for_are_made_ahead(ahead: int) -> None:
    made: list[int] = []

    def batches() -> Iterator[Batch]:
        for i in count():
            made.append(i)
            yield batch(i)

    with Prefetch(batches(), "cpu", ahead=ahead) as prefetch:
        for i in range(20):
            assert int(next(prefetch).tokens[0, 0]) == i
            assert len(made) <= i + 1 + ahead + 2  # those that wait, the one in hand, and one on its way
    assert threads() == []


def test_an_error_comes_where_its_batch_would_be() -> None:
    def batches() -> Iterator[Batch]:
        yield from (batch(0), batch(1))
        raise ValueError("the disk is gone")

    with Prefetch(batches(), "cpu") as prefetch:
        assert [int(next(prefetch).tokens[0, 0]) for _ in range(2)] == [0, 1]
        with pytest.raises(ValueError, match="the disk is gone"):
            next(prefetch)
        with pytest.raises(StopIteration):
            next(prefetch)
    assert threads() == []


def test_closing_early_ends_the_thread_whether_it_waits_or_works() -> None:
    for pause in (0.0, 0.05):

        def batches(pause: float = pause) -> Iterator[Batch]:
            for i in count():
                time.sleep(pause)
                yield batch(i)

        prefetch = Prefetch(batches(), "cpu", ahead=1)
        next(prefetch)
        start = time.monotonic()
        prefetch.close()
        assert time.monotonic() - start < 2
        assert threads() == []
        prefetch.close()
        with pytest.raises(StopIteration):
            next(prefetch)


def test_an_end_stays_the_end() -> None:
    prefetch = Prefetch([batch(7)], "cpu")
    assert [int(b.targets[0, 0]) for b in prefetch] == [-7]
    assert list(prefetch) == []
    assert threads() == []
    with pytest.raises(ValueError, match="ahead is 0"):
        Prefetch([], "cpu", ahead=0)
