"""Dropout with a seed that is given, so that the reference drops the same elements."""

import torch

from fusedlm.kernels.dropout import dropout, dropout_ref
from fusedlm.testing.contract import WIDTHS, Inputs, OpCase, Shape, randn


def seed_input(generator: torch.Generator | None) -> torch.Tensor:
    """A seed with bits in both halves."""
    device = None if generator is None else generator.device
    return torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator, device=device)


def _inputs(shape: Shape, g: torch.Generator | None) -> Inputs:
    return {"x": randn(g, shape["M"], shape["N"]), "p": shape.get("p", 0.1), "seed": seed_input(g), "stream": 7}


CASES = (
    OpCase(
        name="dropout",
        op=dropout,
        reference=dropout_ref,
        inputs=_inputs,
        shapes=({"M": 7, "N": 123, "p": 0.3}, {"M": 16, "N": 5, "p": 0.5}, {"M": 3, "N": 64, "p": 1.0}),
        gradients=("x",),
        traffic=lambda s: (2 * s["M"] * s["N"], 2 * s["M"] * s["N"]),
        bench=WIDTHS[::2],
        empty={"M": 0, "N": 16},
    ),
)
