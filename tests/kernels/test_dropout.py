"""The masks of dropout: the generator itself, rates, and that nothing shares a mask that should not."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedlm.kernels import backend, dropout
from fusedlm.kernels._philox import keep_mask_ref, philox_ref

pytest.importorskip("triton", reason="the kernels need Triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # philox4x32-7 in the known-answer tests of Random123
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
    ],
)
def test_the_generator_gives_its_published_numbers(counter: str, key: str, expected: str) -> None:
    c, k, words = ([torch.tensor(int(w, 16)) for w in text.split()] for text in (counter, key, expected))
    assert [int(w) for w in philox_ref(c, (k[0], k[1]))] == [int(w) for w in words]


def test_the_mask_takes_its_bits_in_the_stated_order() -> None:
    """Element j of a group of 8 is half j % 2 (low first) of word j // 2."""
    seed, stream, row, group = torch.tensor([-(2**40) - 5]), 9, 2, 1
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    words = philox_ref([torch.tensor(n) for n in (group, row, 0, stream)], key)
    for j in range(8):
        half = (int(words[j // 2]) >> 16 * (j % 2)) & 0xFFFF
        assert bool(keep_mask_ref(seed, stream, 3, 16, half)[row, 8 + j])
        assert not bool(keep_mask_ref(seed, stream, 3, 16, half + 1)[row, 8 + j])


def _mask(p: float, n: int, **options: object) -> Tensor:
    with backend("triton"):
        return dropout(torch.ones(n, device=DEVICE), p, **options) != 0  # type: ignore[arg-type]


def _agreement(a: Tensor, b: Tensor) -> float:
    """How far the share of equal elements is from what independent masks of the same rates give, in deviations."""
    p, q = float(a.float().mean()), float(b.float().mean())
    expected = p * q + (1 - p) * (1 - q)
    return abs(float((a == b).float().mean()) - expected) / math.sqrt(expected * (1 - expected) / a.numel())


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 0.9])
def test_rate_and_scale(p: float) -> None:
    n = 4096 if DEVICE.type == "cpu" else 2**22
    seed = torch.tensor([1234567], device=DEVICE)
    with backend("triton"):
        y = dropout(torch.ones(n, dtype=torch.float64 if DEVICE.type == "cpu" else None, device=DEVICE), p, seed=seed)
    kept = y != 0
    assert abs(float((~kept).double().mean()) - p) < 4.5 * math.sqrt(p * (1 - p) / n)
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)), rtol=2e-4, atol=0)


def test_what_goes_is_what_is_below_the_threshold() -> None:
    """At p = h / 65,536 an element whose bits are h still stays; at the next p it goes."""
    seed = torch.tensor([2**35 + 11])
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    words = philox_ref([torch.tensor(n) for n in (0, 0, 0, 5)], key)
    for j in range(8):
        half = (int(words[j // 2]) >> 16 * (j % 2)) & 0xFFFF
        assert _mask(half / 65536, 8, seed=seed.to(DEVICE), stream=5)[j]
        assert not _mask((half + 1) / 65536, 8, seed=seed.to(DEVICE), stream=5)[j]


@pytest.mark.parametrize(("p", "gone"), [(1e-4, 7), (0.1, 6554), (0.3, 19661), (0.99, 64881)])
@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_the_factor_is_that_of_the_rounded_probability(kernels: Any, p: float, gone: int) -> None:
    """gone of 65,536 values of the bits drop an element: the mean over all values is kept by this factor alone."""
    seed = torch.tensor([4], device=DEVICE)
    x = torch.ones(1024, device=DEVICE)
    with backend(kernels):
        y = dropout(x, p, seed=seed)
    kept = y[y != 0].double()
    assert len(kept)
    torch.testing.assert_close(kept, torch.full_like(kept, 65536 / (65536 - gone)), rtol=1e-7, atol=0)


def test_neighbours_rows_streams_seeds_and_calls_are_independent() -> None:
    n = 4096
    seed = torch.tensor([77], device=DEVICE)
    base = _mask(0.5, n, seed=seed)
    assert torch.equal(base, _mask(0.5, n, seed=seed))
    others = {
        "stream": _mask(0.5, n, seed=seed, stream=1),
        "stream 16": _mask(0.5, n, seed=seed, stream=16),
        "seed": _mask(0.5, n, seed=seed + 1),
        "high half of the seed": _mask(0.5, n, seed=seed + 2**32),
        "a new seed": _mask(0.5, n),
        **{f"shift {s}": base.roll(s) for s in (1, 2, 8, 64, 768)},
    }
    for name, other in others.items():
        assert _agreement(base, other) < 4.5, name
    assert _agreement(_mask(0.5, n), _mask(0.5, n)) < 4.5
    rows = keep_mask_ref(seed, 0, 64, 64, 32768)
    for a, b in ((0, 1), (0, 32), (62, 63)):
        assert _agreement(rows[a], rows[b]) < 4.5


def test_torch_s_own_seed_repeats_it_and_evaluation_changes_nothing() -> None:
    torch.manual_seed(5)
    a, b = _mask(0.5, 512), _mask(0.5, 512)
    torch.manual_seed(5)
    assert torch.equal(a, _mask(0.5, 512))
    assert not torch.equal(a, b)
    x = torch.randn(8)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0) is x


def test_the_mask_is_one_whatever_the_strides() -> None:
    seed = torch.tensor([3], device=DEVICE)
    x = torch.randn(12, 20, device=DEVICE)
    with backend("triton"):
        assert torch.equal(dropout(x, 0.4, seed=seed), dropout(x.t().contiguous().t(), 0.4, seed=seed))
    torch.testing.assert_close(dropout(x.cpu(), 0.4, seed=seed.cpu()).to(DEVICE), dropout(x, 0.4, seed=seed))


def test_recomputed_activations_have_the_same_mask() -> None:
    """Activation checkpointing restores torch's generator, and with it the seed."""
    x = torch.randn(256, device=DEVICE, requires_grad=True)
    torch.manual_seed(0)
    plain = torch.autograd.grad(dropout(x.sin(), 0.5).square().sum(), x)
    torch.manual_seed(0)
    y = torch.utils.checkpoint.checkpoint(lambda x: dropout(x.sin(), 0.5).square().sum(), x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y, x), plain)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
def test_every_replay_of_a_graph_has_a_mask_of_its_own() -> None:
    x = torch.ones(4096, device=DEVICE, requires_grad=True)
    dropout(x, 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = dropout(x, 0.5)
        (g,) = torch.autograd.grad(y.sum(), x)
    masks = []
    for _ in range(3):
        graph.replay()
        assert torch.equal(y != 0, g != 0)
        masks.append((y != 0).clone())
    assert _agreement(masks[0], masks[1]) < 4.5
    assert _agreement(masks[1], masks[2]) < 4.5


def test_bad_arguments_are_refused() -> None:
    x = torch.ones(4)
    with pytest.raises(ValueError, match=r"probability is 1.5; expected 0 to 1"):
        dropout(x, 1.5)
    with pytest.raises(ValueError, match=r"probability is nan"):
        dropout(x, math.nan)
    with pytest.raises(ValueError, match=r"seed has shape \(2,\), torch.int64, on cpu; expected one int64"):
        dropout(x, 0.5, seed=torch.tensor([1, 2]))
