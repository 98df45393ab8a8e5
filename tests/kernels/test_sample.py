"""Sampling against transformers' logits processors, and the draw against the distribution it must follow."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fusedlm.kernels import sample


def logits(B: int, V: int, seed: int = 0) -> Tensor:
    return 4 * torch.randn(B, V, generator=torch.Generator().manual_seed(seed))


def reachable(draw: Callable[[Tensor], Tensor], V: int, n: int = 4001) -> Tensor:
    """How often each token comes up over n evenly spaced uniform numbers."""
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.bincount(draw(uniform.float()), minlength=V) / n


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.8},
        {"top_p": 0.05},
        {"min_p": 0.1},
        {"repetition_penalty": 1.7},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_probabilities_are_those_of_transformers(options: dict[str, float], seed: int) -> None:
    V, n = 50, 4001
    x = logits(1, V, seed)
    seen = torch.tensor([[1, 4, 4, 9, 30]])
    theirs = LogitsProcessorList()
    if "repetition_penalty" in options:
        theirs.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if "temperature" in options:
        theirs.append(TemperatureLogitsWarper(options["temperature"]))
    if "top_k" in options:
        theirs.append(TopKLogitsWarper(int(options["top_k"])))
    if "top_p" in options:
        theirs.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        theirs.append(MinPLogitsWarper(options["min_p"]))
    expected = theirs(seen, x.clone()).softmax(-1)[0]
    mask = torch.zeros(n, V, dtype=torch.bool).index_fill_(1, seen[0], True)
    counts = reachable(lambda u: sample(x.expand(n, V), u, seen=mask, **options), V, n)  # type: ignore[arg-type]
    assert float((counts - expected).abs().max()) <= 1.01 / n
    assert not counts[expected == 0].any()


def test_greedy_takes_the_highest_after_the_penalty() -> None:
    x = torch.tensor([[1.0, 3.0, 2.9], [-1.0, -2.0, -3.0]])
    assert sample(x, temperature=0).tolist() == [1, 0]
    seen = torch.tensor([[False, True, False], [True, False, False]])
    assert sample(x, temperature=0, repetition_penalty=4.0, seen=seen).tolist() == [2, 1]


def test_extreme_draws_stay_inside_what_is_kept() -> None:
    x = logits(1, 1000)
    kept = set(x[0].topk(3).indices.tolist())
    for u in (0.0, 1 - 2**-24):
        assert sample(x, torch.tensor([u]), top_k=3).item() in kept


def test_infinite_logits_are_never_drawn() -> None:
    x = torch.full((1, 8), -math.inf)
    x[0, 3] = 0.0
    for u in (0.0, 0.5, 1 - 2**-24):
        assert sample(x, torch.tensor([u]), top_p=0.9, min_p=0.1).item() == 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
    ],
)
def test_nonsense_is_refused_by_name(options: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named} is .*; expected"):
        sample(logits(1, 5), torch.tensor([0.5]), **options)  # type: ignore[arg-type]


def test_sampling_without_uniform_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="one uniform number a row"):
        sample(logits(2, 5), torch.tensor([0.5]))
