"""The op adamw() and global_norm(): what is computed where, workspaces, refusals, torch.compile."""

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adamw_steps import DEVICE, error, parameters, tensors
from torch import Tensor

from fusedlm.kernels import backend
from fusedlm.kernels.adamw import AdamW, Workspace, _adamw_op, adamw, global_norm

pytest.importorskip("triton", reason="the kernels need Triton")


def test_the_first_step_is_the_rate_with_the_gradient_s_sign() -> None:
    """Both corrections divide by what the moments were just multiplied with: 1 - 0.9 and 1 - 0.999, exactly."""
    with backend("triton"):
        zeros = [[torch.zeros(40, device=DEVICE)] for _ in range(3)]
        g = tensors(0, sizes=((40,),))
        adamw(zeros[0], g, *zeros[1:], step=torch.zeros((), device=DEVICE), lr=1.0, weight_decay=0.0)
    torch.testing.assert_close(zeros[0][0], -g[0].sign(), rtol=1e-6, atol=0)


def test_one_step_counter_for_all_and_masters_for_some() -> None:
    with backend("triton"):
        params = [*tensors(0), *tensors(1, torch.float16)]
        grads = [*tensors(2), *tensors(3)]
        masters = [None, None, None, *(p.float() for p in params[3:])]
        start = [p.float().double() for p in params]
        m, v = ([torch.zeros_like(g) for g in grads] for _ in range(2))
        step = torch.full((1,), 4.0, device=DEVICE)
        norm = adamw(params, grads, m, v, masters, step=step, lr=0.1, eps=1.0, weight_decay=0.5, max_norm=2.0)
    assert step.tolist() == [5.0]
    total = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    assert float(norm) == pytest.approx(total, rel=1e-6)
    for i, w in enumerate(start):
        g = grads[i].double() * 2 / total
        root = (0.001 * g * g / (1 - 0.999**5)).sqrt()
        expected = w * 0.95 - 0.1 * (0.1 * g / (1 - 0.9**5)) / (root + 1)
        found = (params[i] if masters[i] is None else masters[i]).double()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(params[i].double(), expected, rtol=1e-3, atol=1e-3 if i > 2 else 1e-6)
        torch.testing.assert_close(m[i].double(), 0.1 * g, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_a_norm_from_elsewhere_is_used(kernels: Any) -> None:
    """As where more is clipped together than one process holds."""
    given = torch.tensor([8.0], dtype=torch.float64, device=DEVICE)
    with backend(kernels):
        m = [torch.zeros_like(t) for t in tensors(0)]
        v = [torch.zeros_like(t) for t in tensors(0)]
        step = torch.zeros((), device=DEVICE)
        norm = adamw(tensors(0), tensors(1), m, v, step=step, betas=(0.0, 0.5), max_norm=2.0, total_norm=given)
    assert norm is given
    assert error([t.double() for t in m], [t.double() / 4 for t in tensors(1)]) < 1e-6


def test_a_workspace_follows_what_moves() -> None:
    """Gradients that move, lose their alignment or their order; other numbers; other tensors: the tables follow."""

    def odd(g: Tensor) -> Tensor:
        return torch.cat((g.new_zeros(1), g.flatten()))[1:].view(g.shape)

    def reordered(g: Tensor) -> Tensor:
        return g.t().contiguous().t() if g.ndim == 2 else g

    def narrow(g: Tensor) -> Tensor:
        return g.half()

    workspace = Workspace()
    kept: list[Any] = []
    with backend("triton"):
        params, twins = tensors(0), tensors(0, torch.float64)
        states, truth_states = ([[torch.zeros_like(p) for p in ps] for _ in range(2)] for ps in (params, twins))
        step, truth_step = (torch.zeros((), device=DEVICE) for _ in range(2))
        changes: tuple[Callable[[Tensor], Tensor], ...] = (Tensor.clone, Tensor.clone, odd, reordered, narrow)
        for i, change in enumerate(changes):
            grads = tensors(10 + i, torch.float16)
            moved = [change(g.float()) for g in grads]
            kept.append(moved)  # so that the next ones lie elsewhere
            if i == 3:  # a parameter that moves
                params[1] = params[1].clone()
            adamw(params, moved, *states, step=step, lr=0.1 / (i + 1), workspace=workspace)
            with backend("torch"):
                doubles = [g.double() for g in grads]
                adamw(twins, doubles, *truth_states, step=truth_step, lr=0.1 / (i + 1))
            assert error([p.double() for p in params], twins) < 1e-6


def test_wide_accesses_are_for_aligned_tensors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter does not mind what a GPU would stop at, so look at what is launched."""
    launched: list[tuple[int, bool]] = []

    def spy(kernel: Any, grid: Any, key: Any, tensors: Any, scalars: Any, constants: dict[str, Any]) -> None:
        if "EXP_AVG" in constants:
            launched.append((grid[0], constants["ALIGNED"]))

    def odd(t: Tensor) -> Tensor:
        return torch.cat((t.new_zeros(1), t.flatten()))[1:]

    monkeypatch.setattr(sys.modules["fusedlm.kernels.adamw.step"], "launch", spy)
    for moved in range(5):
        lists = [tensors(i, sizes=((48,), (64,), (47,))) for i in range(4)]
        if moved < 4:
            lists[moved][1] = odd(lists[moved][1])
        launched.clear()
        with backend("triton"):
            adamw(*lists, step=torch.zeros((), device=DEVICE))
        assert launched == ([(1, True), (2, False)] if moved < 4 else [(2, True), (1, False)])


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_global_norm(kernels: Any) -> None:
    with backend(kernels):
        parts = [*tensors(0, sizes=((7, 130), (0,), (1,))), *tensors(1, torch.float16), tensors(2)[0].t()]
        truth = math.sqrt(sum(float(t.double().square().sum()) for t in parts))
        norm = global_norm(parts)
        assert norm.shape == ()
        assert norm.dtype == torch.float32
        assert float(norm) == pytest.approx(truth, rel=3e-7)
        assert torch.equal(norm, global_norm(parts))
        assert float(global_norm([])) == 0
        assert float(global_norm([torch.zeros(0, device=DEVICE)])) == 0


def test_what_does_not_fit_is_refused() -> None:
    def call(**changed: Any) -> None:
        given = {"params": tensors(0), "grads": tensors(1), "exp_avgs": tensors(2)}
        given["exp_avg_sqs"] = [t.square() for t in tensors(3)]
        given["step"] = torch.zeros((), device=DEVICE)
        with backend("triton"):
            adamw(**{**given, **changed})

    call()
    other = tensors(1, sizes=((3, 40), (18,), (48,)))
    for name in ("grads", "exp_avgs", "exp_avg_sqs", "masters"):
        with pytest.raises(ValueError, match=rf"{name}\[1\] has shape \(18,\); expected \(17,\), params\[1\]'s"):
            call(**{name: other})
        with pytest.raises(ValueError, match=f"{name} has 2 tensors; expected one for each of the 3 params"):
            call(**{name: tensors(1)[:2]})
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] .*strides \(1, 3\); expected a tensor without gaps"):
        call(exp_avgs=[t.t().contiguous().t() if t.ndim == 2 else t for t in tensors(2)])
    with pytest.raises(ValueError, match=r"params\[0\] .*strides \(80, 2\); expected a tensor without gaps"):
        call(params=[t.repeat_interleave(2, -1)[..., ::2] for t in tensors(0)])
    with pytest.raises(ValueError, match=r"kernels .* need torch.float32, .*; got a tensor of torch.float64"):
        call(params=tensors(0, torch.float64))
    with pytest.raises(ValueError, match=r"masters\[0\] is torch.float16; expected torch.float32"):
        call(masters=tensors(0, torch.float16))
    with pytest.raises(ValueError, match=r"step 0 is \(\) torch.int64 on .*; expected one element of torch.float32"):
        call(step=torch.zeros((), dtype=torch.int64, device=DEVICE))
    with pytest.raises(ValueError, match=r"step has 2 tensors; expected one for each of the 3 params"):
        call(step=[torch.zeros((), device=DEVICE)] * 2)
    for name, value in (("lr", -1.0), ("lr", math.nan), ("eps", -1.0), ("weight_decay", -0.1), ("max_norm", -1.0)):
        with pytest.raises(ValueError, match=rf"^{name} is {value}; expected 0 or more"):
            call(**{name: value})
    with pytest.raises(ValueError, match=r"^betas\[1\] is 1.0; expected 0 <= beta < 1"):
        call(betas=(0.9, 1.0))
    with pytest.raises(ValueError, match=r"^lr has shape \(2,\); expected one element"):
        call(lr=torch.ones(2, device=DEVICE))
    with pytest.raises(ValueError, match=r"^skipped is None; expected one element of torch.int64"):
        call(skip_nonfinite=True)
    with pytest.raises(ValueError, match=r"^total_norm is \(2,\) on .*; expected one element"):
        call(max_norm=1.0, total_norm=torch.ones(2, device=DEVICE))
    with pytest.raises(ValueError, match=r"^amsgrad is True; expected False"):
        AdamW(parameters(), amsgrad=True)
    with pytest.raises(ValueError, match=r"^differentiable is True; expected False"):
        AdamW(parameters(), differentiable=True)
    sparse = [t.to_sparse() for t in tensors(1)]
    with pytest.raises(ValueError, match=r"^grads\[0\] is torch.sparse_coo; expected torch.float32 or"):
        call(grads=sparse)
    theirs = torch.optim.AdamW(parameters(), amsgrad=True)
    with pytest.raises(ValueError, match=r"^amsgrad is True; expected False"):
        AdamW(parameters()).load_state_dict(theirs.state_dict())


def test_the_operator_for_compile_is_sound() -> None:
    params, grads, m, v = (tensors(i) for i in range(4))
    v = [t.square() for t in v]
    step, skipped = torch.zeros((), device=DEVICE), torch.zeros((), dtype=torch.int64, device=DEVICE)
    numbers = (0.1, 0.9, 0.99, 1e-8, 0.1, False, 1.0, True)
    arguments = (params, grads, m, v, [], [step], [skipped], None, None, *numbers)
    torch.library.opcheck(_adamw_op, arguments, test_utils=("test_schema", "test_faketensor"))

    def run(params: list[Tensor], step: Tensor) -> Any:
        lists = [[t.clone() for t in listed] for listed in (m, v)]
        return adamw(params, grads, *lists, step=step, lr=0.1, max_norm=1.0)

    plain, compiled = ([t.clone() for t in params] for _ in range(2))
    steps = [torch.zeros((), device=DEVICE) for _ in range(2)]
    norm = run(plain, steps[0])
    again = torch.compile(run, fullgraph=True, backend="aot_eager")(compiled, steps[1])
    assert torch.equal(norm, again)
    assert all(torch.equal(a, b) for a, b in zip([*plain, steps[0]], [*compiled, steps[1]], strict=True))
    assert not torch.equal(plain[0], params[0])
