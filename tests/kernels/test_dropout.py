"""The masks of dropout: the generator itself, rates, and that nothing shares a mask that should not."""

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedlm.kernels import backend, dropout
from fusedlm.kernels._philox import keep_mask_ref, keep_tile, keep_tile_ref, philox_ref, tile_key
from fusedlm.kernels._triton import tl, triton

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


@pytest.mark.parametrize("row", [2, 2500])  # on a CPU, many rows are computed in parts
def test_the_mask_takes_its_bits_in_the_stated_order(row: int) -> None:
    """Element j of a group of 8 is half j % 2 (low first) of word j // 2."""
    seed, stream, group = torch.tensor([-(2**40) - 5]), 9, 1
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    words = philox_ref([torch.tensor(n) for n in (group, row, 0, stream)], key)
    for j in range(8):
        half = (int(words[j // 2]) >> 16 * (j % 2)) & 0xFFFF
        assert bool(keep_mask_ref(seed, stream, row + 1, 16, half)[row, 8 + j])
        assert not bool(keep_mask_ref(seed, stream, row + 1, 16, half + 1)[row, 8 + j])


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
        y = dropout(torch.ones(n, device=DEVICE), p, seed=seed)
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


@triton.jit
def _tile_kernel(out_ptr, place_ptr, M: tl.constexpr, N: tl.constexpr):
    # keep_tile alone. place: key, row, column, threshold.
    key = tl.load(place_ptr).to(tl.uint32)
    row, column, threshold = tl.load(place_ptr + 1), tl.load(place_ptr + 2), tl.load(place_ptr + 3)
    keep = keep_tile(key, row, column, threshold, M, N)
    tl.store(out_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], keep.to(tl.int8))


def _tile(key: int, row: int, column: int, threshold: int, M: int = 16, N: int = 16) -> Tensor:
    out = torch.empty(M, N, dtype=torch.int8, device=DEVICE)
    _tile_kernel[(1,)](out, torch.tensor([key, row, column, threshold], device=DEVICE), M=M, N=N)
    return out.cpu() != 0


@triton.jit(do_not_specialize=["stream", "threshold"])
def _tiles_kernel(out_ptr, seed_ptr, stream, threshold, T, S, M: tl.constexpr, N: tl.constexpr):
    # A tile of a head's mask, by the kernel's own key.
    head = tl.cast(tl.program_id(0), tl.int64)
    row, column = tl.program_id(1) * M, tl.program_id(2) * N
    keep = keep_tile(tile_key(tl.load(seed_ptr), stream, head), row, column, threshold, M, N)
    t, s = row + tl.arange(0, M)[:, None], column + tl.arange(0, N)[None, :]
    tl.store(out_ptr + (head * T + t) * S + s, keep.to(tl.int8), mask=(t < T) & (s < S))


def _tiles(seed: Tensor, stream: int, heads: int, T: int, S: int, threshold: int, M: int, N: int) -> Tensor:
    """What keep_tile_ref gives, by the kernel, in tiles of (M, N)."""
    out = torch.empty(heads, T, S, dtype=torch.int8, device=DEVICE)
    _tiles_kernel[(heads, -(-T // M), -(-S // N))](out, seed.to(DEVICE), stream, threshold, T, S, M=M, N=N)
    return out.cpu() != 0


def _philox2x32(counter: tuple[int, int], key: int) -> tuple[int, int]:
    """Seven rounds of Philox2x32 by Python's integers."""
    left, right = counter
    for i in range(7):
        high, low = divmod(0xD256D193 * left, 2**32)
        left, right = high ^ (key + i * 0x9E3779B9) % 2**32 ^ right, low
    return left, right


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # philox2x32-7 in the known-answer tests of Random123
        ("00000000 00000000", "00000000", "257a3673 cd26be2a"),
        ("ffffffff ffffffff", "ffffffff", "ab302c4d 3dc9d239"),
        ("243f6a88 85a308d3", "13198a2e", "bedbbe6b e4c770b3"),
    ],
)
def test_tiles_are_made_of_the_generator_s_published_numbers(counter: str, key: str, expected: str) -> None:
    """Counter: pair of columns, pair of rows. First word: the upper row; low half: the left column."""
    (a, b), (k,), words = ([int(w, 16) for w in text.split()] for text in (counter, key, expected))
    assert _philox2x32((a, b), k) == tuple(words)
    for lower in range(2):
        for right in range(2):
            half = words[lower] >> 16 * right & 0xFFFF
            for threshold, stays in ((half, True), (half + 1, False)):
                tile = _tile(k, b // 8 * 16, a // 8 * 16, threshold)
                assert bool(tile[b % 8 + 8 * lower, a % 8 + 8 * right]) == stays


@pytest.mark.parametrize("heads", [1, 3])
def test_masks_of_tiles_take_their_bits_in_the_stated_order(heads: int) -> None:
    seed, stream, T, S, threshold = torch.tensor([-(2**40) - 5]), 9, 40, 21, 20000
    expected = torch.empty(heads, T, S, dtype=torch.bool)
    for head in range(heads):
        word = philox_ref(
            [torch.tensor(n) for n in (head, 0, 0, stream)], (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
        )[0]
        for t in range(T):
            for s in range(S):
                words = _philox2x32((s // 16 * 8 + s % 8, t // 16 * 8 + t % 8), int(word))
                half = words[t // 8 % 2] >> 16 * (s // 8 % 2) & 0xFFFF
                expected[head, t, s] = half >= threshold
    assert torch.equal(keep_tile_ref(seed, stream, heads, T, S, threshold), expected)
    assert torch.equal(_tiles(seed, stream, heads, T, S, threshold, 16, 32), expected)


def test_a_tile_s_mask_does_not_depend_on_how_the_grid_is_cut() -> None:
    seed, options = torch.tensor([2**50 + 3]), (2, 64, 64, 32768)
    whole = _tiles(seed, 4, *options, 64, 64)
    for M, N in ((32, 32), (16, 64), (64, 16)):
        assert torch.equal(_tiles(seed, 4, *options, M, N), whole), (M, N)
    large = _tile(0x89ABCDEF, 0, 0, 30000, 64, 64)
    for row, column in ((16, 0), (0, 48), (16, 32)):
        piece = _tile(0x89ABCDEF, row, column, 30000, 32, 16)
        assert torch.equal(piece, large[row : row + 32, column : column + 16]), (row, column)


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 0.9])
def test_tiles_drop_at_the_right_rate_for_every_seed(p: float) -> None:
    """Over many seeds, the number that goes is binomial: in its mean and in its spread."""
    count, n = 400, 2 * 48 * 80
    threshold = round(p * 65536)
    rate = threshold / 65536
    seeds = torch.randint(-(2**63), 2**63 - 1, (count, 1), generator=torch.Generator().manual_seed(1))
    kept = torch.stack([keep_tile_ref(seed, i, 2, 48, 80, threshold).sum() for i, seed in enumerate(seeds)])
    deviations = (n - kept - n * rate) / math.sqrt(n * rate * (1 - rate))
    assert abs(float(deviations.mean())) < 4.5 / math.sqrt(count)
    assert abs(float(deviations.square().mean()) - 1) < 4.5 * math.sqrt(2 / count)
    assert float(deviations.abs().max()) < 5.5


def _correlation(a: Tensor, b: Tensor) -> float:
    """How far the correlation of two masks is from 0, in deviations."""
    return abs(float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())).double())[0, 1])) * math.sqrt(a.numel())


def test_tiles_of_heads_streams_and_seeds_are_independent() -> None:
    seed = torch.tensor([77])

    def mask(seed: Tensor, stream: int, head: int) -> Tensor:
        return keep_tile_ref(seed, stream, head + 1, 64, 64, 32768)[head]

    base = mask(seed, 0, 0)
    assert torch.equal(base, mask(seed, 0, 0))
    others = {
        **{f"head {h}": mask(seed, 0, h) for h in (1, 2, 16)},
        **{f"stream {s}": mask(seed, s, 0) for s in (1, 2, 16)},
        "the next head of the next stream": mask(seed, 1, 1),
        "seed": mask(seed + 1, 0, 0),
        "high half of the seed": mask(seed + 2**32, 0, 0),
    }
    for name, other in others.items():
        assert _correlation(base, other) < 4.5, name
    above, below = base[torch.triu_indices(64, 64, 1).unbind()], base.T[torch.triu_indices(64, 64, 1).unbind()]
    assert _correlation(above, below) < 4.5, "rows and columns"


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_elements_of_a_tile_are_independent(p: float) -> None:
    """Neighbours and others in rows and columns, and the four elements of one evaluation."""
    mask = keep_tile_ref(torch.tensor([5]), 3, 4, 128, 128, round(p * 65536))
    for move in (1, 2, 7, 8, 9, 16, 24, 48):
        for rows, columns in ((move, 0), (0, move), (move, move), (move, -move)):
            assert _correlation(mask, mask.roll((rows, columns), (1, 2))) < 4.5, (rows, columns)
    pieces = mask.view(4, 8, 2, 8, 8, 2, 8)  # (head, 16 rows, upper or lower 8, 8 rows, the same of columns)
    four = [pieces[:, :, i, :, :, j] for i in range(2) for j in range(2)]
    for a, b in combinations(four, 2):
        assert _correlation(a, b) < 4.5
    assert _correlation(four[0] & four[1], four[2] & four[3]) < 4.5
    assert _correlation(four[0] ^ four[1], four[2] ^ four[3]) < 4.5
