"""What attention does beyond the contract: defaults, what lies behind the tensors, extreme scores, dropout's draws."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedlm.kernels import attention, backend
from fusedlm.kernels._launch import record_launches
from fusedlm.kernels.attention import torch_attention
from fusedlm.kernels.attention.launches import Setting, _hopper_config, begin_sums, end_sums
from fusedlm.testing.contract import deterministic_algorithms, poisoned_memory

pytest.importorskip("triton", reason="the kernels need Triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _truth(q: Tensor, k: Tensor, v: Tensor, *, offset: int, scale: float, causal: bool = True) -> Tensor:
    """In float64 and by the formula, differentiable. As many heads as key/value heads."""
    q, k, v = (t.cpu().double() for t in (q, k, v))
    T, S = q.shape[2], k.shape[2]
    scores = q @ k.mT * scale
    if causal:
        scores = scores.masked_fill(torch.arange(S) > offset + torch.arange(T).view(-1, 1), -math.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float().to(DEVICE)


def _close(ours: Tensor, truth: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours.detach().cpu().double(), truth.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_by_default_the_last_query_sees_every_key_and_the_scale_is_that_of_the_width(kernels: Any) -> None:
    q, k, v = _random(1, 2, 5, 20), _random(1, 2, 21, 20, seed=1), _random(1, 2, 21, 20, seed=2)
    with backend(kernels):
        _close(attention(q, k, v), _truth(q, k, v, offset=16, scale=20**-0.5))


@pytest.mark.parametrize("factor", [1.0, 300.0])
def test_scores_of_any_size(factor: float) -> None:
    """Exponentials of these scores are infinite, or all of a row's are 0, unless the largest is subtracted."""
    q, k, v = _random(1, 1, 40, 16), _random(1, 1, 40, 16, seed=1), _random(1, 1, 40, 16, seed=2)
    scale, tolerance = 0.25 * factor, 1e-4 if factor == 1 else 1e-2  # scores of 15,000 are off by 1e-3 in fp32
    for constant in (0.0, 200.0, -200.0):  # moves all scores of a row, which changes no weight
        q[..., 0], k[..., 0] = constant, 1.0
        with backend("triton"):
            ours = attention(q, k, v, scale=scale)
        _close(ours, _truth(q, k, v, offset=0, scale=scale), tolerance)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
@pytest.mark.parametrize("causal", [True, False])
def test_scales_that_are_not_positive(scale: float, causal: bool) -> None:
    q, k, v = _random(1, 2, 20, 16), _random(1, 2, 20, 16, seed=1), _random(1, 2, 20, 16, seed=2)
    with backend("triton"):
        ours = attention(q, k, v, scale=scale, causal=causal)
    _close(ours, _truth(q, k, v, offset=0, scale=scale, causal=causal))


@pytest.mark.parametrize(("T", "S"), [(37, 41), (20, 64), (32, 24)])
def test_what_lies_behind_the_tokens_is_not_taken(T: int, S: int) -> None:
    """A cache is longer than what is in it, and what nobody has written may be anything."""

    def behind(n: int, seed: int) -> Tensor:
        wide = torch.full((1, 2, n + 64, 16), math.nan, device=DEVICE)
        wide[:, :, :n] = _random(1, 2, n, 16, seed=seed)
        return wide[:, :, :n]

    q, k, v, do = behind(T, 0), behind(S, 1), behind(S, 2), behind(T, 3)
    offset = max(S - T, 0)
    for causal in (True, False):
        ours = [t.detach().requires_grad_() for t in (q, k, v)]
        exact = [t.detach().cpu().double().requires_grad_() for t in (q, k, v)]
        with backend("triton"):
            y = attention(*ours, offset=offset, causal=causal)
            gradients = torch.autograd.grad(y, ours, do)
        truth = _truth(*exact, offset=offset, scale=0.25, causal=causal)
        _close(y, truth)
        for found, expected in zip(gradients, torch.autograd.grad(truth, exact, do.cpu().double()), strict=True):
            _close(found, expected, 2e-5)


def test_without_queries_or_without_keys() -> None:
    def run(T: int, S: int) -> tuple[Tensor, ...]:
        tensors = [_random(2, 2, n, 16).requires_grad_() for n in (T, S, S)]
        with backend("triton"):
            y = attention(*tensors)
            return (y, *torch.autograd.grad(y, tensors, torch.ones_like(y)))

    for T, S in ((0, 5), (5, 0), (0, 0)):
        for t in run(T, S):
            assert t.shape[0] == 2
            assert not t.count_nonzero()


def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """torch's attention asks of memory what its kernels for GPUs do; gives the list of all that it will read."""
    read: list[Tensor] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def see(t: Tensor) -> None:
        assert t.data_ptr() % 16 == 0, "misaligned address"
        assert all(stride * t.itemsize % 16 == 0 for stride in t.stride()[:3]), "misaligned address"
        read.append(t)

    def picky(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        if not q.numel() and torch.backends.cuda.cudnn_sdp_enabled():
            return None
        for t in (q, k, v):
            see(t)
        o = attend(q, k, v, *args, **kwargs)
        if o.requires_grad:
            o.register_hook(see)
        return o.view_as(o)  # a tensor without that hook

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", picky)
    return read


@pytest.mark.parametrize(("begin", "width"), [(0, 16), (1, 16), (1, 20), (0, 18)])
def test_torchs_attention_reads_no_misaligned_address(begin: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def laid_out(seed: int, T: int = 9) -> Tensor:
        memory = torch.full((6 * T * width + begin,), math.nan, device=DEVICE)
        view = memory.as_strided((2, 3, T, 16), (3 * T * width, T * width, width, 1), begin)
        return view.copy_(_random(2, 3, T, 16, seed=seed))

    given = laid_out(0), laid_out(1), laid_out(2), laid_out(3)
    ours = [t.detach().requires_grad_() for t in given[:3]]
    exact = [t.cpu().double().requires_grad_() for t in given[:3]]
    read = _as_on_a_gpu(monkeypatch)
    y = torch_attention(*ours, causal=True, offset=0, scale=0.25)
    gradients = torch.autograd.grad(y, ours, given[3])
    assert len(read) == 4
    copied = [r.data_ptr() != t.data_ptr() for r, t in zip(read, given, strict=True)]
    assert copied == [(begin, width) != (0, 16)] * 4
    truth = _truth(*exact, offset=0, scale=0.25)
    _close(y, truth)
    for found, expected in zip(gradients, torch.autograd.grad(truth, exact, given[3].cpu().double()), strict=True):
        _close(found, expected, 2e-5)


def test_torchs_attention_of_an_empty_batch_is_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    _as_on_a_gpu(monkeypatch)
    q = torch.zeros(0, 2, 8, 16, device=DEVICE, requires_grad=True)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = torch_attention(q, q, q, causal=True, offset=0, scale=1.0)
        assert y.shape == q.shape
        assert y.requires_grad == grad


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("T", [40, 600])
@pytest.mark.parametrize("trains", [True, False])
def test_memory_of_any_layout_whichever_serves(T: int, trains: bool) -> None:
    """On a GPU, where a misaligned address would end the process's use of it."""
    wide = [torch.zeros(2, 3, T, 71, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)]
    q, k, v, do = (w[..., 1:65].copy_(_random(2, 3, T, 64, seed=i)) for i, w in enumerate(wide))
    exact = [t.cpu().double().requires_grad_() for t in (q, k, v)]
    truth = _truth(*exact, offset=0, scale=0.125)
    with torch.set_grad_enabled(trains):
        ours = [t.detach().requires_grad_(trains) for t in (q, k, v)]
        y = attention(*ours)
    _close(y, truth, 0.03)
    if trains:
        expected = torch.autograd.grad(truth, exact, do.cpu().double())
        for found, want in zip(torch.autograd.grad(y, ours, do), expected, strict=True):
            _close(found, want, 0.05)
    for kernels in ("auto", "torch"):
        with backend(kernels), torch.no_grad():
            assert attention(q[:0], k[:0], v[:0]).shape == (0, 3, T, 64)


def _mask(T: int, S: int, heads: int, p: float, **options: Any) -> Tensor:
    """Which weights stay, (heads, T, S) bool: all are equal, and the values tell them apart."""
    q, k = torch.zeros(1, heads, T, S, device=DEVICE), torch.zeros(1, heads, S, S, device=DEVICE)
    v = torch.eye(S, device=DEVICE).expand(1, heads, S, S)
    with backend("triton"):
        return attention(q, k, v, causal=False, dropout_p=p, **options)[0] != 0


def test_without_a_seed_each_call_draws_one() -> None:
    torch.manual_seed(5)
    a, b = _mask(40, 32, 2, 0.5), _mask(40, 32, 2, 0.5)
    torch.manual_seed(5)
    assert torch.equal(a, _mask(40, 32, 2, 0.5))
    assert not torch.equal(a, b)
    assert abs(float(a.float().mean()) - 0.5) < 4.5 * 0.5 / math.sqrt(a.numel())
    assert _mask(40, 32, 2, 0.5, training=False).all()
    assert not _mask(40, 32, 2, 1.0).any()


def test_gradients_are_those_of_the_same_mask() -> None:
    """With all weights equal and the identity for values, dv = P^T dO shows the mask that the backward pass made."""
    S, p, seed = 64, 0.4, torch.tensor([11], device=DEVICE)
    q = torch.zeros(1, 2, S, S, device=DEVICE)
    v = torch.eye(S, device=DEVICE).repeat(1, 2, 1, 1).requires_grad_()
    with backend("triton"):
        y = attention(q, q, v, causal=False, dropout_p=p, seed=seed)
        (dv,) = torch.autograd.grad(y, v, torch.eye(S, device=DEVICE).expand(1, 2, S, S))
    assert torch.equal(y.detach() != 0, dv.mT != 0)
    assert 0.5 < float((dv != 0).float().mean()) < 0.7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": (1, 2, 5, 8), "v": (1, 2, 5, 8)}, r"expected \(B, H, T, D\) and twice \(B, G, S, D\)"),
        ({"v": (1, 2, 6, 16)}, r"shapes .* \(1, 2, 6, 16\)"),
        ({"q": (1, 3, 5, 16)}, "3 query heads are not a multiple of 2"),
        ({"cu_seqlens": torch.tensor([0, 5]), "offset": 1}, "packed sequences to be their own keys"),
        ({"dropout_p": 1.5}, "probability is 1.5; expected 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], message: str) -> None:
    given = dict.fromkeys("qkv", (1, 2, 5, 16)) | arguments
    made = {name: torch.zeros(value) if isinstance(value, tuple) else value for name, value in given.items()}
    with pytest.raises(ValueError, match=message):
        attention(**made)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_small_integers_are_exact_but_for_the_last_rounding(D: int, causal: bool) -> None:
    """Weights that are powers of two and values that are small integers: nothing is rounded before the division.

    A product that takes weights from registers which are already written to again (ptxas has done so on Hopper) is off
    by whole numbers, where the errors of random data would hide a few.
    """
    T = 200 if torch.cuda.is_available() else 40
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float16
    g = torch.Generator().manual_seed(0)
    q, k = torch.zeros(2, 1, 2, T, D, dtype=torch.float64)
    q[..., 0] = 1
    k[..., 0] = -torch.randint(0, 5, (1, 2, T), generator=g)
    v = torch.randint(-8, 9, (1, 2, T, D), generator=g).double()
    weights = torch.exp2(q @ k.mT)
    if causal:
        weights = weights.tril()
    truth = weights @ v / weights.sum(-1, keepdim=True)
    on_device = [t.to(DEVICE, dtype) for t in (q, k, v)]
    with backend("triton"):
        y = attention(*on_device, causal=causal, scale=math.log(2))
    torch.testing.assert_close(y.double().cpu(), truth, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize(("T", "D"), [(37, 40), (16, 64), (1, 24)])
def test_what_comes_before_and_after_the_fused_backward_pass(T: int, D: int) -> None:
    """delta and zeros before; after it the sums, scaled and rounded, side by side with other gradients."""
    B, H = 2, 3
    wide = _random(B, T, H + 1, D).half()
    do = wide.transpose(1, 2)[:, 1:]
    o = _random(B, T, H, D, seed=1).half().transpose(1, 2)
    with poisoned_memory():
        delta, sums = begin_sums(o, do)
    _close(delta, (o.double() * do.double()).sum(-1).cpu())
    assert sums.shape == o.shape
    assert torch.equal(sums, torch.zeros_like(sums))
    sums.copy_(_random(B, H, T, D, seed=2))
    whole = torch.full((B, T, 2 * H, D), math.nan, device=DEVICE, dtype=torch.float16)
    dq = whole.transpose(1, 2)[:, H:]
    end_sums(sums, 0.3, dq)
    torch.testing.assert_close(dq, (sums * 0.3).half(), rtol=0, atol=0)
    assert whole[:, :, :H].isnan().all()


def test_which_backward_pass_serves_on_hopper() -> None:
    """The fused one, where its sums may be in any order and it knows what is asked."""

    def fused(D: int = 64, gpu: int = 90, dtype: torch.dtype = torch.bfloat16, **options: Any) -> bool:
        q, k = (torch.empty(2, heads, 40, D, device="meta", dtype=dtype) for heads in (4, 2))
        setting = {"offset": None, "cu_seqlens": None, "seed": None, "p": 0.0, "causal": True} | options
        with record_launches(gpu):
            return _hopper_config("bwd", q, k, Setting(**setting, start=0, scale=1.0, stream=0)) is not None

    assert fused()
    assert fused(40, dtype=torch.float16, causal=False)
    with deterministic_algorithms():
        assert not fused()
    assert not fused(128)
    assert not fused(44)
    assert not fused(gpu=80)
    assert not fused(dtype=torch.float32)
    assert not fused(seed=torch.zeros(1), p=0.1)
    assert not fused(cu_seqlens=torch.zeros(2))


def test_weights_dropped_on_a_cpu() -> None:
    """Without a seed, as in training: v is the identity, so the output is the dropped weights themselves."""
    p, T, H = 0.3, 64, 6
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(2, H, T, T, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.eye(T, dtype=torch.float64).expand(2, H, T, T)
    scores = (q @ k.mT / 8).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf)
    weights = scores.softmax(-1)
    torch.manual_seed(11)
    found, another = (attention(q, k, v, causal=True, scale=0.125, dropout_p=p) for _ in range(2))
    torch.manual_seed(11)
    assert torch.equal(attention(q, k, v, causal=True, scale=0.125, dropout_p=p), found)
    seen = weights > 0
    kept = found != 0
    assert not kept[~seen].any()
    rate = round(p * 65536) / 65536
    assert torch.allclose(found, torch.where(kept, weights / (1 - rate), 0.0), rtol=1e-12, atol=0)
    share = float(kept[seen].double().mean())
    assert abs(share - (1 - rate)) < 5 * (rate * (1 - rate) / int(seen.sum())) ** 0.5
    masks = [kept[b, h] for b in range(2) for h in range(H)] + [(another != 0)[0, 0]]
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
    upstream = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    want = torch.autograd.grad((torch.where(kept, weights / (1 - rate), 0.0) * upstream).sum(), (q, k))
    for ours, theirs in zip(torch.autograd.grad((found * upstream).sum(), (q, k)), want, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-13)
    with torch.no_grad():
        assert torch.allclose(attention(q, k, v, causal=True, scale=0.125, dropout_p=p, training=False), weights)
