"""Linear layers with what follows them, and whole MLPs."""

import torch

from fusedlm.kernels.linear import linear, linear_ref
from fusedlm.kernels.mlp import mlp, mlp_ref
from fusedlm.testing.cases.dropout import seed_input
from fusedlm.testing.contract import Inputs, OpCase, Shape, randn


def _inputs(shape: Shape, g: torch.Generator | None) -> Inputs:
    M, K, N = (shape[letter] for letter in "MKN")
    inputs: Inputs = {"x": randn(g, M, K), "weight": randn(g, N, K) / K**0.5, "bias": randn(g, N)}
    inputs |= {"activation": shape.get("activation"), "residual": None}
    if shape.get("residual"):
        inputs["residual"] = randn(g, M, N)
    p = shape.get("p", 0.0)
    return inputs | {"dropout_p": p, "seed": seed_input(g) if p else None, "stream": 5}


def _mlp_inputs(shape: Shape, g: torch.Generator | None) -> Inputs:
    M, K, F, N = (shape[letter] for letter in "MKFN")
    gated = shape["activation"] == "swiglu"
    H = 2 * F if gated else F
    inputs: Inputs = {"x": randn(g, M, K), "up": randn(g, H, K) / K**0.5, "up_bias": None if gated else randn(g, F)}
    inputs |= {"down": randn(g, N, F) / F**0.5, "down_bias": None if gated else randn(g, N)}
    return inputs | {"activation": shape["activation"]}


def _flops(s: Shape) -> tuple[int, int]:
    product = 2 * s["M"] * s["N"] * s["K"]
    return product, 2 * product


def _mlp_flops(s: Shape) -> tuple[int, int]:
    products = 2 * s["M"] * s["F"] * (s["K"] * (2 if s["activation"] == "swiglu" else 1) + s["N"])
    return products, 2 * products


# A bias' gradient is few numbers, and the RMS of their errors scatters by a tenth.
_RMS = 1.3


def _fewer_rows(s: Shape) -> Shape:
    """So that float64 fits memory beside other ops' checks; tiles are the same."""
    return {**s, "M": 4100}


def _case(name: str, gradients: tuple[str, ...], shapes: tuple[Shape, ...], bench: tuple[Shape, ...] = ()) -> OpCase:
    """One a set of differentiable inputs."""
    return OpCase(
        name=name,
        op=linear,
        reference=linear_ref,
        inputs=_inputs,
        shapes=shapes,
        gradients=gradients,
        traffic=lambda s: (s["M"] * (s["K"] + s["N"]) + s["N"] * s["K"], 2 * s["M"] * (s["K"] + s["N"])),
        flops=_flops,
        bench=bench,
        checked=_fewer_rows,
        rms_ratio=_RMS,
        empty={**shapes[0], "M": 0},
    )


def _mlp_case(name: str, activations: tuple[str, ...], bench: Shape) -> OpCase:
    """bench: without the activation, which is the first."""
    sizes: tuple[Shape, ...] = (
        {"M": 37, "K": 24, "F": 40, "N": 24},
        {"M": 21, "K": 13, "F": 29, "N": 17},
        {"M": 70, "K": 40, "F": 72, "N": 128},
    )
    shapes = tuple({**s, "activation": activations[i % len(activations)]} for i, s in enumerate(sizes))
    biases = () if activations[0] == "swiglu" else ("up_bias", "down_bias")
    return OpCase(
        name=name,
        op=mlp,
        reference=mlp_ref,
        inputs=_mlp_inputs,
        shapes=shapes,
        gradients=("x", "up", "down", *biases),
        traffic=lambda s: (2 * s["M"] * (s["K"] + s["N"] + s["F"]), 4 * s["M"] * (s["K"] + s["N"] + s["F"])),
        flops=_mlp_flops,
        checked=_fewer_rows,
        rms_ratio=_RMS,
        bench=({**bench, "activation": activations[0]},),
        empty={**shapes[0], "M": 0},
    )


CASES = (
    _case(
        "linear_gelu",
        ("x", "weight", "bias"),
        (
            {"M": 37, "K": 40, "N": 24, "activation": "gelu_tanh"},
            {"M": 21, "K": 35, "N": 29, "activation": "gelu"},
            {"M": 70, "K": 72, "N": 136, "activation": "gelu_tanh"},
        ),
        tuple({"M": 32768, "K": c, "N": 4 * c, "activation": "gelu_tanh"} for c in (768, 1024, 1600)),
    ),
    _case(
        "linear_add",
        ("x", "weight", "bias", "residual"),
        (
            {"M": 37, "K": 40, "N": 24, "residual": True},
            {"M": 21, "K": 35, "N": 29, "residual": True},
            {"M": 20, "K": 16, "N": 40, "residual": True, "p": 0.3},
            {"M": 70, "K": 72, "N": 136, "residual": True, "p": 0.1},
        ),
        tuple({"M": 32768, "K": k, "N": n, "residual": True} for k, n in ((768, 768), (3072, 768))),
    ),
    _mlp_case("mlp", ("gelu_tanh", "gelu"), {"M": 32768, "K": 768, "F": 3072, "N": 768}),
    _mlp_case("mlp_swiglu", ("swiglu",), {"M": 16384, "K": 2048, "F": 8192, "N": 2048}),
)
