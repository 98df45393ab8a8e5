"""The sum of ranks' parts."""

import torch

from fusedlm.kernels.sum_parts import sum_parts, sum_parts_ref
from fusedlm.testing.contract import Inputs, OpCase, Shape, randn


def _inputs(shape: Shape, g: torch.Generator | None) -> Inputs:
    return {"x": randn(g, shape["R"], shape["N"]), "scale": 1 / shape["R"]}


CASES = (
    OpCase(
        name="sum_parts",
        op=sum_parts,
        reference=sum_parts_ref,
        inputs=_inputs,
        shapes=({"R": 2, "N": 123}, {"R": 1, "N": 64}, {"R": 3, "N": 770}, {"R": 8, "N": 5}),
        large=({"R": 2, "N": 30_410_752},),
        traffic=lambda s: ((s["R"] + 1) * s["N"], 0),
        # Of a block of Llama 3.2 1B on two GPUs and on eight, and of its embedding on two.
        bench=({"R": 2, "N": 30_410_752}, {"R": 8, "N": 7_602_688}, {"R": 2, "N": 131_335_168}),
        empty={"R": 2, "N": 0},
    ),
)
