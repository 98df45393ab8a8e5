"""The contract of every op: interpreted on a CPU (fp32, fp16), compiled and run on a GPU (bf16, fp16, fp32)."""

from typing import Any

import pytest
import torch

from fusedlm.testing import Shape, check, checks
from fusedlm.testing.cases import CASES

triton = pytest.importorskip("triton", reason="the kernels need Triton")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
# bf16 is wrong in Triton's interpreter.
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if GPU else (torch.float32, torch.float16)


def _settings() -> list[Any]:
    return [
        pytest.param(case, shape, options, id=f"{name}-{i}")
        for name, case in CASES.items()
        for i, (shape, options) in enumerate(checks(case, dtypes=DTYPES))
    ]


@pytest.mark.parametrize(("case", "shape", "options"), _settings())
def test_contract(case: Any, shape: Shape, options: dict[str, Any]) -> None:
    check(case, shape, device=DEVICE, **options)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("name", CASES)
def test_compiles_whole(name: str) -> None:
    """torch.compile(fullgraph=True) over the op, forward and backward."""
    case = CASES[name]
    check(
        case,
        case.shapes[0],
        dtype=torch.bfloat16,
        device=DEVICE,
        transform=lambda op: torch.compile(op, fullgraph=True),
    )
