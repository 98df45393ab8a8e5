"""AdamW beyond the contract: against torch's optimizer over many steps, its state, shards, refusals, CUDA graphs."""

import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from fusedlm.kernels import backend
from fusedlm.kernels.adamw import AdamW, Workspace, _adamw_op, adamw, global_norm

pytest.importorskip("triton", reason="the kernels need Triton")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SIZES = ((3, 40), (17,), (48,))


def tensors(seed: int, dtype: torch.dtype = torch.float32, sizes: Any = SIZES) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=g, dtype=torch.float64).to(dtype).to(DEVICE) for size in sizes]


def parameters(dtype: torch.dtype = torch.float32, sizes: Any = SIZES) -> list[Tensor]:
    return [t.requires_grad_() for t in tensors(0, dtype, sizes)]


def give_gradients(params: list[Tensor], step: int) -> None:
    """The same numbers in every dtype: those of fp16."""
    for p, g in zip(params, tensors(100 + step, torch.float16, [p.shape for p in params]), strict=True):
        p.grad = g.to(p.dtype)


def train(
    optimizer: torch.optim.Optimizer, steps: int, *, start: int = 0, before: Any = None, after: Any = None
) -> Any:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i in range(start, start + steps):
        give_gradients(params, i)
        if before is not None:
            before(params)
        optimizer.step()
        if after is not None:
            after()
    return [p.detach().double() for p in params]


def error(found: list[Tensor], truth: list[Tensor]) -> float:
    return max(float((f - t).abs().max()) for f, t in zip(found, truth, strict=True))


def two_groups(params: list[Tensor]) -> list[dict[str, Any]]:
    return [{"params": params[:1], "weight_decay": 0.3}, {"params": params[1:], "weight_decay": 0.0, "lr": 0.02}]


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


def test_transposed_parameters_are_updated_where_they_are() -> None:
    truth = train(torch.optim.AdamW([parameters(torch.float64)[0]], lr=0.01), 3)
    with backend("triton"):
        p = parameters()[0].detach().t().contiguous().t().requires_grad_()
        assert not p.is_contiguous()
        assert error(train(AdamW([p], lr=0.01), 3), truth) < 1e-6


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


def test_an_optimizer_is_copied_whole() -> None:
    with backend("triton"):
        params = parameters()
        optimizer = AdamW(params, max_norm=0.5, skip_nonfinite=True)
        train(optimizer, 2)
        other = copy.deepcopy(optimizer)
        assert (other.max_norm, other.skip_nonfinite, int(other.skipped)) == (0.5, True, 0)
        assert error(train(other, 2), train(optimizer, 2)) == 0


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
    with pytest.raises(ValueError, match=r"params\[0\] is torch.float64; expected torch.float32 or torch.bfloat16 or"):
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


@pytest.mark.skipif(GPU, reason="two processes that share one GPU would need its own set-up")
def test_two_processes_with_shards_are_one(tmp_path: Path) -> None:
    """Rows split unevenly over two processes, one tensor replicated, one plain: the same step as without."""
    torch.multiprocessing.spawn(_shard_worker, args=(str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    for kernels in ("triton", "torch"):
        with backend("torch"):
            optimizer = AdamW(parameters(), lr=0.01, eps=0.1, max_norm=0.5)
            truth = train(optimizer, 2)
        for rank in range(2):
            found, norm = torch.load(tmp_path / f"{kernels}{rank}.pt")
            assert error(found, truth) < 1e-7
            assert norm == pytest.approx(float(optimizer.total_norm), rel=1e-6)


def _shard_worker(rank: int, store: str, out: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    placements: tuple[Any, ...] = ([Shard(0)], [Replicate()], None)

    def spread(listed: list[Tensor]) -> list[Tensor]:
        pairs = zip(listed, placements, strict=True)
        return [t if how is None else distribute_tensor(t.detach(), mesh, how) for t, how in pairs]

    for kernels in ("triton", "torch"):
        whole = tensors(7)[1:]
        with backend(kernels):  # type: ignore[arg-type]
            norm = global_norm([distribute_tensor(whole[0], mesh, [Replicate()]), whole[1]])
        assert float(norm) == pytest.approx(float(torch.cat(whole).double().norm()), rel=1e-6)  # nobody shards anything
        params = [torch.nn.Parameter(p) for p in spread(parameters())]
        with backend(kernels):  # type: ignore[arg-type]
            optimizer = AdamW(params, lr=0.01, eps=0.1, max_norm=0.5)
            for i in range(2):
                for p, g in zip(params, spread([g.float() for g in tensors(100 + i, torch.float16)]), strict=True):
                    p.grad = g
                optimizer.step()
        assert isinstance(optimizer.state[params[0]]["exp_avg"], DTensor)
        whole = [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in params]
        torch.save(([w.double() for w in whole], float(optimizer.total_norm)), f"{out}/{kernels}{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_cuda_graph_advances_at_each_replay() -> None:
    """Captured with gradients of its own; eager steps in between, with gradients elsewhere, do not disturb it."""
    truth = train(torch.optim.AdamW(parameters(torch.float64), lr=0.01), 8)
    params = parameters()
    rate = torch.tensor(0.01, device=DEVICE)
    optimizer = AdamW(params, lr=rate, max_norm=1e6, skip_nonfinite=True)
    train(optimizer, 2)
    inputs = [torch.zeros_like(p) for p in params]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for p, x in zip(params, inputs, strict=True):
            p.grad = x * 1.0  # lies in the graph's own memory
        optimizer.step()
    for i in range(2, 8):
        if i == 5:
            train(optimizer, 1, start=i)
            continue
        for x, g in zip(inputs, tensors(100 + i, torch.float16), strict=True):
            x.copy_(g)
        graph.replay()
    assert [float(optimizer.state[p]["step"]) for p in params] == [8, 8, 8]
    assert error([p.detach().double() for p in params], truth) < 1e-6
    assert int(optimizer.skipped) == 0
    inputs[0].fill_(math.nan)
    graph.replay()
    assert int(optimizer.skipped) == 1
    assert error([p.detach().double() for p in params], truth) < 1e-6
    with pytest.raises(ValueError, match="no workspace is given"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        global_norm(inputs)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_step_does_not_wait_for_the_gpu() -> None:
    optimizer = AdamW(parameters(), max_norm=1.0, skip_nonfinite=True)
    train(optimizer, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
            optimizer.step()
            optimizer.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")
