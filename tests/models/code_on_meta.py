"""Which kernels a training step compiles anew for shapes that it has not met, without a GPU. Prints names as JSON.

    python tests/models/code_on_meta.py tiny-gpt2 '[[4, 32], [3, 31]]' '[[8, 64]]'

The model is on the device "meta", where launches are recorded; each depends on its constants and on what Triton
specialises arguments for. The first list has the shapes (B, T) that are known. A process of its own, for Triton's
interpreter must be off.
"""

import json
import sys
from typing import Any

import torch
from torch import Tensor

from fusedlm.kernels import backend
from fusedlm.kernels._launch import Launch, record_launches
from fusedlm.models import PRESETS, build_model

# A product of bf16 into fp32, which cuBLAS has and meta has not; it launches nothing of ours.
sys.modules["fusedlm.kernels.linear_cross_entropy"]._product_into = lambda *_, **__: None  # type: ignore[attr-defined]


def _code(launch: Launch) -> tuple[Any, ...]:
    """What compiled code depends on: two launches of one such tuple run the same."""
    parts: list[Any] = []
    for parameter, value in zip(launch.kernel.params, launch.arguments, strict=False):
        if isinstance(value, Tensor):
            parts.append(value.dtype)
        elif isinstance(value, int) and not isinstance(value, bool):
            free = parameter.do_not_specialize
            parts.append((abs(value) < 2**31, free or value % 16 == 0, free or value == 1))
        elif isinstance(value, float):
            parts.append(float)
        else:  # None, a flag, or a descriptor with its tile
            parts.append(getattr(value, "block_shape", value))
    return launch.kernel.fn.__name__, *map(str, parts), *sorted(map(str, launch.constants.items()))


def new_code(preset: str, known: list[list[int]], later: list[list[int]]) -> list[str]:
    model = build_model(PRESETS[preset], device="meta", dtype=torch.bfloat16, dropout=0.1)

    def launched(shapes: list[list[int]]) -> set[tuple[Any, ...]]:
        codes = set()
        for shape in shapes:
            with backend("triton"), record_launches() as launches:
                ids = torch.empty(shape, dtype=torch.int64, device="meta")
                model.loss(ids, torch.empty_like(ids)).backward()  # type: ignore[no-untyped-call]
            codes |= {_code(launch) for launch in launches}
        return codes

    return sorted(code[0] for code in launched(later) - launched(known))


if __name__ == "__main__":
    print(json.dumps(new_code(sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]))))
