"""AdamW, with and without clipping, and of bf16 parameters whose masters are in two halves."""

from typing import Any

import torch
from torch import Tensor

from fusedlm.kernels.adamw import Workspace, adamw, adamw_ref, global_norm_ref, join_master, split_master
from fusedlm.testing.contract import Inputs, OpCase, Shape, randn

# GPT-2 124M as it is trained: 148 tensors, the output shares the embedding's.
_BLOCK = ((768,), (768,), (2304, 768), (2304,), (768, 768), (768,), (768,), (768,), (3072, 768), (3072,), (768, 3072))
GPT2: tuple[tuple[int, ...], ...] = ((50257, 768), (1024, 768), *((*_BLOCK, (768,)) * 12), (768,), (768,))

_HYPER = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def _inputs(shape: Shape, g: torch.Generator | None) -> Inputs:
    inputs: Inputs = {}
    for i, size in enumerate(shape["sizes"]):
        inputs[f"param{i}"] = randn(g, *size)
        inputs[f"grad{i}"] = randn(g, *size)
        inputs[f"exp_avg{i}"] = 0.5 * randn(g, *size)
        inputs[f"exp_avg_sq{i}"] = randn(g, *size).square() + 0.01
    step = torch.full_like(randn(g, 1), shape["step"])
    return {**inputs, "step": step, "max_norm": shape["max_norm"], "workspace": Workspace()}


def _lists(tensors: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    count = sum(name.startswith("param") for name in tensors)
    names = ("param", "grad", "exp_avg", "exp_avg_sq")
    return {f"{name}s": [tensors[f"{name}{i}"] for i in range(count)] for name in names}


def _copied(lists: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    return {name: listed if name == "grads" else [t.clone() for t in listed] for name, listed in lists.items()}


def _outputs(lists: dict[str, list[Tensor]], step: Tensor) -> tuple[Tensor, ...]:
    return (*lists["params"], *lists["exp_avgs"], *lists["exp_avg_sqs"], step)


def _in_place(step: Tensor, max_norm: float | None, workspace: Workspace, **tensors: Tensor) -> None:
    adamw(**_lists(tensors), step=step, lr=0.01, max_norm=max_norm, workspace=workspace, **_HYPER)  # type: ignore[arg-type]


def _op(step: Tensor, max_norm: float | None, workspace: Workspace, **tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies of what AdamW writes, written."""
    lists, step = _copied(_lists(tensors)), step.clone()
    adamw(**lists, step=step, lr=0.01, max_norm=max_norm, workspace=workspace, **_HYPER)  # type: ignore[arg-type]
    return _outputs(lists, step)


def _reference(step: Tensor, max_norm: float | None, workspace: Workspace, **tensors: Tensor) -> tuple[Tensor, ...]:
    lists, step = _copied(_lists(tensors)), step.clone()
    clip: Any = 1.0
    if max_norm is not None:
        clip = (max_norm / (global_norm_ref(lists["grads"]) + 1e-6)).clamp(max=1.0)
    adamw_ref(**lists, step=step, lr=0.01, clip=clip, **_HYPER)  # type: ignore[arg-type]
    return _outputs(lists, step)


def _halves(shape: Shape, g: torch.Generator | None) -> Inputs:
    """With each parameter's bits and the lower half of its master, which no dtype under test is to change."""
    inputs = _inputs(shape, g)
    for i in range(len(shape["sizes"])):
        p, inputs[f"low{i}"] = split_master(inputs.pop(f"param{i}").float())
        inputs[f"bits{i}"] = p.view(torch.int16)
    return inputs


def _joined(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """With masters as the parameters."""
    count = sum(name.startswith("bits") for name in tensors)
    masters = [join_master(tensors[f"bits{i}"].view(torch.bfloat16), tensors[f"low{i}"]) for i in range(count)]
    return {**tensors, **{f"param{i}": w.to(dtype) for i, w in enumerate(masters)}}


def _op_of_halves(step: Tensor, max_norm: float | None, workspace: Workspace, **tensors: Tensor) -> tuple[Tensor, ...]:
    lists, step = _copied(_lists(_joined(tensors, torch.float32))), step.clone()
    halves = [split_master(w) for w in lists.pop("params")]
    params, lows = [p for p, _ in halves], [low for _, low in halves]
    for name in ("exp_avgs", "exp_avg_sqs"):
        lists[name] = [t.contiguous() for t in lists[name]]  # as the bits are, whatever strides the contract gives
    adamw(params, **lists, masters=lows, step=step, lr=0.01, max_norm=max_norm, workspace=workspace, **_HYPER)  # type: ignore[arg-type]
    masters = [join_master(p, low) for p, low in zip(params, lows, strict=True)]
    return _outputs({**lists, "params": masters}, step)


def _reference_of_halves(
    step: Tensor, max_norm: float | None, workspace: Workspace, **tensors: Tensor
) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(tensors["grad0"].dtype, torch.float32)
    return _reference(step, max_norm, workspace, **_joined(tensors, dtype))


def _elements(shape: Shape) -> int:
    return sum(int(torch.Size(size).numel()) for size in shape["sizes"])


CASES = (
    OpCase(
        name="adamw",
        op=_op,
        reference=_reference,
        inputs=_inputs,
        fixed=("step",),
        shapes=(
            {"sizes": ((5, 48), (131,), (1,)), "step": 0, "max_norm": 1.0},
            {"sizes": ((3, 123), (64,)), "step": 999, "max_norm": None},
        ),
        # fp32: 7 elements a parameter; clipping reads the gradients once more.
        traffic=lambda s: ((7 if s["max_norm"] is None else 8) * _elements(s), 0),
        bench=({"sizes": GPT2, "step": 0, "max_norm": None}, {"sizes": GPT2, "step": 0, "max_norm": 1.0}),
        bench_dtype=torch.float32,
        timed=_in_place,
        empty={"sizes": ((0, 16),), "step": 0, "max_norm": 1.0},
    ),
    OpCase(
        name="adamw_halves",
        op=_op_of_halves,
        reference=_reference_of_halves,
        inputs=_halves,
        fixed=("step", *(f"{name}{i}" for name in ("exp_avg", "exp_avg_sq") for i in range(3))),
        shapes=(
            {"sizes": ((5, 48), (131,), (1,)), "step": 0, "max_norm": 1.0},
            {"sizes": ((3, 123), (64,)), "step": 999, "max_norm": None},
        ),
        empty={"sizes": ((0, 16),), "step": 0, "max_norm": 1.0},
    ),
)
