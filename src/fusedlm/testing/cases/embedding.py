"""Token embedding: with positions, dropout, and many tokens of one id."""

import torch

from fusedlm.kernels.embedding import embedding, embedding_ref
from fusedlm.testing.cases.dropout import seed_input
from fusedlm.testing.contract import Inputs, OpCase, Shape, randn


def _inputs(shape: Shape, g: torch.Generator | None) -> Inputs:
    B, T, C, V = (shape[letter] for letter in "BTCV")
    device = None if g is None else g.device
    ids = torch.randint(0, V, (B, T), generator=g, device=device)
    if shape.get("runs"):
        ids[:, : T // 2] = 3  # a run over many chunks
    inputs: Inputs = {"ids": ids, "weight": randn(g, V, C)}
    if shape.get("S"):
        inputs["position_weight"] = randn(g, shape["S"], C)
        inputs["positions"] = shape.get("offset", 0)
        if shape.get("each"):
            inputs["positions"] = torch.randint(0, shape["S"], (B, T), generator=g, device=device)
    else:
        inputs["position_weight"] = randn(g, T, C)
    if shape.get("p"):
        inputs |= {"dropout_p": shape["p"], "seed": seed_input(g), "stream": 3}
    return inputs


CASES = (
    OpCase(
        name="embedding",
        op=embedding,
        reference=embedding_ref,
        inputs=_inputs,
        shapes=(
            {"B": 3, "T": 5, "C": 24, "V": 7, "S": 9, "offset": 2, "p": 0.3},
            {"B": 2, "T": 7, "C": 123, "V": 50, "S": 11, "each": True},
            {"B": 2, "T": 20, "C": 16, "V": 10, "runs": True},
            {"B": 1, "T": 4, "C": 40, "V": 1, "S": 4, "p": 0.5},
            {"B": 2, "T": 3, "C": 16, "V": 20},  # few enough that all rows are zeroed, in the interpreter
            {"B": 9, "T": 9, "C": 8, "V": 300},  # many enough to be sorted, in the interpreter: as int16, and as int32
            {"B": 9, "T": 9, "C": 8, "V": 40000},
        ),
        large=(  # ranked in several tiles; sorted, as int16 and as int32
            {"B": 41, "T": 127, "C": 24, "V": 300, "p": 0.3},
            {"B": 130, "T": 127, "C": 24, "V": 300, "runs": True},
            {"B": 130, "T": 127, "C": 16, "V": 70000, "S": 130, "offset": 3, "p": 0.3},
        ),
        gradients=("weight", "position_weight"),
        traffic=lambda s: (2 * s["B"] * s["T"] * s["C"], (2 * s["B"] * s["T"] + s["V"] + s["S"]) * s["C"]),
        bench=tuple(
            {"B": B, "T": T, "C": C, "V": 50257, "S": 1024, "p": 0.1}
            for C in (768, 1024)
            for T in (128, 512, 1024)
            for B in (32, 64, 128)
        ),
        bench_dtype=torch.float32,
        empty={"B": 0, "T": 4, "C": 16, "V": 5, "S": 4},
    ),
)
