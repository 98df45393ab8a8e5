"""Sampling: top-k and top-p together and alone, and greedy."""

import torch

from fusedlm.kernels.sample import sample, sample_ref
from fusedlm.testing.contract import Inputs, OpCase, Shape, randn


def _inputs(shape: Shape, g: torch.Generator | None) -> Inputs:
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    given = {name: shape[name] for name in settings if name in shape}
    uniform = torch.special.ndtr(randn(g, shape["B"])).clamp(max=0.99)
    return {"logits": 3 * randn(g, shape["B"], shape["V"]), "uniform": uniform, "seen": None, **settings, **given}


CASES = (
    OpCase(
        name="sample",
        op=sample,
        reference=sample_ref,
        inputs=_inputs,
        shapes=(
            {"B": 2, "V": 200, "top_k": 20, "top_p": 0.9},
            {"B": 1, "V": 123, "min_p": 0.05, "temperature": 0.7},
            {"B": 2, "V": 150, "temperature": 0.0},
        ),
        traffic=lambda s: (s["B"] * s["V"], 0),
        bench=tuple(
            {"B": B, "V": 128256, **settings}
            for settings in ({"top_k": 50, "top_p": 0.9}, {"top_p": 0.95}, {"temperature": 0.0})
            for B in (1, 64)
        ),
        empty={"B": 0, "V": 16, "top_k": 5},
    ),
)
