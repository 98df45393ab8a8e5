"""The contract of every op: interpreted on a CPU (fp32, fp16), compiled and run on a GPU (bf16, fp16, fp32)."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusedlm.kernels import backend
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


@pytest.mark.skipif(not GPU, reason="too much to interpret")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("case", "shape"), [pytest.param(c, s, id=f"{n}-{i}") for n, c in CASES.items() for i, s in enumerate(c.large)]
)
def test_contract_at_large_shapes(case: Any, shape: Shape, dtype: torch.dtype) -> None:
    check(case, shape, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("name", CASES)
def test_compiles_whole(name: str) -> None:
    """torch.compile(fullgraph=True) over the op, forward and backward; without a GPU all but code generation."""
    torch._dynamo.reset()
    compiler = "inductor" if GPU else "aot_eager"
    check(
        CASES[name],
        CASES[name].shapes[0],
        dtype=DTYPES[0],
        device=DEVICE,
        transform=lambda op: torch.compile(op, fullgraph=True, backend=compiler),
    )


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fusedlm":
            self.calls[func] = args
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.gradients])
def test_operators_are_what_the_compiler_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes, strides and aliasing of every operator, for what the op calls it with."""
    case = CASES[name]
    made = case.inputs(case.shapes[0], torch.Generator().manual_seed(0))
    inputs = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in made.items()}
    for key, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            inputs[key] = value.float().requires_grad_(key in case.gradients)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with backend("triton"), _Recorder() as recorder:
        result = case.op(**inputs)
        outputs = [o for o in (result if isinstance(result, tuple) else (result,)) if o.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.randn_like(o) for o in outputs])
    monkeypatch.undo()
    assert recorder.calls
    for op, arguments in recorder.calls.items():
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
