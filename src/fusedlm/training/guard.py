"""What must not reach the weights: losses that jump, and, in fp16, gradients that left its range."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fusedlm.training.ranks import local

Backward = Callable[[], Tensor]  # computes a loss and gradients, and returns the loss
Hook = Callable[[nn.Module, object, object], None]

_MEMORY = 0.98  # of the moving mean and variance: about 50 losses
_NEEDED = 100  # losses before any counts as a spike


class SpikeGuard:
    """Turns a loss that is far above its moving mean into NaN, and with it all gradients, so that the step is skipped.

    All of it happens on the device: nothing waits, and a captured step does it too. sigmas: standard deviations.
    """

    def __init__(self, sigmas: float, device: torch.device) -> None:
        self.sigmas = sigmas
        self.mean, self.variance, self.count = torch.zeros(3, dtype=torch.float32, device=device).unbind()
        self.spikes = torch.zeros((), dtype=torch.float32, device=device)

    def __call__(self, loss: Tensor) -> Tensor:
        """The loss, or NaN. loss: a scalar."""
        found = loss.detach().float()
        far = found - self.mean > self.sigmas * self.variance.sqrt()
        spike = far & (self.count >= _NEEDED)
        with torch.no_grad():
            # Of the first losses the plain mean and variance, later ones weigh the same; a spike is not remembered.
            counts = found.isfinite() & ~spike
            share = torch.clamp(1 / (self.count + 1), min=1 - _MEMORY)
            away = torch.where(counts, found - self.mean, 0.0)
            self.variance.copy_(torch.where(counts, (1 - share) * (self.variance + share * away * away), self.variance))
            self.mean.add_(share * away)
            self.count.add_(counts.float())
            self.spikes.add_(spike.float())
        return loss * torch.where(spike, torch.nan, 1.0)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint keeps."""
        yield from (("mean", self.mean), ("variance", self.variance), ("count", self.count), ("spikes", self.spikes))


class LossScale:
    """The factor of an fp16 loss (Micikevicius et al. 2018): halved where gradients overflow, doubled after 2,000 steps
    without. Gradients are to be kept in fp32, so that dividing them by it loses nothing."""

    def __init__(self, device: torch.device, *, first: float = 65536.0) -> None:
        self.scale = torch.tensor(first, dtype=torch.float32, device=device)
        self.good = torch.zeros((), dtype=torch.float32, device=device)

    def unscale(self, parameters: list[Tensor]) -> None:
        """Divide the gradients; infinities stay, and the step is skipped."""
        grads = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_(grads, 1 / self.scale)

    def update(self, norm: Tensor) -> None:
        """norm: of the gradients, infinite or NaN where they overflowed."""
        finite = norm.isfinite()
        self.good.copy_(torch.where(finite, self.good + 1, 0.0))
        grown = self.good >= 2000
        factor = torch.where(finite, torch.where(grown, 2.0, 1.0), 0.5)
        self.scale.mul_(factor).clamp_(min=1.0)
        self.good.copy_(torch.where(grown, 0.0, self.good))

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint keeps."""
        yield from (("scale", self.scale), ("good", self.good))


def first_nonfinite(model: nn.Module, backward: Backward) -> str:
    """Where numbers stop being finite in a step that is computed again: the first module whose output is not (those
    within it come first), else the parameter nearest to the loss whose gradient is not. Of this rank; empty where all
    of it is finite."""
    found: list[str] = []

    def look(name: str) -> Hook:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            for tensor in output if isinstance(output, tuple) else (output,):
                if not found and isinstance(tensor, Tensor) and not bool(tensor.isfinite().all()):
                    found.append(name)

        return hook

    hooks = [m.register_forward_hook(look(name)) for name, m in model.named_modules() if name]
    try:
        loss = backward()
    finally:
        for handle in hooks:
            handle.remove()
    if found:
        return f"the output of {found[0]} is not finite"
    if not bool(loss.isfinite()):
        return f"the loss is {loss.item()}, and every layer's output is finite"
    gradients = [(name, local(p.grad)) for name, p in model.named_parameters() if p.grad is not None]
    bad = [name for name, gradient in gradients if not bool(gradient.isfinite().all())]
    return f"the gradient of {bad[-1]} is not finite" if bad else ""
