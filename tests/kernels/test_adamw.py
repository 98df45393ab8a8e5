"""The optimizer AdamW beside torch's over many steps: groups, clipping, states, masters, steps that are skipped."""

import copy
import math
from typing import Any

import pytest
import torch
from adamw_steps import DEVICE, SIZES, error, give_gradients, parameters, tensors, train, two_groups
from torch import Tensor

from fusedlm.kernels import backend
from fusedlm.kernels.adamw import AdamW

pytest.importorskip("triton", reason="the kernels need Triton")


@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize("options", [{}, {"maximize": True, "betas": (0.8, 0.95), "eps": 1e-3}, {"betas": (0.0, 0.5)}])
def test_twelve_steps_are_those_of_torch(kernels: Any, options: dict[str, Any]) -> None:
    """Two groups of their own decay and rate, a scheduler; torch in float64 is the truth, in float32 the yardstick."""

    def run(kind: Any, dtype: torch.dtype) -> list[Tensor]:
        optimizer = kind(two_groups(parameters(dtype)), lr=0.01, **options)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return train(optimizer, 12, after=schedule.step)

    truth, yardstick = run(torch.optim.AdamW, torch.float64), run(torch.optim.AdamW, torch.float32)
    with backend(kernels):
        ours = run(AdamW, torch.float32)
    assert error(truth, tensors(0, torch.float64)) > 0.05  # it moved
    assert error(ours, truth) <= 3 * error(yardstick, truth) + 1e-7


@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_is_that_of_torch(kernels: Any, max_norm: float) -> None:
    norms: list[float] = []

    def clip(params: list[Tensor]) -> None:
        norms.append(float(torch.nn.utils.clip_grad_norm_(params, max_norm)))

    truth = train(torch.optim.AdamW(parameters(torch.float64), lr=0.01, eps=0.1), 5, before=clip)
    with backend(kernels):
        params = parameters()
        optimizer = AdamW(params, lr=0.01, eps=0.1, max_norm=max_norm)
        ours = train(optimizer, 5)
    assert error(ours, truth) < 1e-6
    assert float(optimizer.total_norm) == pytest.approx(norms[-1], rel=1e-6)
    assert torch.equal(params[0].grad, tensors(104, torch.float16)[0].float())  # gradients are not scaled themselves


def test_a_rate_on_the_device_is_read_at_each_step() -> None:
    truth_rate = torch.tensor(0.01, dtype=torch.float64)
    truth = torch.optim.AdamW(parameters(torch.float64), lr=truth_rate)
    with backend("triton"):
        rate = torch.tensor(0.01, device=DEVICE)
        ours = AdamW(parameters(), lr=rate)
        schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (truth, ours)]
        found = [train(o, 4, after=s.step) for o, s in zip((truth, ours), schedules, strict=True)]
    assert ours.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.01 / 16)
    assert error(*found) < 1e-6


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_state_goes_to_torch_and_back(kernels: Any) -> None:
    truth = train(torch.optim.AdamW(parameters(torch.float64), lr=0.01), 6)
    with backend(kernels):
        for first, second in ((AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW), (AdamW, AdamW)):
            params = parameters()
            start = first(params, lr=0.01)
            train(start, 3)
            end = second(params, lr=0.5)
            end.load_state_dict(copy.deepcopy(start.state_dict()))
            assert set(end.state[params[0]]) == {"exp_avg", "exp_avg_sq", "step"}
            assert error(train(end, 3, start=3), truth) < 1e-6
            assert [float(end.state[p]["step"]) for p in params] == [6, 6, 6]


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_masters_follow_a_run_in_fp32(kernels: Any) -> None:
    """Steps far below fp16's resolution add up in the masters; the parameters are the masters, rounded."""
    with backend(kernels):
        params = parameters(torch.float16)
        wide = [p.detach().float().requires_grad_() for p in params]
        optimizer = AdamW(params, lr=1e-5)
        truth = train(torch.optim.AdamW(wide, lr=1e-5), 10)
        train(optimizer, 5)
        other = AdamW(params, lr=1.0)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        found = train(other, 5, start=5)
        masters = [other.state[p]["master"] for p in params]
    assert error(found, truth) > 1e-5  # fp16 alone would not have held them
    assert error([w.double() for w in masters], truth) < 1e-6
    assert all(torch.equal(w.half(), p) for w, p in zip(masters, params, strict=True))
    assert {s.dtype for s in other.state[params[0]].values()} == {torch.float32}


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_narrow_states_and_mixed_dtypes(kernels: Any) -> None:
    """fp16 and fp32 parameters in one step, no masters, states in fp16: right to fp16's rounding."""
    with backend(kernels):
        params = [*parameters(torch.float16), *parameters(torch.float32)]
        twins = [p.detach().double().requires_grad_() for p in params]
        optimizer = AdamW(params, lr=0.01, eps=1e-3, master_weights=False, state_dtype=torch.float16)
        found = train(optimizer, 4)
    truth = train(torch.optim.AdamW(twins, lr=0.01, eps=1e-3), 4)
    assert error(found[3:], truth[3:]) < 2e-3
    assert error(found[:3], truth[:3]) < 6e-3
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float16


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_steps_with_a_nonfinite_norm_are_skipped(kernels: Any, bad: float) -> None:
    def spoil(params: list[Tensor]) -> None:
        params[1].grad[3] = bad

    with backend(kernels):
        params = parameters()
        optimizer = AdamW(params, lr=0.01, max_norm=1.0, skip_nonfinite=True)
        train(optimizer, 2)
        before = [p.clone() for p in params], copy.deepcopy(optimizer.state_dict()["state"])
        train(optimizer, 2, before=spoil)
        assert not optimizer.total_norm.isfinite()
        assert int(optimizer.skipped) == 2
        assert all(torch.equal(p, b) for p, b in zip(params, before[0], strict=True))
        for i, state in optimizer.state_dict()["state"].items():
            assert all(torch.equal(state[name], before[1][i][name]) for name in ("step", "exp_avg", "exp_avg_sq"))
        train(optimizer, 1, start=2)
        assert int(optimizer.skipped) == 2
        assert float(optimizer.state[params[0]]["step"]) == 3
        optimizer.skip_nonfinite = False
        train(optimizer, 1, before=spoil)
    theirs = parameters()
    give_gradients(theirs, 0)
    spoil(theirs)
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)  # by a NaN norm all gradients become NaN, by an infinite one some
    assert all(torch.equal(p.isnan(), t.grad.isnan()) for p, t in zip(params, theirs, strict=True))
    assert params[1].isnan().any()


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_parameters_without_gradients_stay_and_keep_their_step(kernels: Any) -> None:
    def run(kind: Any, dtype: torch.dtype) -> tuple[list[Tensor], Any, list[Tensor]]:
        sizes = (*SIZES, (0, 4))
        params = parameters(dtype, sizes)
        optimizer = kind(params, lr=0.01)
        for missing in (0, 1, 0):
            give_gradients(params, 3)
            params[missing].grad = None
            optimizer.step()
        return [p.detach().double() for p in params[:3]], optimizer, params

    truth, _, _ = run(torch.optim.AdamW, torch.float64)
    with backend(kernels):
        found, optimizer, params = run(AdamW, torch.float32)
        assert error(found, truth) < 1e-6
        assert [float(optimizer.state[p]["step"]) for p in params] == [1, 2, 3, 3]
        optimizer.zero_grad()
        assert optimizer.step(lambda: 4.5) == 4.5
        assert error([p.detach().double() for p in params[:3]], truth) < 1e-6


def test_groups_have_rates_of_their_own_on_the_device() -> None:
    groups = two_groups(parameters(torch.float64))
    truth = train(torch.optim.AdamW([{**g, "lr": 10.0**-i} for i, g in enumerate(groups)]), 2)
    with backend("triton"):
        rates = [torch.tensor(10.0**-i, device=DEVICE) for i in range(2)]
        ours = AdamW([{**g, "lr": rates[i]} for i, g in enumerate(two_groups(parameters()))])
        assert error(train(ours, 2), truth) < 1e-6


def test_transposed_parameters_are_updated_where_they_are() -> None:
    truth = train(torch.optim.AdamW([parameters(torch.float64)[0]], lr=0.01), 3)
    with backend("triton"):
        p = parameters()[0].detach().t().contiguous().t().requires_grad_()
        assert not p.is_contiguous()
        assert error(train(AdamW([p], lr=0.01), 3), truth) < 1e-6


def test_an_optimizer_is_copied_whole() -> None:
    with backend("triton"):
        params = parameters()
        optimizer = AdamW(params, max_norm=0.5, skip_nonfinite=True)
        train(optimizer, 2)
        other = copy.deepcopy(optimizer)
        assert (other.max_norm, other.skip_nonfinite, int(other.skipped)) == (0.5, True, 0)
        assert error(train(other, 2), train(optimizer, 2)) == 0
