"""What an op must do, checked against its reference in float64.

The truth is the reference in float64; the yardstick is the reference in the dtype under test. An op may be wrong where
rounding makes the reference wrong, and hardly more: absolute tolerances hide bugs that this rule shows.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedlm.kernels import backend

Shape = Mapping[str, Any]
Inputs = dict[str, Any]

# Shapes to time that every row op shares: 25 million elements or more at widths from 768 to 8192.
WIDTHS: tuple[Shape, ...] = tuple(
    {"M": 2**25 // N if N > 1024 else 32768, "N": N} for N in (768, 1024, 2048, 4096, 8192)
)

LAYOUTS = ("contiguous", "padded", "transposed")
GRADIENT_LAYOUTS = ("contiguous", "padded", "transposed", "expanded")


@dataclass(frozen=True)
class OpCase:
    """An op and what is needed to check and to time it.

    op, reference: take the inputs by name and return a tensor or a tuple of tensors.
    inputs: makes the inputs of a shape from a generator, on the generator's device (or torch's current one): floating-
    point tensors in float64, which are cast to the dtype under test, and anything else as it is.
    shapes: for the contract; small, odd, and with more rows than programs. large: for the contract too, on a GPU alone,
    since interpreting would take too long.
    gradients: inputs that are differentiated. fixed: floating-point inputs that keep float32 (tables of angles).
    traffic: elements read and written by (forward, backward) at a shape, each input and output once.
    flops: floating-point operations of (forward, backward), where products and not memory set the limit.
    bench: shapes to time, in bench_dtype. checked: the shape to check in place of one to time, where the reference in
    float64 would need too much memory. compiled: shapes beside these that have compiled code of their own. timed: what
    is timed where it is not op itself (op copies what timed writes into). left: whether op by itself leaves inputs,
    with gradients or without, to torch's own implementation, which was measured faster; timed does not.
    together: forward and backward are timed as one, because one does the other's work. deterministic: whether the same
    call gives the same bits by itself, and not only where torch is asked for deterministic algorithms.
    max_ratio, rms_ratio: where an op's rounding differs from the reference's, with why.
    """

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[[Shape, torch.Generator | None], Inputs]
    shapes: tuple[Shape, ...]
    large: tuple[Shape, ...] = ()
    gradients: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    traffic: Callable[[Shape], tuple[int, int]] | None = None
    flops: Callable[[Shape], tuple[int, int]] | None = None
    bench: tuple[Shape, ...] = ()
    bench_dtype: torch.dtype = torch.bfloat16
    compiled: tuple[Shape, ...] = ()
    checked: Callable[[Shape], Shape] = lambda shape: shape
    timed: Callable[..., Any] | None = None
    left: Callable[[Inputs, bool], bool] | None = None
    together: bool = False
    deterministic: bool = True
    max_ratio: float = 2.0
    rms_ratio: float = 1.1
    empty: Shape | None = None  # a shape with no elements


def randn(generator: torch.Generator | None, *shape: int) -> Tensor:
    """Normal numbers in float64 on the generator's device, or torch's current one."""
    device = None if generator is None else generator.device
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=device)


def _outputs(result: Any) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _lay_out(t: Tensor, layout: str, gap: int) -> Tensor:
    """The same values with other strides. gap: between rows of a padded tensor, of each another, since an op may read
    one with the stride of another."""
    if t.ndim == 0:
        return t
    if layout == "padded":  # a slice of something wider, that begins at an odd address
        wide = torch.full((*t.shape[:-1], t.shape[-1] + gap), math.nan, dtype=t.dtype, device=t.device)
        view = wide[..., 1 : 1 + t.shape[-1]]
        return view.copy_(t)
    if layout == "transposed" and t.ndim > 1:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded":  # one number for all, as the gradient of a sum is
        return t.flatten()[:1].view((1,) * t.ndim).expand(t.shape) if t.numel() else t
    return t.contiguous()


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, torch.empty and its kin give NaN (a large number for integers), so that what nobody writes shows."""
    originals = {name: getattr(torch, name) for name in ("empty", "empty_like", "empty_strided")}

    def poison(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*args: Any, **kwargs: Any) -> Tensor:
            t = function(*args, **kwargs)
            with torch.no_grad():  # torch.empty(requires_grad=True)
                return t.fill_(
                    math.nan if t.is_floating_point() else 2**30 if t.dtype in (torch.int32, torch.int64) else 1
                )

        return make

    for name, function in originals.items():
        setattr(torch, name, poison(function))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(torch, name, function)


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Inside, torch is asked for deterministic algorithms, and warns where it has none."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@dataclass(frozen=True)
class _Run:
    outputs: list[Tensor]
    gradients: dict[str, Tensor]


def _run(case: OpCase, function: Callable[..., Any], inputs: Inputs, upstream: list[Tensor] | None) -> _Run:
    """Outputs, and gradients for the given upstream ones."""
    leaves = {
        name: value.detach().requires_grad_() if name in case.gradients and upstream is not None else value
        for name, value in inputs.items()
    }
    outputs = _outputs(function(**leaves))
    if upstream is None:
        return _Run([o.detach() for o in outputs], {})
    floats = [o for o in outputs if o.requires_grad]
    wanted = [leaves[name] for name in case.gradients]
    found = torch.autograd.grad(floats, wanted, upstream[: len(floats)])
    return _Run([o.detach() for o in outputs], dict(zip(case.gradients, found, strict=True)))


def _error(ours: Tensor, yardstick: Tensor, truth: Tensor, case: OpCase) -> str | None:
    """Why ours is not good enough, or None."""
    if ours.shape != truth.shape:
        return f"shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    if ours.dtype != yardstick.dtype:
        return f"dtype {ours.dtype}, expected {yardstick.dtype}"
    if not ours.is_floating_point():
        return None if torch.equal(ours.cpu(), truth.cpu().to(ours.dtype)) else "differs from the reference"
    if truth.numel() == 0:
        return None
    truth = truth.to(torch.float64)
    if not torch.equal(ours.isfinite(), truth.isfinite()):
        return "has NaN or infinity where the reference has none, or the other way round"
    finite = truth.isfinite()
    difference = (ours.to(torch.float64) - truth)[finite].abs()
    allowed = (yardstick.to(torch.float64) - truth)[finite].abs()
    if difference.numel() == 0:
        return None
    narrow = ours.dtype in (torch.bfloat16, torch.float16)
    most, rms = (case.max_ratio, case.rms_ratio) if narrow else (4.0, 2.0)
    # What rounding alone would do to values of this size; a reference that happens to be exact is no yardstick.
    floor = torch.finfo(ours.dtype).eps * float(truth[finite].square().mean().sqrt())
    limits = (
        ("largest", float(difference.max()), most * float(allowed.max()) + (0.5 if narrow else 4) * floor),
        ("RMS", _rms(difference), rms * _rms(allowed) + (0.02 if narrow else 0.5) * floor),
    )
    for what, found, limit in limits if finite.sum() >= 32 else limits[:1]:  # the RMS of a few numbers says little
        if not found <= limit:
            return f"{what} error {found:.3g}, above {limit:.3g}"
    return None


def _rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt())


def check(
    case: OpCase,
    shape: Shape,
    *,
    dtype: torch.dtype,
    device: torch.device,
    scale: float = 1.0,
    layout: str = "contiguous",
    gradient_layout: str = "contiguous",
    seed: int = 0,
    transform: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda op: op,
) -> None:
    """Raise AssertionError, which says what is wrong, unless the op keeps the contract at this shape and dtype.

    Runs the op's Triton kernels (`backend("triton")`); values and every gradient against float64, inputs and incoming
    gradients unmodified, the same call twice equal bit for bit, all of it in poisoned memory.
    scale: factor on floating-point inputs. layout, gradient_layout: strides of inputs and of incoming gradients.
    transform: wraps the op (torch.compile).
    """
    generator = torch.Generator().manual_seed(seed)
    made = case.inputs(shape, generator)
    inputs: Inputs = {}
    for gap, (name, value) in enumerate(made.items(), 3):
        if _is_float(value):
            value = (value * (1 if name in case.fixed else scale)).to(torch.float32 if name in case.fixed else dtype)
            value = _lay_out(value.to(device), layout, gap)
        elif isinstance(value, Tensor):
            value = value.to(device)
        inputs[name] = value
    exact = {name: v.to(torch.float64) if _is_float(v) else v for name, v in inputs.items()}
    with torch.no_grad():
        outputs = _outputs(case.reference(**inputs))
    upstream = upstream64 = None
    if case.gradients:
        floats = [o for o in outputs if o.is_floating_point()]
        random = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in floats]
        cast = [(r * scale).to(o.dtype).to(device) for r, o in zip(random, floats, strict=True)]
        upstream = [_lay_out(r, gradient_layout, gap) for gap, r in enumerate(cast, 3 + len(made))]
        upstream64 = [u.to(torch.float64) for u in upstream]
    truth = _run(case, case.reference, exact, upstream64)
    yardstick = _run(case, case.reference, inputs, upstream)
    kept = {name: v.clone() for name, v in inputs.items() if isinstance(v, Tensor)}
    kept_upstream = [u.clone() for u in upstream or ()]
    op = transform(case.op)
    with backend("triton"), poisoned_memory():
        ours, plain = _run(case, op, inputs, upstream), _run(case, op, inputs, None)
        same = ours
        with nullcontext() if case.deterministic else deterministic_algorithms():
            if not case.deterministic:
                same = _run(case, op, inputs, upstream)
            again = _run(case, op, inputs, upstream)
    where = f"{case.name} {dict(shape)} {dtype} scale {scale} {layout}/{gradient_layout}"
    for i, (o, y, t) in enumerate(zip(ours.outputs, yardstick.outputs, truth.outputs, strict=True)):
        message = _error(o, y, t, case)
        assert message is None, f"{where}: output {i}: {message}"
        message = _error(plain.outputs[i], y, t, case)
        assert message is None, f"{where}: output {i} without gradients: {message}"
        assert _same(same.outputs[i], again.outputs[i]), f"{where}: output {i} differs between two calls"
    for name in case.gradients:
        for found in (ours, again):
            message = _error(found.gradients[name], yardstick.gradients[name], truth.gradients[name], case)
            assert message is None, f"{where}: gradient of {name}: {message}"
        assert _same(same.gradients[name], again.gradients[name]), f"{where}: gradient of {name} differs between calls"
    for name, before in kept.items():
        assert _same(inputs[name], before), f"{where}: {name} was modified"
    for before, now in zip(kept_upstream, upstream or (), strict=True):
        assert _same(now, before), f"{where}: an incoming gradient was modified"


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(1e4), b.nan_to_num(1e4)) if a.is_floating_point() else torch.equal(a, b)


def checks(case: OpCase, *, dtypes: tuple[torch.dtype, ...]) -> Iterator[tuple[Shape, dict[str, Any]]]:
    """The settings of `check` that make the whole contract of an op: shapes, dtypes, scales, strides, emptiness.

    Strides are gone through in the first dtype only: addresses do not depend on it.
    """
    for dtype in dtypes:
        for shape in case.shapes:
            for scale in (1.0, 1e-2):
                yield shape, {"dtype": dtype, "scale": scale}
        for layout in LAYOUTS if dtype == dtypes[0] else ():
            for gradient_layout in GRADIENT_LAYOUTS if case.gradients else ("contiguous",):
                yield case.shapes[0], {"dtype": dtype, "layout": layout, "gradient_layout": gradient_layout}
        if case.empty is not None:
            yield case.empty, {"dtype": dtype}
