"""Cross-entropy of logits, and of a linear layer's output that is never whole."""

import torch

from fusedlm.kernels.cross_entropy import cross_entropy, cross_entropy_ref
from fusedlm.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from fusedlm.testing.contract import Inputs, OpCase, Shape, randn


def targets(shape: Shape, g: torch.Generator | None) -> torch.Tensor:
    """Random classes; every fifth row is ignored where the shape says so."""
    device = None if g is None else g.device
    t = torch.randint(0, shape["V"], (shape["M"],), generator=g, device=device)
    if "ignore_index" in shape:
        t[::5] = shape["ignore_index"]
    return t


def options(shape: Shape) -> Inputs:
    return {k: shape[k] for k in ("ignore_index", "reduction", "label_smoothing", "z_loss") if k in shape}


def _inputs(shape: Shape, g: torch.Generator | None) -> Inputs:
    return {"input": 2 * randn(g, shape["M"], shape["V"]), "target": targets(shape, g), **options(shape)}


def _linear_inputs(shape: Shape, g: torch.Generator | None) -> Inputs:
    x, w = randn(g, shape["M"], shape["C"]), 2 * shape["C"] ** -0.5 * randn(g, shape["V"], shape["C"])
    return {"input": x, "weight": w, "target": targets(shape, g), **options(shape)}


CASES = (
    OpCase(
        name="cross_entropy",
        op=cross_entropy,
        reference=cross_entropy_ref,
        inputs=_inputs,
        shapes=(
            {"M": 9, "V": 123, "ignore_index": -100},
            {"M": 7, "V": 130, "reduction": "none", "ignore_index": 3, "label_smoothing": 0.1, "z_loss": 1e-2},
            {"M": 8, "V": 64, "reduction": "sum", "z_loss": 1e-2},
            {"M": 70, "V": 10, "label_smoothing": 0.2},
        ),
        gradients=("input",),
        traffic=lambda s: (s["M"] * s["V"], 2 * s["M"] * s["V"]),
        bench=({"M": 8192, "V": 50304}, {"M": 4096, "V": 128256}, {"M": 32768, "V": 8192}),
        together=True,
        empty={"M": 0, "V": 16, "reduction": "sum"},
    ),
    OpCase(
        name="linear_cross_entropy",
        op=linear_cross_entropy,
        reference=linear_cross_entropy_ref,
        inputs=_linear_inputs,
        shapes=(
            {"M": 12, "V": 123, "C": 24, "ignore_index": -100},
            {"M": 24, "V": 130, "C": 16, "reduction": "sum", "label_smoothing": 0.1, "z_loss": 1e-2},
            {"M": 24, "V": 64, "C": 16, "z_loss": 1e-2, "ignore_index": 3},
            # On Hopper: more rows than programs, and no multiple; rows of more than a slot in fp32.
            {"M": 141, "V": 192, "C": 8, "ignore_index": -100},
            {"M": 3, "V": 2240, "C": 8, "label_smoothing": 0.1, "ignore_index": 5},
        ),
        # On Hopper: fewer rows than programs, and no multiple of them; rows of one slot of shared memory (bf16), of
        # some, of a little more than all in fp32 and in bf16, and longer ones; and rows that its kernel cannot take.
        large=(
            {"M": 140, "V": 4096, "C": 16, "ignore_index": -100, "label_smoothing": 0.1},
            {"M": 530, "V": 6208, "C": 16, "reduction": "sum", "z_loss": 1e-2, "ignore_index": 3},
            {"M": 300, "V": 50304, "C": 16, "ignore_index": -100},
            {"M": 150, "V": 57408, "C": 16, "label_smoothing": 0.1, "z_loss": 1e-2},
            {"M": 270, "V": 114752, "C": 16, "reduction": "sum", "ignore_index": -100},
            {"M": 5, "V": 128256, "C": 16, "label_smoothing": 0.1, "ignore_index": -100},
            {"M": 150, "V": 128256, "C": 16, "z_loss": 1e-2},
            {"M": 140, "V": 50257, "C": 16, "ignore_index": -100},
        ),
        gradients=("input", "weight"),
        traffic=lambda s: (s["M"] * s["V"], 2 * s["M"] * s["V"]),
        flops=lambda s: (2 * s["M"] * s["V"] * s["C"], 4 * s["M"] * s["V"] * s["C"]),
        # dx is rounded as the gradient of the sum, and once more when it is multiplied by the loss's gradient.
        max_ratio=4.0,
        rms_ratio=1.8,
        bench=({"M": 32768, "V": 50304, "C": 768}, {"M": 8192, "V": 128256, "C": 2048}),
        compiled=(
            {"M": 4096, "V": 50304, "C": 64, "label_smoothing": 0.1},
            {"M": 4096, "V": 128256, "C": 64, "label_smoothing": 0.1},
            {"M": 4096, "V": 50257, "C": 64, "label_smoothing": 0.1},
            {"M": 4096, "V": 50257, "C": 64},
        ),
        together=True,
        empty={"M": 0, "V": 16, "C": 8, "reduction": "sum"},
    ),
)
