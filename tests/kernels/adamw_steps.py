"""Parameters, gradients and steps that the tests of AdamW share: the same numbers for ours and torch's."""

import copy
from typing import Any

import torch
from torch import Tensor

from fusedlm.kernels.adamw import join_master

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


def with_masters_whole(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state as earlier versions had it."""
    state = copy.deepcopy(optimizer.state_dict())
    for number, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        state["state"][number]["master"] = join_master(p.detach(), state["state"][number].pop("master_low"))
    return state
