"""AdamW (Loshchilov and Hutter 2019, algorithm 2) over all tensors at once, with clipping by the global norm.

    c = min(1, max_norm / (|g| + 1e-6)),  |g| over all gradients;     t = t + 1
    m = b1 m + (1 - b1) c g,  v = b2 v + (1 - b2) (c g)^2
    w = (1 - lr wd) w - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
Numerics: loads are widened to fp32, bias corrections are fp64, one rounding at each store. Norms are fp32 sums in a
fixed order. Traffic, in elements: 7 per parameter (w, m, v read and written, g read), 8 with clipping (g read twice).
A table on the device tells kernels where each tensor is, so that one launch does them all; it is uploaded anew only
when addresses have changed. Nothing waits for the GPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedlm.kernels.adamw.masters import join_master, new_master, set_master, split_master
from fusedlm.kernels.adamw.norm import global_norm, global_norm_ref
from fusedlm.kernels.adamw.optimizer import AdamW
from fusedlm.kernels.adamw.shards import local, sums_of
from fusedlm.kernels.adamw.step import Clip, Hyper, Tensors, adamw_ref, take_step
from fusedlm.kernels.adamw.workspace import Workspace

__all__ = [
    "AdamW",
    "Workspace",
    "adamw",
    "adamw_ref",
    "global_norm",
    "global_norm_ref",
    "join_master",
    "new_master",
    "set_master",
    "split_master",
]


@torch.no_grad()
def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor | None] | None = None,
    *,
    step: Tensor | Sequence[Tensor],
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    max_norm: float | None = None,
    total_norm: Tensor | None = None,
    skip_nonfinite: bool = False,
    skipped: Tensor | None = None,
    workspace: Workspace | None = None,
) -> Tensor | None:
    """One step of AdamW (Loshchilov and Hutter 2019, algorithm 2), in place, over all tensors in few launches.

    params, exp_avgs, exp_avg_sqs: float32, bfloat16 or float16 (by torch's ops float64 too), without gaps in memory;
    grads: the same dtypes, any strides; masters: None, or for each parameter None or what is updated in its place and
    rounded to it: a float32 copy, or of a bfloat16 parameter the int16 that makes it float32 (see `split_master`). All
    of one device; of DTensors, this process's shards.
    step: steps done so far, one element of float32, one for all or one for each; advanced on the device. lr: a number,
    or one element on the device or the CPU. maximize: go up instead of down.
    max_norm: scale gradients as `torch.nn.utils.clip_grad_norm_` does; they are not written to. total_norm: their norm
    where it is known, else it is computed (see `global_norm`). skip_nonfinite: where the norm is infinite or NaN change
    nothing but skipped, one element of int64, which counts up.
    workspace: keeps tables from call to call, which saves host time; needed while a CUDA graph is captured.

    Returns the norm, a scalar on the device; None where neither max_norm nor skip_nonfinite asks for one. Raises
    ValueError where lengths, shapes, dtypes, devices or memory layouts do not fit.
    """
    if torch.compiler.is_compiling():
        return _compiled_adamw(
            params, grads, exp_avgs, exp_avg_sqs, masters, step, lr, betas, eps, weight_decay, maximize, max_norm,
            total_norm, skip_nonfinite, skipped,
        )  # fmt: skip
    T = len(params)
    hyper = Hyper(lr, betas, eps, weight_decay, maximize)
    if skip_nonfinite and skipped is None:
        raise ValueError("skipped is None; expected one element of torch.int64 where skip_nonfinite is asked for")
    clip = Clip(max_norm, total_norm, skipped if skip_nonfinite else None)
    tensors = Tensors(
        local(params),
        local(grads),
        local(exp_avgs),
        local(exp_avg_sqs),
        local([None] * T if masters is None else masters),
        [step] * T if isinstance(step, Tensor) else list(step),
        [0] * T,
    )
    return take_step(tensors, [hyper], clip, sums_of(grads), workspace) if T else None


# Under torch.compile a step is one opaque operator. It has no room for a None in a list or for a workspace.
@torch.library.custom_op(
    "fusedlm::adamw_", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "masters", "steps", "skipped")
)
def _adamw_op(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    steps: list[Tensor],
    skipped: list[Tensor],
    lr_tensor: Tensor | None,
    total_norm: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    max_norm: float | None,
    skip_nonfinite: bool,
) -> Tensor:
    """masters: empty where there are none, and an empty one for a parameter that has none. Returns the norm, or 0."""
    norm = adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [w if w.numel() == p.numel() else None for w, p in zip(masters, params, strict=True)] if masters else None,
        step=steps if len(steps) == len(params) else steps[0],
        lr=lr if lr_tensor is None else lr_tensor,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
        max_norm=max_norm,
        total_norm=total_norm,
        skip_nonfinite=skip_nonfinite,
        skipped=skipped[0] if skipped else None,
    )
    return torch.zeros((), device=params[0].device) if norm is None or norm is total_norm else norm


@_adamw_op.register_fake
def _(params: Any, grads: Any, *_: Any) -> Tensor:
    return params[0].new_empty((), dtype=torch.promote_types(grads[0].dtype, torch.float32))


def _compiled_adamw(
    params: Any, grads: Any, exp_avgs: Any, exp_avg_sqs: Any, masters: Any, step: Any, lr: Any, betas: Any, eps: float,
    weight_decay: float, maximize: bool, max_norm: float | None, total_norm: Any, skip_nonfinite: bool, skipped: Any,
) -> Tensor | None:  # fmt: skip
    lists = [list(listed) for listed in (params, grads, exp_avgs, exp_avg_sqs)]
    if not lists[0]:
        return None
    none = [p.new_empty(0) if w is None else w for w, p in zip(masters or (), params, strict=masters is not None)]
    steps = [step] if isinstance(step, Tensor) else list(step)
    device_lr = lr if isinstance(lr, Tensor) else None
    found = torch.ops.fusedlm.adamw_(
        *lists, none, steps, [] if skipped is None else [skipped], device_lr, total_norm,
        0.0 if device_lr is not None else lr, *betas, eps, weight_decay, maximize, max_norm, skip_nonfinite,
    )  # fmt: skip
    if max_norm is None and not skip_nonfinite:
        return None
    return found if total_norm is None else total_norm
