"""Muon (Jordan et al. 2024): momentum whose update of a matrix is made orthogonal by Newton-Schulz iterations.

    m = b m + g,   u = NS(g + b m),   w = (1 - lr wd) w - lr max(1, rows / columns)^0.5 u
Matrices that are several in one (queries, keys and values; gate and up) are made orthogonal apart.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedlm.kernels import join_master, new_master, set_master
from fusedlm.training.ranks import local

# The quintic's coefficients (a, b, c) of Jordan et al.: a steep slope at 0 and values near 1 on all of (0, 1].
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def is_for_muon(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is one of the blocks' matrices: embeddings, head, norms and biases are AdamW's."""
    return parameter.ndim == 2 and name.startswith("blocks.")


def orthogonalized(matrix: Tensor, steps: int = 5) -> Tensor:
    """A matrix (N, K) with the same singular vectors whose singular values are all near 1 (0.7 to 1.2).

    In bf16 on a GPU, which the iteration bears, and in fp32 on a CPU.
    """
    a, b, c = _COEFFICIENTS
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    wide = x.shape[0] > x.shape[1]
    x = x.mT if wide else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if wide else x


class Muon(torch.optim.Optimizer):
    """Muon over matrices with names, by which it knows what is several in one.

    master_weights: 16-bit parameters have fp32 masters that are updated in their place, kept as `AdamW` keeps them.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, Tensor]],
        *,
        lr: Tensor,
        weight_decay: float,
        momentum: float = 0.95,
        master_weights: bool = True,
    ) -> None:
        super().__init__(
            [{"params": [p for _, p in named], "names": [name for name, _ in named]}],
            {"lr": lr, "weight_decay": weight_decay, "momentum": momentum},
        )
        for p in self.param_groups[0]["params"]:
            state: dict[str, Any] = self.state[p]
            state["momentum"] = torch.zeros_like(p, dtype=torch.float32)
            if master_weights:
                state |= new_master(p)

    @torch.no_grad()
    def step(self, norm: Tensor) -> None:  # type: ignore[override]
        """norm: of all gradients; where it is infinite or NaN nothing changes."""
        (group,) = self.param_groups
        finite = norm.isfinite()
        lr = torch.where(finite, group["lr"], 0.0)
        for name, p in zip(group["names"], group["params"], strict=True):
            if p.grad is None:
                continue
            state = self.state[p]
            momentum: Tensor = state["momentum"]
            g = torch.where(finite, p.grad.float(), 0.0)
            momentum.mul_(torch.where(finite, group["momentum"], 1.0)).add_(g)
            update = local(_update(name, g + group["momentum"] * momentum, momentum))
            p, low = local(p), state.get("master_low")
            w = local(state.get("master", p)) if low is None else join_master(p, local(low))
            w.mul_(1 - lr * group["weight_decay"]).sub_((lr * update).to(w.dtype))
            if low is not None:
                set_master(p, low, w)
            elif w is not p:
                p.copy_(w)


def _update(name: str, u: Any, like: Any) -> Tensor:
    """u made orthogonal, whole: of a sharded matrix every process computes all of it and keeps its part."""
    sharded = hasattr(u, "full_tensor")
    whole: Tensor = u.full_tensor() if sharded else u
    result = torch.cat([_scaled(part) for part in torch.split(whole, _rows(name, whole))])
    if not sharded:
        return result
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(result, like.device_mesh, like.placements, src_data_rank=None)


def _scaled(u: Tensor) -> Tensor:
    return orthogonalized(u).float() * max(1.0, u.shape[0] / u.shape[1]) ** 0.5


def _rows(name: str, whole: Tensor) -> list[int]:
    """Rows of each matrix in one."""
    N, K = whole.shape
    if name.endswith("attention.qkv.weight"):
        key = (N - K) // 2  # queries are K rows in every model whose heads fill its width
        return [K, key, key] if key > 0 and K + 2 * key == N else [N]
    return [N // 2, N // 2] if name.endswith("gate_up.weight") else [N]
