"""The four norms."""

import torch

from fusedlm.kernels import norm
from fusedlm.testing.cases.dropout import seed_input
from fusedlm.testing.contract import WIDTHS, Inputs, OpCase, Shape, randn


def _norm_inputs(shape: Shape, g: torch.Generator | None, *, residual: bool | None, bias: bool) -> Inputs:
    M, N = shape["M"], shape["N"]
    inputs: Inputs = {"x": randn(g, M, N) + 0.5}
    if residual is not False:
        inputs["residual"] = randn(g, M, N) if residual else None
    inputs["weight"] = 1 + 0.5 * randn(g, N)
    if bias:
        inputs["bias"] = randn(g, N)
    if shape.get("p"):
        inputs |= {"dropout_p": shape["p"], "seed": seed_input(g), "stream": 5}
    return inputs


_NORM_SHAPES: tuple[Shape, ...] = (
    {"M": 7, "N": 123},
    {"M": 5, "N": 760},
    {"M": 4, "N": 768},
    {"M": 2, "N": 5},
    {"M": 5, "N": 4100},  # too wide to keep the weight in registers
)


def _norm_case(name: str, *, residual: bool | None, bias: bool) -> OpCase:
    """residual: None where the sum is the norm's input, and handed on."""
    passes = {True: (4, 4), False: (2, 3), None: (2, 4)}[residual]
    op = f"add_{name.removesuffix('_of_sum')}" if residual is None else name
    return OpCase(
        name=name,
        op=getattr(norm, op),
        reference=getattr(norm, f"{op}_ref"),
        inputs=lambda shape, g: _norm_inputs(shape, g, residual=residual, bias=bias),
        shapes=_NORM_SHAPES + (({"M": 7, "N": 123, "p": 0.3}, {"M": 16, "N": 5, "p": 0.5}) if residual else ()),
        gradients=("x", *(["residual"] if residual else []), "weight", *(["bias"] if bias else [])),
        traffic=lambda s: (passes[0] * s["M"] * s["N"], (passes[1] + bool(s.get("p"))) * s["M"] * s["N"]),
        bench=() if residual is None else WIDTHS + (tuple({**s, "p": 0.1} for s in WIDTHS[::2]) if residual else ()),
        empty={"M": 0, "N": 16},
    )


CASES = (
    _norm_case("layer_norm", residual=False, bias=True),
    _norm_case("rms_norm", residual=False, bias=False),
    _norm_case("add_layer_norm", residual=True, bias=True),
    _norm_case("add_rms_norm", residual=True, bias=False),
    _norm_case("layer_norm_of_sum", residual=None, bias=True),
    _norm_case("rms_norm_of_sum", residual=None, bias=False),
)
