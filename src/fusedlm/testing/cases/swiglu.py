"""SwiGLU of two tensors, and of the two halves of one."""

import torch

from fusedlm.kernels.swiglu import swiglu, swiglu_ref
from fusedlm.testing.contract import WIDTHS, Inputs, OpCase, Shape, randn


def _inputs(shape: Shape, g: torch.Generator | None) -> Inputs:
    return {"gate": 2 * randn(g, shape["M"], shape["N"]), "up": randn(g, shape["M"], shape["N"])}


def _halves(shape: Shape, g: torch.Generator | None) -> Inputs:
    return {"gate": 2 * randn(g, shape["M"], 2 * shape["N"])}


CASES = (
    OpCase(
        name="swiglu",
        op=swiglu,
        reference=swiglu_ref,
        inputs=_inputs,
        shapes=({"M": 7, "N": 123}, {"M": 16, "N": 5}),
        gradients=("gate", "up"),
        traffic=lambda s: (3 * s["M"] * s["N"], 5 * s["M"] * s["N"]),
        bench=WIDTHS,
        empty={"M": 0, "N": 16},
    ),
    OpCase(
        name="swiglu_halves",
        op=swiglu,
        reference=swiglu_ref,
        inputs=_halves,
        shapes=({"M": 7, "N": 123}, {"M": 3, "N": 64}),
        gradients=("gate",),
        traffic=lambda s: (3 * s["M"] * s["N"], 5 * s["M"] * s["N"]),
        bench=WIDTHS[::2],
        empty={"M": 0, "N": 16},
    ),
)
