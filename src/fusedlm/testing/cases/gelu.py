"""GELU, both ways."""

import torch

from fusedlm.kernels.gelu import gelu, gelu_ref
from fusedlm.testing.contract import WIDTHS, Inputs, OpCase, Shape, randn


def _inputs(shape: Shape, g: torch.Generator | None) -> Inputs:
    return {"x": 2 * randn(g, shape["M"], shape["N"]), "approximate": shape["approximate"]}


def _with_bias(shape: Shape, g: torch.Generator | None) -> Inputs:
    return {**_inputs(shape, g), "bias": randn(g, shape["N"])}


CASES = (
    OpCase(
        name="gelu",
        op=gelu,
        reference=gelu_ref,
        inputs=_inputs,
        shapes=(
            {"M": 7, "N": 123, "approximate": "tanh"},
            {"M": 7, "N": 123, "approximate": "none"},
            {"M": 16, "N": 5, "approximate": "tanh"},
        ),
        gradients=("x",),
        traffic=lambda s: (2 * s["M"] * s["N"], 3 * s["M"] * s["N"]),
        bench=tuple({**shape, "approximate": a} for a in ("tanh", "none") for shape in WIDTHS),
        empty={"M": 0, "N": 16, "approximate": "tanh"},
    ),
    OpCase(
        name="gelu_bias",
        op=gelu,
        reference=gelu_ref,
        inputs=_with_bias,
        shapes=(
            {"M": 19, "N": 123, "approximate": "tanh"},
            {"M": 7, "N": 40, "approximate": "none"},
            {"M": 130, "N": 5, "approximate": "tanh"},
        ),
        gradients=("x", "bias"),
        traffic=lambda s: (2 * s["M"] * s["N"], 3 * s["M"] * s["N"]),
        bench=tuple({"M": 32768, "N": n, "approximate": "tanh"} for n in (3072, 4096)),
        empty={"M": 0, "N": 16, "approximate": "tanh"},
    ),
)
