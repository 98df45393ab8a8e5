"""Attention: causal and full, grouped heads, offsets, odd widths, packed sequences, dropout."""

from typing import Any

import torch

from fusedlm.kernels import backend
from fusedlm.kernels.attention import attention, left_to_torch, torch_attention
from fusedlm.testing.cases.dropout import seed_input
from fusedlm.testing.contract import Inputs, OpCase, Shape, randn


def _inputs(shape: Shape, g: torch.Generator | None) -> Inputs:
    B, H, T, D = (shape[letter] for letter in "BHTD")
    G, S = shape.get("G", H), shape.get("S", T)
    device = None if g is None else g.device
    inputs: Inputs = {"q": randn(g, B, H, T, D), "k": randn(g, B, G, S, D), "v": randn(g, B, G, S, D)}
    inputs |= {"causal": shape.get("causal", True), "offset": shape.get("offset", S - T), "cu_seqlens": None}
    inputs |= {"dropout_p": shape.get("p", 0.0), "seed": seed_input(g) if shape.get("p") else None, "stream": 3}
    if shape.get("each"):
        inputs["offset"] = torch.arange(B, device=device) % 3 + S - T - 2
    if shape.get("packed"):
        lengths = torch.tensor([0, *shape["packed"]], dtype=torch.int32, device=device)
        inputs["cu_seqlens"] = lengths.cumsum(0).to(torch.int32)
    return inputs


def _reference(offset: Any, **inputs: Any) -> torch.Tensor:
    return torch_attention(**inputs, offset=offset, scale=inputs["q"].shape[3] ** -0.5)


def _ours(**inputs: Any) -> torch.Tensor:
    """By itself the op takes torch's attention where that is faster."""
    with backend("triton"):
        return attention(**inputs)


def _flops(shape: Shape) -> tuple[int, int]:
    """Two products forward and five backward; half of it where causal, as everybody counts it."""
    B, H, T, D = (shape[letter] for letter in "BHTD")
    product = 2 * B * H * T * shape.get("S", T) * D // (2 if shape.get("causal", True) else 1)
    return 2 * product, 5 * product


CASES = (
    OpCase(
        name="attention",
        op=attention,
        reference=_reference,
        inputs=_inputs,
        shapes=(
            {"B": 1, "H": 2, "T": 40, "D": 64},
            {"B": 1, "H": 4, "G": 2, "T": 21, "S": 40, "D": 24},
            {"B": 3, "H": 2, "G": 1, "T": 18, "S": 35, "D": 40, "each": True},
            {"B": 1, "H": 2, "T": 37, "S": 20, "D": 20, "causal": False},
            {"B": 1, "H": 1, "T": 43, "D": 16, "packed": (5, 0, 20, 1, 17)},
            {"B": 1, "H": 2, "G": 1, "T": 26, "D": 16, "packed": (17, 9), "causal": False},
            {"B": 2, "H": 2, "G": 1, "T": 36, "S": 45, "D": 16, "p": 0.3},
            {"B": 1, "H": 2, "T": 43, "D": 16, "packed": (5, 21, 17), "p": 0.2},
            {"B": 1, "H": 2, "T": 20, "S": 9, "D": 128},  # the first queries see nothing
            {"B": 1, "H": 1, "T": 20, "S": 25, "D": 72, "offset": 40},  # behind the last key
            {"B": 1, "H": 1, "T": 32, "S": 48, "D": 24},  # whole blocks of tokens, but not of D
            {"B": 1, "H": 1, "T": 128, "D": 128},
        ),
        gradients=("q", "k", "v"),
        traffic=lambda s: (4 * s["B"] * s["H"] * s["T"] * s["D"], 8 * s["B"] * s["H"] * s["T"] * s["D"]),
        flops=_flops,
        timed=_ours,
        deterministic=False,
        left=lambda inputs, trains: left_to_torch(
            inputs["q"], inputs["k"], inputs["seed"], inputs["cu_seqlens"], trains
        ),
        checked=lambda s: {**s, "B": 1, "H": 2 * s["H"] // s.get("G", s["H"]), "G": 2},
        bench=(
            {"B": 32, "H": 12, "T": 1024, "D": 64},
            {"B": 4, "H": 32, "T": 4096, "D": 64},
            {"B": 4, "H": 16, "T": 4096, "D": 128},
            {"B": 1, "H": 16, "T": 16384, "D": 128},
            {"B": 4, "H": 32, "G": 8, "T": 4096, "D": 64},
            {"B": 32, "H": 12, "T": 1024, "D": 64, "p": 0.1},
            {"B": 32, "H": 12, "T": 1024, "D": 64, "causal": False},
            {"B": 4, "H": 8, "T": 4096, "D": 256},
        ),
        empty={"B": 0, "H": 2, "T": 8, "D": 16},
    ),
)
