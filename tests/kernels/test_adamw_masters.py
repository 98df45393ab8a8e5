"""Masters of bf16 parameters as the lower half of their bits: exact, whatever the number, and followed by AdamW."""

import io
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from adamw_steps import DEVICE, GPU, give_gradients, parameters, tensors, train, with_masters_whole
from torch import Tensor

from fusedlm.kernels import backend
from fusedlm.kernels.adamw import AdamW, adamw, adamw_ref, join_master, new_master, set_master, split_master

pytest.importorskip("triton", reason="the kernels need Triton")

LOWS = (0, 1, 2, 0x1234, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xABCD, 0xFFFE, 0xFFFF)


def floats(bits: Any) -> Tensor:
    return torch.from_numpy(np.asarray(bits, np.uint32).view(np.float32)).to(DEVICE)


def bits_of(t: Tensor) -> np.ndarray[Any, Any]:
    return t.detach().cpu().view(torch.int32).numpy().view(np.uint32)


def every_upper_half() -> np.ndarray[Any, Any]:
    return np.arange(2**16, dtype=np.uint32) << 16


def rounded(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """fp32 numbers in the nearest of 8 bits, in fp64; those halfway go away from 0."""
    wide = values.astype(np.float64)
    _, exponent = np.frexp(wide)
    quantum = np.exp2(np.maximum(exponent, -125) - 8.0)  # one more where the number is denormal
    near = np.floor(np.abs(wide) / quantum + 0.5) * quantum
    return np.copysign(np.where(near < 2.0**128, near, np.inf), wide)


def same(a: Tensor, b: Tensor) -> bool:
    return bool((bits_of(a) == bits_of(b)).all())


def test_every_number_comes_back() -> None:
    """All upper halves, with lower ones around what is halfway: denormals, zeros, infinities and NaN among them."""
    for low in LOWS:
        bits = every_upper_half() | np.uint32(low)
        w = floats(bits)
        p, rest = split_master(w)
        assert (p.dtype, rest.dtype) == (torch.bfloat16, torch.int16)
        again = join_master(p, rest)
        nan = np.isnan(w.cpu().numpy())
        assert (bits_of(again)[~nan] == bits[~nan]).all()
        assert np.array_equal(p.isnan().cpu().numpy(), nan)
        assert np.array_equal(again.isnan().cpu().numpy(), nan)
        assert not rest.cpu().numpy()[nan].any()
        found, expected = p.double().cpu().numpy()[~nan], rounded(w.cpu().numpy()[~nan])
        assert np.array_equal(found, expected)
        assert np.array_equal(np.signbit(found), np.signbit(expected))
        if low != 0x8000:  # bf16's usual rounding, but for ties
            assert np.array_equal(found, w.bfloat16().double().cpu().numpy()[~nan])


def test_a_parameter_that_was_written_is_what_counts() -> None:
    """Its master rounds to it, whatever the lower half is of; zeros among them, below whose bits are those of NaN."""
    p = floats(every_upper_half()).bfloat16()
    finite = p.isfinite()
    for low in (-0x8000, -0x7FFF, -1, 0, 1, 0x7FFF):
        master = join_master(p, torch.full_like(p, low, dtype=torch.int16))
        again, _ = split_master(master)
        assert torch.equal(again.view(torch.int16)[finite], p.view(torch.int16)[finite])
        assert master[finite].isfinite().all()
    assert join_master(torch.zeros(1).bfloat16(), torch.tensor([-5], dtype=torch.int16)).tolist() == [0.0]


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_a_step_of_length_0_keeps_every_bit(kernels: Any) -> None:
    """Every exponent, of both signs, with mantissas at their ends; a NaN becomes the quiet one, with nothing below."""
    upper = every_upper_half()
    mantissa = (upper >> 16) & 0x7F
    upper = upper[np.isin(mantissa, (0, 1, 63, 126, 127))]
    half = torch.from_numpy((upper[:, None] >> 16).repeat(len(LOWS), 1).astype(np.uint16).view(np.int16))
    p = half.to(DEVICE).view(torch.bfloat16).contiguous()
    low = torch.from_numpy(np.array(LOWS, np.uint16).view(np.int16)).to(DEVICE).expand(p.shape).contiguous()
    expected = split_master(join_master(p, low))
    zeros = [[torch.zeros_like(p, dtype=torch.float32)] for _ in range(3)]
    with backend(kernels):
        adamw([p], *zeros, [low], step=torch.zeros((), device=DEVICE), lr=0.0)
    assert torch.equal(p.view(torch.int16), expected[0].view(torch.int16))
    assert torch.equal(low, expected[1])


def wide_twin(params: list[Tensor]) -> list[Tensor]:
    return [p.detach().float().requires_grad_() for p in params]


def masters_of(optimizer: AdamW, params: list[Tensor]) -> list[Tensor]:
    return [join_master(p.detach(), optimizer.state[p]["master_low"]) for p in params]


def train_both(narrow: AdamW, wide: AdamW, steps: int, start: int = 0) -> None:
    """With the same gradients, those of the narrow one."""
    params, twins = (optimizer.param_groups[0]["params"] for optimizer in (narrow, wide))
    for i in range(start, start + steps):
        give_gradients(params, i)
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad.float()
        narrow.step()
        wide.step()


def bf16_parameters() -> list[Tensor]:
    p = [*parameters(torch.bfloat16), *parameters(torch.bfloat16, ((0, 4), (16, 16)))]
    p[0] = p[0].detach().t().contiguous().t().requires_grad_()
    return p


@pytest.mark.parametrize(
    "options", [{}, {"max_norm": 0.5, "weight_decay": 0.3, "betas": (0.8, 0.95), "maximize": True}]
)
def test_many_steps_far_below_bf16s_resolution_are_those_of_fp32(options: dict[str, Any]) -> None:
    """Bit for bit those that the same kernels make of fp32 parameters."""
    with backend("triton"):
        params = bf16_parameters()
        first, twins = [p.detach().clone() for p in params], wide_twin(params)
        narrow, wide = AdamW(params, lr=1e-6, **options), AdamW(twins, lr=1e-6, **options)
        train_both(narrow, wide, 40)
    masters = masters_of(narrow, params)
    assert all(same(w, q) for w, q in zip(masters, twins, strict=True))
    assert all(torch.equal(p, split_master(w)[0]) for p, w in zip(params, masters, strict=True))
    moved = torch.cat([(w - p.float()).abs().flatten() for w, p in zip(masters, first, strict=True)])
    still = torch.cat([(q == p).flatten() for q, p in zip(params, first, strict=True)])
    assert 1e-6 < float(moved.mean()) < 1e-4
    assert float(still.double().mean()) > 0.9  # steps alone would not have moved them


def test_torchs_operations_do_the_same() -> None:
    params = bf16_parameters()
    masters = [p.detach().float() for p in params]
    lows = [new_master(p)["master_low"] for p in params]
    states = [[torch.zeros_like(p, dtype=torch.float32) for p in params] for _ in range(4)]
    steps = [torch.zeros((), device=DEVICE) for _ in range(2)]
    hyper: dict[str, Any] = {"lr": 1e-6, "weight_decay": 0.3}
    for i in range(20):
        grads = tensors(100 + i, torch.bfloat16, [p.shape for p in params])
        with backend("torch"), torch.no_grad():
            adamw(params, grads, *states[:2], lows, step=steps[0], **hyper)
            adamw_ref(masters, [g.float() for g in grads], *states[2:], step=steps[1], **hyper)
    joined = [join_master(p.detach(), low) for p, low in zip(params, lows, strict=True)]
    assert all(same(w, m) for w, m in zip(joined, masters, strict=True))
    assert not same(joined[1], params[1].detach().float())


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_what_is_no_number_or_too_large_shows(kernels: Any) -> None:
    p = torch.tensor([1.0, 1.0, 3.38e38, -3.38e38, 1.0], device=DEVICE).bfloat16()
    low = torch.full_like(p, -7, dtype=torch.int16)
    grads = torch.tensor([math.nan, math.inf, -1.0, 1.0, 0.0], device=DEVICE)
    states = [[torch.zeros(5, device=DEVICE)] for _ in range(2)]
    with backend(kernels):
        adamw([p], [grads], *states, [low], step=torch.zeros((), device=DEVICE), lr=2e37, weight_decay=0.0)
    assert p[:2].isnan().all()
    assert p[2:4].tolist() == [math.inf, -math.inf]
    assert low.tolist() == [0, 0, 0, 0, -7]
    assert join_master(p, low)[2:4].tolist() == [math.inf, -math.inf]


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_states_are_saved_and_loaded(kernels: Any) -> None:
    with backend(kernels):
        params = bf16_parameters()
        twins = [p.detach().clone().requires_grad_() for p in params]
        optimizer = AdamW(params, lr=1e-4)
        train(optimizer, 3)
        file = io.BytesIO()
        torch.save([optimizer.state_dict(), [p.detach() for p in params]], file)
        file.seek(0)
        state, values = torch.load(file, weights_only=True)
        other = AdamW(twins, lr=1.0)
        train(other, 1)
        other.load_state_dict(state)
        for q, value in zip(twins, values, strict=True):
            q.detach().copy_(value)
        for o in (optimizer, other):
            train(o, 3, start=3)
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)
        assert other.state[q].keys() == {"exp_avg", "exp_avg_sq", "step", "master_low"}
        assert other.state[q]["master_low"].dtype == torch.int16
        assert torch.equal(optimizer.state[p]["master_low"], other.state[q]["master_low"])
    assert any(low.any() for low in (other.state[q]["master_low"] for q in twins))


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_a_state_with_masters_whole_is_taken_apart(kernels: Any) -> None:
    """A parameter is its master's rounding then, also of one that is halfway, which was rounded to even."""
    with backend(kernels):
        params = bf16_parameters()
        optimizer = AdamW(params, lr=1e-4)
        train(optimizer, 3)
        halfway = torch.full_like(params[1], 1 + 2**-8, dtype=torch.float32)
        set_master(params[1], optimizer.state[params[1]]["master_low"], halfway)
        twins = [w.bfloat16().requires_grad_() for w in masters_of(optimizer, params)]
        assert set(twins[1].tolist()) == {1.0}
        assert set(params[1].tolist()) == {1 + 2**-7}
        other = AdamW(twins, lr=1.0)
        other.load_state_dict(with_masters_whole(optimizer))
        for steps in (0, 3):
            for o in (optimizer, other):
                train(o, steps, start=3)
            for p, q in zip(params, twins, strict=True):
                assert torch.equal(p, q)
                assert torch.equal(optimizer.state[p]["master_low"], other.state[q]["master_low"])
                assert "master" not in other.state[q]
        pure = AdamW([p.detach().clone().requires_grad_() for p in params], master_weights=False)
        pure.load_state_dict(with_masters_whole(optimizer))
        train(pure, 1)
        assert pure.state[pure.param_groups[0]["params"][0]].keys() == {"exp_avg", "exp_avg_sq", "step"}
        half = AdamW([p.detach().half().requires_grad_() for p in params])
        half.load_state_dict(optimizer.state_dict())
        train(half, 1)
        assert half.state[half.param_groups[0]["params"][0]].keys() == {"exp_avg", "exp_avg_sq", "step", "master"}


@pytest.mark.parametrize("kernels", ["torch", *(["triton"] if GPU else [])])  # the interpreter truncates to bf16
def test_whole_masters_of_bf16_parameters_are_taken_as_well(kernels: Any) -> None:
    params = tensors(0, torch.bfloat16)
    masters = [p.float() for p in params]
    states = [[torch.zeros_like(w) for w in masters] for _ in range(2)]
    with backend(kernels):
        adamw(params, tensors(1), *states, masters, step=torch.zeros((), device=DEVICE), lr=1e-4)
    assert all(torch.equal(p, w.bfloat16()) for p, w in zip(params, masters, strict=True))
    assert not torch.equal(params[1].float(), masters[1])


def test_a_lower_half_at_an_odd_address_has_no_wide_accesses(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[str, bool]] = []

    def spy(kernel: Any, grid: Any, key: Any, tensors: Any, scalars: Any, constants: dict[str, Any]) -> None:
        if "MASTER" in constants:
            launched.append((constants["MASTER"], constants["ALIGNED"]))

    monkeypatch.setattr(sys.modules["fusedlm.kernels.adamw.step"], "launch", spy)
    for low in (
        torch.zeros(64, dtype=torch.int16, device=DEVICE),
        torch.zeros(65, dtype=torch.int16, device=DEVICE)[1:],
    ):
        lists = [tensors(i, torch.bfloat16, ((64,),)) for i in range(4)]
        with backend("triton"):
            adamw(*lists, [low], step=torch.zeros((), device=DEVICE))
    assert launched == [("int16", True), ("int16", False)]


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_what_does_not_fit_is_refused(kernels: Any) -> None:
    def call(dtype: torch.dtype, masters: Any) -> None:
        lists = [tensors(i, dtype, ((8,),)) for i in range(4)]
        with backend(kernels):
            adamw(*lists, [masters], step=torch.zeros((), device=DEVICE))

    low = torch.zeros(8, dtype=torch.int16, device=DEVICE)
    call(torch.bfloat16, low)
    for dtype in (torch.float16, torch.float32):
        with pytest.raises(
            ValueError, match=r"masters\[0\] is torch.int16; expected torch.float32(, dense| or torch.f)"
        ):
            call(dtype, low)
    with pytest.raises(ValueError, match=r"masters\[0\] is torch.bfloat16; expected torch.float32 or torch.int16"):
        call(torch.bfloat16, low.bfloat16())
    with pytest.raises(ValueError, match=r"^master is torch.float16; expected torch.float32"):
        split_master(low.half())
    with pytest.raises(ValueError, match=r"^p is torch.float16 and low torch.int16; expected torch.bfloat16 and torch"):
        join_master(low.half(), low)
    with pytest.raises(ValueError, match=r"^low has shape \(4,\); expected \(8,\), p's"):
        join_master(low.bfloat16(), low[:4])
