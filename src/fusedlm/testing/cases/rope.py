"""Rotary positions: one table for all sequences, and one for each."""

import torch

from fusedlm.kernels.rope import RopeScaling, rope, rope_ref, rotary_frequencies, rotary_tables
from fusedlm.testing.contract import Inputs, OpCase, Shape, randn


def _inputs(shape: Shape, g: torch.Generator | None) -> Inputs:
    B, T, H, D = (shape[letter] for letter in "BTHD")
    x = randn(g, B, T, H, D).transpose(1, 2)  # as projections give it: tokens outermost
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=64)
    frequencies = rotary_frequencies(D, 10000.0, scaling, x.device)
    positions = torch.arange(5, 5 + T, device=x.device)  # from an offset on
    if shape.get("each"):
        positions = torch.stack([positions + 11 * b for b in range(B)])
    cos, sin = rotary_tables(positions, frequencies)
    some = {"heads": shape["heads"]} if "heads" in shape else {}
    return {"x": x, "cos": cos, "sin": sin, **some}


def _elements(s: Shape) -> int:
    return int(s["B"] * s["T"] * s["H"] * s["D"])


CASES = (
    OpCase(
        name="rope",
        op=rope,
        reference=rope_ref,
        inputs=_inputs,
        shapes=(
            {"B": 2, "T": 5, "H": 3, "D": 10},
            {"B": 2, "T": 7, "H": 4, "D": 16, "each": True},
            {"B": 1, "T": 3, "H": 12, "D": 64},
            {"B": 2, "T": 5, "H": 8, "D": 10, "heads": 5},  # the others are copied
        ),
        gradients=("x",),
        fixed=("cos", "sin"),
        traffic=lambda s: (2 * _elements(s), 2 * _elements(s)),
        bench=(
            {"B": 32, "T": 1024, "H": 12, "D": 64},
            {"B": 8, "T": 2048, "H": 32, "D": 64},
            {"B": 2, "T": 4096, "H": 32, "D": 128},
            {"B": 1, "T": 4096, "H": 64, "D": 128},
        ),
        empty={"B": 1, "T": 0, "H": 2, "D": 16},
    ),
)
