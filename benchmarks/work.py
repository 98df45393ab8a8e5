"""An op or a peer at one shape: its inputs, and what is timed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Work
from fusedlm.testing import OpCase, Shape

Inputs = dict[str, Any]


def make_inputs(case: OpCase, shape: Shape, seed: int, device: torch.device) -> Inputs:
    """Inputs in the case's dtype; those that are differentiated require a gradient."""
    made = {}
    for name, value in case.inputs(shape, torch.Generator(device).manual_seed(seed)).items():
        if isinstance(value, Tensor):
            value = value.to(device)
            if value.is_floating_point():
                value = value.to(torch.float32 if name in case.fixed else case.bench_dtype)
            value.requires_grad_(name in case.gradients)
        made[name] = value
    return made


def own_copy(inputs: Inputs) -> Inputs:
    """The same values in memory of its own, for a variant that writes into its inputs."""
    return {
        name: v.detach().clone().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v
        for name, v in inputs.items()
    }


def _outputs(result: Any) -> list[Tensor]:
    return [o for o in (result if isinstance(result, tuple | list) else (result,)) if isinstance(o, Tensor)]


def _upstream(output: Tensor) -> Tensor:
    """A random gradient; for a loss it is 1, which is what training has."""
    return torch.ones_like(output) if output.ndim == 0 else torch.randn_like(output)


def works(case: OpCase, function: Callable[..., Any], sets: list[Inputs]) -> dict[str, Work]:
    """What is timed, by direction: the forward pass alone and the backward pass of outputs computed before, or "both".

    Works are made when they are first called: the backward pass keeps what its forward pass saved.
    """

    def forward(i: int) -> object:
        with torch.no_grad():
            return function(**sets[i])

    def both(i: int) -> object:
        outputs = [o for o in _outputs(function(**sets[i])) if o.requires_grad]
        return torch.autograd.grad(outputs, [sets[i][n] for n in case.gradients], [_upstream(o) for o in outputs])

    if not case.gradients:
        return {"forward": forward}
    if case.together:
        return {"both": both}
    saved: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def backward(i: int) -> object:
        if i not in saved:
            outputs = [o for o in _outputs(function(**sets[i])) if o.requires_grad]
            saved[i] = outputs, [_upstream(o) for o in outputs]
        outputs, upstream = saved[i]
        return torch.autograd.grad(outputs, [sets[i][n] for n in case.gradients], upstream, retain_graph=True)

    return {"forward": forward, "backward": backward}


def disagreement(case: OpCase, function: Callable[..., Any], inputs: Inputs) -> float:
    """RMS of the difference between a peer's outputs and the reference's, over that of the reference's."""

    def flat(result: Any) -> Tensor:
        return torch.cat([o.float().nan_to_num().flatten() for o in _outputs(result)])

    with torch.no_grad():
        truth, found = flat(case.reference(**inputs)), flat(function(**own_copy(inputs)))
    assert found.shape == truth.shape, f"{found.numel()} numbers, expected {truth.numel()}"
    return float((found - truth).square().mean().sqrt() / truth.square().mean().sqrt().clamp(min=1e-20))
