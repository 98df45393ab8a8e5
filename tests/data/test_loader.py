import json
import math
import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusedlm.data.dataset import Dataset
from fusedlm.data.documents import find_sources
from fusedlm.data.errors import DataError
from fusedlm.data.loader import Evaluation, Loader
from fusedlm.data.permutation import permuted, raw_numbers
from fusedlm.data.prepare import prepare
from fusedlm.data.rows import Batch
from fusedlm.tokenizer.bpe import BPETokenizer

Build = Callable[..., Dataset]

TEXTS = ["the first", "b", "a text that is longer than a row", "two", "", "and the last of them all, in the end"] * 5


def stream(dataset: Dataset, split: str = "train") -> list[int]:
    """A split's tokens, read without ours."""
    return [id for path in sorted(dataset.folder.glob(f"{split}_*.bin")) for id in np.fromfile(path, "<u2").tolist()]


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True)) and a.longest == b.longest


def rows(batches: list[Batch]) -> list[tuple[list[int], list[int]]]:
    return [(t.tolist(), y.tolist()) for batch in batches for t, y in zip(batch.tokens, batch.targets, strict=True)]


# The permutation


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 4095, 4097, 100_003])
def test_a_permutation_takes_every_number_once(n: int) -> None:
    for seed, epoch in ((0, 0), (2**64 - 1, 7)):
        assert sorted(permuted(np.arange(n), n, seed, epoch).tolist()) == list(range(n))


def test_a_permutation_of_very_many_numbers() -> None:
    n = 10**15 + 7
    index = np.array([0, 1, 2, 10**9, n - 1])
    sent = permuted(index, n, 3, 0)
    assert len(set(sent.tolist())) == 5
    assert sent.min() >= 0
    assert sent.max() < n
    assert all(permuted(index[i : i + 1], n, 3, 0)[0] == sent[i] for i in range(5))  # each alone, too


def test_permutations_look_random() -> None:
    """Where 0 goes is even over seeds and epochs, and neighbours do not stay neighbours: to 5 standard deviations."""
    n, draws = 10, 5000
    for seeds, epochs in ((range(draws), [0]), ([0], range(draws))):
        counts = Counter(int(permuted(np.array([0]), n, seed, epoch)[0]) for seed in seeds for epoch in epochs)
        assert all(abs(counts[i] - draws / n) < 5 * math.sqrt(draws / n) for i in range(n))
    n = 10_000
    p = permuted(np.arange(n), n, 1, 0)
    assert sum(abs(int(a) - int(b)) == 1 for a, b in pairwise(p)) < 12  # 2 are expected
    assert sum(int(p[i]) == i for i in range(n)) < 10  # 1 is expected
    assert abs(float(np.corrcoef(p, np.arange(n))[0, 1])) < 5 / math.sqrt(n)


def test_numbers_stay_what_they_were() -> None:
    """Another order of batches would end the promise that a run goes on where it was: it takes a new version."""
    assert raw_numbers(0, 0, 0, 2) == [213000021201967259, 4455796210202625458]
    assert permuted(np.arange(10), 10, 0, 0).tolist() == [3, 8, 0, 1, 7, 4, 9, 6, 2, 5]


def test_raw_numbers_are_philox() -> None:
    """Salmon et al. give the words of the zero counter and key; numpy counts up before it draws, so begin at -1."""
    bits = np.random.Philox(key=np.zeros(2, np.uint64), counter=np.full(4, 2**64 - 1, np.uint64))
    assert [f"{int(word):016x}" for word in bits.random_raw(2)] == ["16554d9eca36314c", "db20fe9d672d0fdc"]
    assert raw_numbers(5, 6, 0, 9)[:4] == raw_numbers(5, 6, 0, 4)
    seen = {tuple(raw_numbers(*key, 2)) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}
    assert len(seen) == 4


# Batches of a stream


def test_random_rows_are_of_the_stream_and_begin_anywhere(characters_dataset: Build) -> None:
    dataset = characters_dataset(["".join(random.Random(0).choices("abcdefghijkl", k=200))], shard_tokens=37)
    ids, T = stream(dataset), 5
    loader = Loader(dataset, batch_size=50, context=T, seed=1)
    windows: dict[tuple[int, ...], set[int]] = {}
    for i in range(len(ids) - T):
        windows.setdefault(tuple(ids[i : i + T + 1]), set()).add(i)
    assert windows[tuple(ids[-T - 1 :])] == {len(ids) - T - 1}
    seen = Counter[tuple[int, ...]]()
    for step in range(200):
        batch = loader.batch(step)
        assert (batch.tokens.dtype, batch.tokens.shape, batch.positions) == (torch.int64, (50, T), None)
        for tokens, targets in rows([batch]):
            assert tokens[1:] == targets[:-1]
            seen[(*tokens, targets[-1])] += 1
    assert seen.keys() == windows.keys()  # the first and the last among them
    expected = 10_000 / (len(ids) - T)
    for window, places in windows.items():
        mean = expected * len(places)
        assert abs(seen[window] - mean) < 5 * math.sqrt(mean)


@pytest.mark.parametrize("order", ["random", "shuffled"])
@pytest.mark.parametrize("documents", ["joined", "separate", "packed"])
def test_a_batch_depends_on_seed_and_step_alone(characters_dataset: Build, order: Any, documents: Any) -> None:
    dataset = characters_dataset(TEXTS, shard_tokens=37)

    def loader(seed: int = 1) -> Loader:
        return Loader(dataset, batch_size=4, context=7, seed=seed, order=order, documents=documents)

    straight = [loader().batch(step) for step in range(40)]
    one = loader()
    for step in (39, 0, 17, 17, 3):
        assert same(one.batch(step), straight[step])
    resumed = list(
        Loader(Dataset(dataset.folder), batch_size=4, context=7, seed=1, order=order, documents=documents).batches(
            11, 40
        )
    )
    assert all(same(a, b) for a, b in zip(resumed, straight[11:], strict=True))
    assert not all(same(a, loader(2).batch(step)) for step, a in enumerate(straight[:5]))
    assert not same(straight[0], straight[1])


@pytest.mark.parametrize("order", ["random", "shuffled"])
@pytest.mark.parametrize("documents", ["joined", "separate", "packed"])
@pytest.mark.parametrize(("world_size", "micro_batches"), [(1, 3), (2, 1), (3, 2), (12, 1)])
def test_all_ranks_together_see_what_one_sees(
    characters_dataset: Build, order: Any, documents: Any, world_size: int, micro_batches: int
) -> None:
    dataset = characters_dataset(TEXTS, shard_tokens=37)
    settings: dict[str, Any] = {"batch_size": 12, "context": 7, "seed": 3, "order": order, "documents": documents}
    alone = Loader(dataset, **settings)
    ranks = [
        Loader(dataset, **settings, rank=rank, world_size=world_size, micro_batches=micro_batches)
        for rank in range(world_size)
    ]
    for step in range(12):
        parts = [rank.batch(step, micro) for rank in ranks for micro in range(micro_batches)]
        assert {len(part.tokens) for part in parts} == {12 // world_size // micro_batches}
        assert rows(parts) == rows([alone.batch(step)])
    assert [rank.signature for rank in ranks] == [alone.signature] * world_size
    several = list(ranks[0].batches(2, 4))
    assert len(several) == 2 * micro_batches
    assert same(several[-1], ranks[0].batch(3, micro_batches - 1))


@pytest.mark.parametrize("batch_size", [1, 4, 7, 1000])
def test_an_epoch_shows_every_row_once(characters_dataset: Build, batch_size: int) -> None:
    dataset = characters_dataset(TEXTS, shard_tokens=37)
    ids, T = stream(dataset), 4
    n = (len(ids) - 1) // T
    windows = Counter(tuple(ids[i * T : i * T + T + 1]) for i in range(n))
    loader = Loader(dataset, batch_size=batch_size, context=T, seed=5, order="shuffled")
    assert loader.steps_per_epoch == n / batch_size
    seen = [(*tokens, targets[-1]) for tokens, targets in rows(list(loader.batches(0, math.ceil(3 * n / batch_size))))]
    epochs = [seen[i * n : (i + 1) * n] for i in range(3)]
    assert all(Counter(epoch) == windows for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def apart_by_hand(ids: list[int], begins: set[int], place: int, T: int) -> tuple[list[int], list[int], list[int]]:
    """Targets, positions and begins of sequences of the row at a place, a token at a time."""
    targets, positions, sequences = [], [], []
    for i in range(place, place + T):
        starts = i == place or i in begins
        if starts:
            sequences.append(i - place)
        positions.append(0 if starts else positions[-1] + 1)
        targets.append(-100 if i + 1 in begins else ids[i + 1])
    return targets, positions, sequences


@pytest.mark.parametrize("T", [1, 2, 7, 40])
def test_separate_documents_by_hand(characters_dataset: Build, T: int) -> None:
    texts = [text for text in TEXTS if text]
    dataset = characters_dataset(texts, shard_tokens=37)
    ids = stream(dataset)
    begins = {sum(map(len, texts[:i])) for i in range(len(texts))}
    loader = Loader(dataset, batch_size=3, context=T, seed=5, order="shuffled", documents="separate")
    joined = Loader(dataset, batch_size=3, context=T, seed=5, order="shuffled")
    n = (len(ids) - 1) // T
    places = permuted(np.arange(n), n, 5, 0) * T
    for step in range(n // 3):
        batch = loader.batch(step)
        assert torch.equal(batch.tokens, joined.batch(step).tokens)
        truth = [apart_by_hand(ids, begins, int(place), T) for place in places[3 * step : 3 * step + 3]]
        assert batch.positions is not None
        assert batch.sequence_ends is not None
        assert batch.targets.tolist() == [targets for targets, _, _ in truth]
        assert batch.positions.tolist() == [positions for _, positions, _ in truth]
        ends = [b * T + begin for b, (_, _, sequences) in enumerate(truth) for begin in sequences] + [3 * T]
        assert (batch.sequence_ends.dtype, batch.sequence_ends.tolist()) == (torch.int32, ends)
        assert batch.longest == max(b - a for a, b in pairwise(ends))


# Rows packed with whole documents


@pytest.mark.parametrize("T", [1, 3, 8, 35, 100])
def test_packed_documents_are_whole_and_there_once(characters_dataset: Build, T: int) -> None:
    texts = [text for text in TEXTS if text]
    dataset = characters_dataset(texts, shard_tokens=37)
    decode = dataset.tokenizer().decode
    wanted = Counter[tuple[str, str]]()
    for text in texts:
        for begin in range(0, len(text) - 1, T):
            part = text[begin : begin + T + 1]
            wanted[part[:-1], part[1:]] += 1
    seen = Counter[tuple[str, str]]()
    batches = list(Evaluation(dataset, split="train", batch_size=2, context=T, documents="packed"))
    for batch in batches:
        assert batch.sequence_ends is not None
        assert batch.positions is not None
        tokens, targets = batch.tokens.flatten().tolist(), batch.targets.flatten().tolist()
        ends = batch.sequence_ends.tolist()
        assert (ends[0], ends[-1]) == (0, 2 * T)
        assert set(range(0, 2 * T, T)) <= set(ends)  # none goes from one row to the next
        assert batch.longest == max(b - a for a, b in pairwise(ends))
        for a, b in pairwise(ends):
            assert batch.positions.flatten()[a:b].tolist() == list(range(b - a))
            if targets[a] == -100:  # what fills a row
                assert set(targets[a:b]) == {-100}
            else:
                seen[decode(tokens[a:b]), decode(targets[a:b])] += 1
    assert seen == wanted


def test_packing_is_best_fit_from_the_longest_on(characters_dataset: Build) -> None:
    rng = random.Random(0)
    lengths = [rng.randint(1, 12) for _ in range(60)]
    dataset = characters_dataset(["x" * (length + 1) for length in lengths])
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(12 - length)
    batch = next(iter(Evaluation(dataset, split="train", batch_size=len(rooms), context=12, documents="packed")))
    assert sorted((batch.targets == -100).sum(1).tolist()) == sorted(rooms)


@pytest.mark.parametrize("documents", [None, "packed", "joined"])
def test_of_chats_answers_alone_are_targets(
    tmp_path: Path, chat_tokenizer: Callable[[], BPETokenizer], documents: Any
) -> None:
    tokenizer = chat_tokenizer()
    chats = [("Hi", "Yes."), ("What is it?", "It is a very long answer " * 3), ("?", "No")]
    lines = [
        json.dumps({"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]})
        for a, b in chats
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    sources = find_sources([tmp_path / "chats.jsonl"], key="messages")
    prepare(sources, tmp_path / "out", tokenizer, kind="chat", val_fraction=0, shard_tokens=25)
    evaluation = Evaluation(Dataset(tmp_path / "out"), split="train", batch_size=1, context=64, documents=documents)
    targets = [id for batch in evaluation for id in batch.targets.flatten().tolist() if id != -100]
    answers = [[*tokenizer.encode(b), 50258] for _, b in chats]
    # In order where they are joined; packed, the longest comes first.
    expected = answers if documents == "joined" else sorted(answers, key=len, reverse=True)
    assert sorted(targets) == sorted(id for answer in answers for id in answer)
    if documents == "joined":
        assert targets == [id for answer in expected for id in answer]


# Evaluation


@pytest.mark.parametrize("T", [1, 5, 64, 257, 258, 1000])
@pytest.mark.parametrize("batch_size", [1, 3, 200])
@pytest.mark.parametrize("world_size", [1, 2])
def test_evaluation_covers_a_split_once(characters_dataset: Build, T: int, batch_size: int, world_size: int) -> None:
    rng = random.Random(1)
    dataset = characters_dataset(["".join(rng.choices("abc", k=258))], shard_tokens=37)
    ids = stream(dataset)
    ranks = [
        Evaluation(dataset, split="train", batch_size=batch_size, context=T, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    assert all(len(list(rank)) == len(rank) for rank in ranks)
    in_order = [batch for batches in zip(*ranks, strict=True) for batch in batches]
    assert all(batch.tokens.shape == (batch_size, T) for batch in in_order)
    pairs = [
        pair for tokens, targets in rows(in_order) for pair in zip(tokens, targets, strict=True) if pair[1] != -100
    ]
    assert pairs == list(pairwise(ids))


def test_the_last_tenth_of_a_text_is_evaluated_whole(tmp_path: Path) -> None:
    text = "".join(random.Random(2).choices("abcdefgh \n", k=10_007))
    (tmp_path / "input.txt").write_text(text)
    prepare(find_sources([tmp_path / "input.txt"]), tmp_path / "out", "characters")
    dataset = Dataset(tmp_path / "out")
    targets = [t for batch in Evaluation(dataset, batch_size=4, context=64) for t in batch.targets.flatten().tolist()]
    assert dataset.tokenizer().decode([t for t in targets if t != -100]) == text[int(len(text) * 0.9) + 1 :]


# What does not fit


def test_sizes_that_do_not_fit(characters_dataset: Build) -> None:
    dataset = characters_dataset(["0123456789"])
    good: dict[str, Any] = {"batch_size": 4, "context": 9, "seed": 0}
    Loader(dataset, **good).batch(0)
    for change, error, message in (
        ({"context": 10}, DataError, "split train has 10 tokens in 1 documents; expected 11 or more"),
        ({"context": 0}, ValueError, "context is 0; expected 1 or more"),
        ({"world_size": 3}, ValueError, r"batch_size is 4; expected a multiple of .* 3 \* 1"),
        ({"batch_size": 0}, ValueError, "batch_size is 0; expected"),
        ({"micro_batches": 0}, ValueError, "batch_size is 4; expected a multiple"),
        ({"rank": 1}, ValueError, "rank is 1 of 1; expected"),
        ({"seed": -1}, ValueError, "seed is -1; expected"),
        ({"order": "sorted"}, ValueError, "order is 'sorted'; expected random or shuffled"),
        ({"documents": "some"}, ValueError, "documents is 'some'; expected joined, separate or packed"),
        ({"split": "val"}, DataError, "has no split 'val'"),
    ):
        with pytest.raises(error, match=message):
            Loader(dataset, **{**good, **change})
    for step, micro in ((-1, 0), (0, 1)):
        with pytest.raises(ValueError, match="are asked for; expected"):
            Loader(dataset, **good).batch(step, micro)
