"""The optimizer class on top of the step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedlm.kernels.adamw.masters import new_master, set_master
from fusedlm.kernels.adamw.shards import local, sums_of
from fusedlm.kernels.adamw.step import Clip, Hyper, Tensors, take_step
from fusedlm.kernels.adamw.workspace import Workspace

_NARROW = (torch.bfloat16, torch.float16)


class AdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW` on the kernels of `adamw`: the same arguments, groups, schedulers and state.

    params, lr, betas, eps, weight_decay, maximize: as in torch; lr may be a tensor of one element, which a scheduler
    then writes to and a CUDA graph reads anew at each replay. foreach, capturable, fused: accepted and without effect,
    for there is one implementation, and it can be captured. amsgrad, differentiable: must be False.
    max_norm: clip gradients by their global norm over all groups, without writing to them; `total_norm` is then that
    of the last step, a scalar on the device. skip_nonfinite: where the norm is infinite or NaN, change nothing and
    count the step in `skipped`, on the device.
    master_weights: what is updated is a float32 master of a parameter that is narrower, and the parameter its rounding.
    Of bfloat16 the state "master_low" holds what the parameter lacks of it, 2 bytes (see `split_master`); of float16
    the state "master" holds all. state_dtype: of exp_avg and exp_avg_sq.

    The state is torch's (exp_avg, exp_avg_sq, step), so state dicts go both ways. DTensors keep DTensors as their
    state. To capture a step in a CUDA graph, take one before; the optimizer must live as long as the graph.
    Raises ValueError for arguments out of range, and in `step` as `adamw` does.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        master_weights: bool = True,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        if differentiable:
            raise ValueError("differentiable is True; expected False: steps are not differentiated through")
        if not state_dtype.is_floating_point:
            raise ValueError(f"state_dtype is {state_dtype}; expected a floating-point one")
        Clip(max_norm)  # raises
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,
        }
        self.max_norm = max_norm
        self.skip_nonfinite = skip_nonfinite
        self.master_weights = master_weights
        self.state_dtype = state_dtype
        self.total_norm: Tensor | None = None
        self.skipped: Tensor | None = None
        self._workspace = Workspace()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        _hyper(self.param_groups[-1])

    def __getstate__(self) -> dict[str, Any]:
        names = ("max_norm", "skip_nonfinite", "master_weights", "state_dtype", "total_norm", "skipped")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_workspace", Workspace())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of an AdamW, this one or torch's. Raises ValueError where it does not fit.

        A "master" of a bfloat16 parameter, as earlier versions kept it, is taken apart: its rounding is written into
        the parameter, which is to have been loaded before.
        """
        for group in state_dict["param_groups"]:
            _hyper(group)
        super().load_state_dict(state_dict)
        # torch casts states to the dtype of their parameter, and leaves steps on the CPU; here they have their own.
        dtypes = {"exp_avg": self.state_dtype, "exp_avg_sq": self.state_dtype}
        dtypes |= {"master": torch.float32, "master_low": torch.int16, "step": torch.float32}
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, p in zip(saved, (p for group in self.param_groups for p in group["params"]), strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if name in dtypes:
                    self.state[p][name] = torch.as_tensor(value).to(p.device, dtypes[name])
            state = self.state.get(p, {})
            if p.dtype != torch.bfloat16:
                state.pop("master_low", None)
            elif (master := state.pop("master", None)) is not None and self.master_weights:
                state |= new_master(p)
                set_master(p, state["master_low"], master)

    def _complete_state(self, p: Tensor) -> None:
        """Make what is missing of a parameter's state. Raises ValueError while a CUDA graph is captured."""
        if p.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError("a parameter has no state while a CUDA graph is captured; expected a step before")
        state = self.state[p]
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(p, dtype=self.state_dtype, memory_format=torch.preserve_format)
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        if self.master_weights:
            state |= {name: t for name, t in new_master(p).items() if name not in state}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. closure: computes the loss anew; its result is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params, grads, groups = [], [], []
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                if (g := p.grad) is not None:
                    params.append(p)
                    grads.append(g)
                    groups.append(number)
        if not params:
            return loss
        states = list(map(self.state.__getitem__, params))
        narrow = _NARROW if self.master_weights else ()
        for p, state in zip(params, states, strict=True):
            if len(state) < (4 if p.dtype in narrow else 3):
                self._complete_state(p)
        masters = [s.get("master_low", s.get("master")) if self.master_weights else None for s in states]
        tensors = Tensors(
            local(params),
            local(grads),
            local([s["exp_avg"] for s in states]),
            local([s["exp_avg_sq"] for s in states]),
            local(masters),
            [s["step"] for s in states],
            groups,
        )
        if self.skipped is None and self.skip_nonfinite:
            self.skipped = torch.zeros((), dtype=torch.int64, device=tensors.params[0].device)
        clip = Clip(self.max_norm, skipped=self.skipped if self.skip_nonfinite else None)
        norm = take_step(tensors, [_hyper(group) for group in self.param_groups], clip, sums_of(grads), self._workspace)
        if norm is not None:  # in one place for good, where captured graphs write it too
            self.total_norm = torch.empty_like(norm) if self.total_norm is None else self.total_norm
            self.total_norm.copy_(norm)
        return loss


def _hyper(group: dict[str, Any]) -> Hyper:
    """A group's hyperparameters. Raises ValueError where they are out of range."""
    if group.get("amsgrad"):
        raise ValueError("amsgrad is True; expected False")
    return Hyper(group["lr"], group["betas"], group["eps"], group["weight_decay"], group.get("maximize", False))
