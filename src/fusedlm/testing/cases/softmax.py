"""Softmax, of rows that fit a program and of longer ones."""

import torch

from fusedlm.kernels.softmax import softmax, softmax_ref
from fusedlm.testing.contract import WIDTHS, Inputs, OpCase, Shape, randn


def _inputs(shape: Shape, g: torch.Generator | None) -> Inputs:
    return {"x": 3 * randn(g, shape["M"], shape["N"])}


def _masked(shape: Shape, g: torch.Generator | None) -> Inputs:
    """Rows that begin with many -inf, as those of a mask do."""
    x = 3 * randn(g, shape["M"], shape["N"])
    x[:, : shape["N"] // 2] = -torch.inf
    return {"x": x}


_LONG: tuple[Shape, ...] = ({"M": 1024, "N": 32768}, {"M": 256, "N": 131072})

CASES = (
    OpCase(
        name="softmax",
        op=softmax,
        reference=softmax_ref,
        inputs=_inputs,
        shapes=({"M": 7, "N": 123}, {"M": 3, "N": 760}, {"M": 7, "N": 17}),
        gradients=("x",),
        traffic=lambda s: (2 * s["M"] * s["N"], 3 * s["M"] * s["N"]),
        bench=WIDTHS + _LONG,
        compiled=({"M": 1, "N": 16384}, {"M": 1, "N": 65536}),
        empty={"M": 0, "N": 16},
    ),
    OpCase(
        name="softmax_masked",
        op=softmax,
        reference=softmax_ref,
        inputs=_masked,
        shapes=({"M": 3, "N": 123}, {"M": 2, "N": 760}),
        gradients=("x",),
    ),
)
