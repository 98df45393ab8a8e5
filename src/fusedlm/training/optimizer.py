"""Which parameters are decayed, which optimizer takes them, and the optimizer's state by parameters' names."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fusedlm.kernels import AdamW, Workspace, global_norm, new_master
from fusedlm.training.config import TrainingConfig
from fusedlm.training.muon import Muon, is_for_muon


class Optimizer:
    """AdamW over all parameters that are trained, or over those that Muon does not take.

    lr: the learning rate, one fp32 element on the device, and muon_lr; captured steps read them anew. A step whose
    gradients' norm is infinite or NaN changes nothing and is counted in `skipped`, (1,) int64 or a scalar.
    """

    def __init__(self, model: nn.Module, training: TrainingConfig, *, pure: bool) -> None:
        """pure: 16-bit parameters have no fp32 masters."""
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        device = named[0][1].device
        self.lr = torch.tensor(training.lr, dtype=torch.float32, device=device)
        self.muon_lr = torch.tensor(training.muon_lr, dtype=torch.float32, device=device)
        self._highest = (training.lr, training.muon_lr)
        self._widened: list[Tensor] = []
        if training.grad_dtype == "fp32" or training.precision == "fp16":
            for _, p in named:
                sharded = hasattr(p, "full_tensor")
                p.grad_dtype = None if sharded else torch.float32
                if sharded:  # FSDP sets gradients of its parameters' dtype
                    self._widened.append(p)
        self._names: dict[Tensor, str] = {p: name for name, p in named}
        matrices = [p for name, p in named if training.optimizer == "muon" and is_for_muon(name, p)]
        taken = set(matrices)
        state_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[
            training.state_dtype or ("bf16" if pure else "fp32")
        ]
        self.adamw = AdamW(
            parameter_groups((p for _, p in named if p not in taken), training.weight_decay),
            lr=self.lr,
            betas=training.betas,
            eps=training.eps,
            max_norm=training.max_norm,
            skip_nonfinite=True,
            master_weights=not pure,
            state_dtype=state_dtype,
        )
        self.muon = None
        self._workspace = Workspace()  # of the norm over both optimizers' gradients; a captured step reads its tables
        if matrices:
            self.muon = Muon(
                [(self._names[p], p) for p in matrices],
                lr=self.muon_lr,
                weight_decay=training.weight_decay,
                master_weights=not pure,
            )
        self._make_state(state_dtype, pure)

    @property
    def parameters(self) -> list[Tensor]:
        return list(self._names)

    @property
    def norm(self) -> Tensor:
        """Of the gradients of the last step, a scalar on the device."""
        assert self.adamw.total_norm is not None
        return self._total if self.muon is not None else self.adamw.total_norm

    @property
    def skipped(self) -> Tensor:
        """How many steps changed nothing."""
        assert self.adamw.skipped is not None
        return self.adamw.skipped

    def schedule(self, share: float) -> None:
        """Set the learning rates to a share of the highest ones."""
        self.lr.fill_(self._highest[0] * share)
        self.muon_lr.fill_(self._highest[1] * share)

    def zero_grad(self) -> None:
        for p in self._names:
            p.grad = None

    def widen(self) -> None:
        """After each backward pass: FSDP's gradients in fp32, where that is asked for. It adds the next to them."""
        for p in self._widened:
            if p.grad is not None:
                p.grad = p.grad.float()

    def step(self) -> None:
        if self.muon is not None:
            # One norm for both; where it is no number, a gradient of AdamW's says so too, and it skips and counts.
            grads = [p.grad for p in self._names if p.grad is not None]
            self._total = global_norm(grads, workspace=self._workspace)
            first = next(p.grad for group in self.adamw.param_groups for p in group["params"] if p.grad is not None)
            nothing = torch.where(self._total.isfinite(), 0.0, torch.nan).to(first.dtype)
            first.add_(nothing)
            self.muon.step(self._total)
        self.adamw.step()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint keeps, by name."""
        for optimizer in (self.adamw, self.muon):
            if optimizer is not None:
                for p, values in optimizer.state.items():
                    yield from ((f"{self._names[p]}.{key}", value) for key, value in values.items())
        yield "skipped", self.skipped

    def _make_state(self, state_dtype: torch.dtype, pure: bool) -> None:
        """All of it before the first step, so that a checkpoint can be read into it and a step captured."""
        for p in (p for group in self.adamw.param_groups for p in group["params"]):
            state: dict[str, Any] = self.adamw.state[p]
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(p, dtype=state_dtype, memory_format=torch.preserve_format)
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            if not pure:
                state |= new_master(p)
        self.adamw.skipped = torch.zeros((), dtype=torch.int64, device=self.lr.device)


def parameter_groups(parameters: Iterable[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices (embeddings among them) are decayed; biases and norms are not."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
