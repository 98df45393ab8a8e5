"""Sampling against transformers' logits processors, and the draw against the distribution it must follow.

The kernels (interpreted where there is no GPU) against a sampler in float64 that decides token by token.
"""

import math
from collections.abc import Callable
from typing import Any

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

from fusedlm.kernels import backend, sample
from fusedlm.testing.contract import poisoned_memory

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


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


def drawn(x: Tensor, uniform: Tensor | None = None, **options: Any) -> Tensor:
    """The kernels' tokens, on the CPU; memory that nobody writes is NaN."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    moved = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in options.items()}
    with backend("triton"), poisoned_memory():
        tokens = sample(x.to(DEVICE), None if uniform is None else uniform.to(DEVICE), **moved)
    assert tokens.dtype == torch.int64
    return tokens.cpu()


def probabilities(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seen: Tensor | None = None,
) -> Tensor:
    """What each token of one row is drawn with, in float64: every token's fate from what is strictly above it."""
    x = logits.double()
    if seen is not None:
        x = torch.where(seen & (x > 0), x / repetition_penalty, torch.where(seen, x * repetition_penalty, x))
    values, place = x.div(temperature).unique(return_inverse=True)  # ascending
    weight = (values - values[-1]).exp()
    amount = place.bincount(minlength=len(values))
    if 0 < top_k < len(x):
        amount = amount * ((amount.flip(0).cumsum(0).flip(0) - amount) < top_k)
    mass = amount * weight
    above = mass.flip(0).cumsum(0).flip(0) - mass
    kept = (amount > 0) & (above < torch.tensor(top_p, dtype=torch.float32).double() * mass.sum())
    if top_p == 1:
        kept = amount > 0
    kept &= weight >= torch.tensor(min_p, dtype=torch.float32).double()
    p = (kept * weight)[place]
    return p / p.sum()


def check_tokens(tokens: Tensor, x: Tensor, uniform: Tensor, **options: Any) -> None:
    """Each row's token is the one whose share of [0, 1) holds the row's number, or a little beside it: 1e-6, and what
    rounding a logit to fp32 after the penalty and the temperature makes of its probability."""
    seen = options.pop("seen", None)
    for i, (token, u) in enumerate(zip(tokens.tolist(), uniform.double().tolist(), strict=True)):
        p = probabilities(x[i].cpu(), **options, seen=None if seen is None else seen[i])
        assert 0 <= token < len(p)
        assert p[token] > 0, f"row {i}: token {token} was filtered out"
        end = float(p[: token + 1].sum())
        largest = float(x[i][x[i].isfinite()].abs().max()) / options.get("temperature", 1.0)
        slack = 1e-6 + 2**-23 * largest
        assert end - float(p[token]) - slack <= u <= end + slack, f"row {i}: u {u}, token {token} ends at {end}"


def numbers(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(1000 + seed))


SETTINGS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 139},
    {"top_k": 10**6, "top_p": 0.5},
    {"top_p": 1e-6},
    {"top_p": 0.95},
    {"top_p": 0.9999},
    {"min_p": 0.05, "temperature": 0.3},
    {"top_k": 50, "top_p": 0.9},
    {"top_k": 120, "top_p": 0.95, "min_p": 0.02, "temperature": 1.4, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_kernels_draw_what_float64_draws(options: dict[str, Any]) -> None:
    """Flat and peaked rows, in fp32 and fp16 (many ties), several chunks of which the last is not whole."""
    V = 140
    seen = torch.zeros(2, V, dtype=torch.bool)
    seen[:, ::3] = True
    extra = {"seen": seen} if "repetition_penalty" in options else {}
    for dtype, scales in ((torch.float32, (0.3, 2.0)), (torch.float16, (1.0, 12.0))):
        x = logits(2, V, seed=len(str(options))) / 4 * torch.tensor(scales).view(-1, 1) - 5
        x[1, 7] = -math.inf
        u, rounded = numbers(2), x.to(dtype)
        check_tokens(drawn(rounded, u, **options, **extra), rounded, u, **options, **extra)


@pytest.mark.parametrize(
    "options", [{"top_k": 60}, {"top_p": 0.7}, {"top_k": 110, "top_p": 0.7, "min_p": 0.9}], ids=str
)
def test_many_candidates_between_two_pivots(options: dict[str, Any]) -> None:
    """Logits so close together that nearly all are candidates, around zero and elsewhere, and far below the pivots."""
    x = logits(4, 140) * 0.01
    x[1] += 3.3
    x[2] = x[2] * 3e3  # the threshold is far below the last pivot
    x[3] = x[3].sort().values  # and all candidates in one chunk
    u = numbers(4)
    check_tokens(drawn(x, u, **options), x, u, **options)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_k": 20, "top_p": 0.4}, {"min_p": 1.0}], ids=str)
def test_ties_stay_together(options: dict[str, Any]) -> None:
    x = logits(3, 100).round()
    x[0] = 0.0  # all the same: every token stays, whatever the filter
    x[0, ::2] = -0.0  # the same number
    x[1, 50:] = -math.inf
    u = torch.tensor([0.5, 1 - 2**-24, 0.999])
    tokens = drawn(x, u, **options)
    check_tokens(tokens, x, u, **options)
    assert tokens[0] == 50


def test_the_last_token_kept() -> None:
    """Rows made so that each filter's end matters: the highest number draws the last token in order that is kept."""
    u = torch.tensor([1 - 2**-24])

    def last(x: Tensor, **options: Any) -> int:
        check_tokens(drawn(x.view(1, -1), u, **options), x.view(1, -1), u, **options)
        return int(drawn(x.view(1, -1), u, **options))

    steps = -0.1 * torch.arange(20.0)
    assert last(steps, top_k=8, min_p=0.7) == 3  # min-p among the candidates of top-k: exp(-0.3) = 0.74
    assert last(steps, top_k=8, top_p=0.9999) == 7  # top-p that takes nothing from top-k
    assert last(steps, top_p=0.6, min_p=0.45) == 7  # top-p's share is of all, also of what min-p takes out afterwards
    tail = torch.cat([torch.zeros(1), torch.full((139,), -9.0)])  # a 60th of the mass, far down
    assert last(tail, top_p=0.99) == 139
    uneven = torch.cat([torch.linspace(0, -4, 64), torch.linspace(-6, -7, 64)])  # chunks of unlike mass
    assert last(uneven, top_p=0.7) < 30
    # top-k cuts through a hundred tokens of about the same logit: top-p's share is of what is left
    assert last(torch.cat([torch.tensor([0.0, -0.1, -0.9]), -3 - 0.005 * torch.arange(100.0)]), top_k=8, top_p=0.7) == 1


@pytest.mark.parametrize("first", [1, 70])
@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.4}, {"min_p": 0.9}], ids=str)
def test_the_number_0_draws_the_first_token_kept(options: dict[str, Any], first: int) -> None:
    """Whatever is filtered out before it: a token, a whole chunk."""
    x = torch.full((1, 150), -3.0)
    x[0, first : first + 5] = torch.tensor([2.0, 2.01, 2.02, 2.03, 2.04])
    assert drawn(x, torch.zeros(1), **options).tolist() == [first + 2 * ("top_p" in options)]


def test_the_penalty_of_positive_and_negative_logits() -> None:
    x = torch.tensor([[2.0, -1.0, 1.0, 0.0]]).repeat(3, 1)
    seen = torch.tensor([[True, True, False, False]]).repeat(3, 1)
    options = {"repetition_penalty": 2.5, "seen": seen}
    u = torch.tensor([0.3, 0.37, 0.8])
    check_tokens(drawn(x, u, **options), x, u, **options)
    assert drawn(x, temperature=0, **options).tolist() == [2, 2, 2]


def test_greedy_takes_the_first_of_the_highest() -> None:
    x = logits(3, 200).round()
    x[1] = -math.inf
    assert drawn(x, temperature=0).tolist() == x.argmax(-1).tolist()
    assert drawn(x[:, :1], temperature=0).tolist() == [0, 0, 0]
    assert drawn(x[:0], temperature=0).shape == (0,)


@pytest.mark.parametrize("kernels", [True, False])
def test_rows_without_a_distribution_are_greedy(kernels: bool) -> None:
    x = logits(5, 100)
    x[0, 80], x[0, 90] = -math.nan, math.nan  # the sign of a NaN means nothing
    x[1, 80] = x[1, 90] = math.inf
    x[2] = -math.inf
    x[3, 5], x[3, 70] = math.inf, math.nan
    x[4] *= 1e30
    u = torch.full((5,), 0.7)
    choose = drawn if kernels else sample
    for options in ({}, {"top_k": 4, "top_p": 0.9, "min_p": 0.1}):
        assert choose(x, u, **options)[:4].tolist() == [80, 80, 0, 70]
        assert choose(x, u, temperature=1e-10, **options)[4] == x[4].argmax()  # nothing but infinities


def test_frequencies_are_the_probabilities() -> None:
    """Evenly spaced numbers: each token comes up as often as its probability says, to one in n."""
    n, V = (4001, 1000) if GPU else (21, 40)
    x = logits(1, V, 3)
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for options in ({"temperature": 1.3}, {"top_k": 12, "top_p": 0.95})[: 2 if GPU else 1]:
        counts = torch.bincount(drawn(x.expand(n, V), u.float(), **options), minlength=V) / n
        assert float((counts - probabilities(x[0], **options)).abs().max()) <= 1.01 / n


def test_rows_do_not_depend_on_each_other_or_on_strides() -> None:
    x, u = logits(2, 70), numbers(2)
    options: dict[str, Any] = {"top_p": 0.9}
    expected = drawn(x, u, **options)
    for i in range(2):
        assert drawn(x[i : i + 1], u[i : i + 1], **options).tolist() == [expected[i]]
    wide = torch.full((2, 81), math.nan)
    wide[:, 3:73] = x
    assert drawn(wide[:, 3:73], u.repeat_interleave(2)[::2], **options).equal(expected)
    assert drawn(x.t().contiguous().t(), u.double(), **options).equal(expected)
    seen = torch.rand(2, 90, generator=torch.Generator().manual_seed(2)) < 0.5
    options |= {"repetition_penalty": 3.0, "seen": seen[:, 5:75]}
    check_tokens(drawn(x, u, **options), x, u, **options)


def test_the_operator_for_compile_is_sound() -> None:
    pytest.importorskip("triton", reason="the kernels need Triton")
    x, u = logits(2, 70).to(DEVICE), numbers(2).to(DEVICE)
    torch.library.opcheck(torch.ops.fusedlm.sample.default, (x, u, 0.8, 0, 1.0, 0.1, 1.0, None))


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("V", [128256, 262144])
def test_large_vocabularies(options: dict[str, Any], V: int) -> None:
    seen = torch.rand(6, V, generator=torch.Generator().manual_seed(1)) < 0.3
    extra = {"seen": seen} if "repetition_penalty" in options else {}
    x = logits(6, V) / 4 * torch.tensor([0.01, 0.3, 1.0, 2.0, 4.0, 12.0]).view(-1, 1)
    for dtype in (torch.float32, torch.bfloat16):
        u, rounded = numbers(6), x.to(dtype)
        tokens = drawn(rounded, u, **options, **extra)
        check_tokens(tokens, rounded, u, **options, **extra)
        for _ in range(3):
            assert drawn(rounded, u, **options, **extra).equal(tokens)
        assert drawn(rounded[2:3], u[2:3], **options, **{k: v[2:3] for k, v in extra.items()})[0] == tokens[2]


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_in_a_cuda_graph() -> None:
    x, u = logits(2, 128256).to(DEVICE), numbers(2).to(DEVICE)
    options: dict[str, Any] = {"top_k": 50, "top_p": 0.9}
    sample(x, u, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sample(x, u, **options)
    for seed in (1, 2):
        x.copy_(logits(2, 128256, seed))
        u.copy_(numbers(2, seed))
        graph.replay()
        assert tokens.equal(sample(x, u, **options))
        check_tokens(tokens.cpu(), x.cpu(), u.cpu(), **options)
