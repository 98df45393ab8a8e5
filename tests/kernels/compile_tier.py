"""Compile every kernel for GPUs that are not here, and read what it would take of them.

    python tests/kernels/compile_tier.py [NAMES] [--for CAPABILITY ...] [--thorough] [--json]

Ops run on the device "meta" at the shapes of their case and record their launches; each is compiled for sm_80, 89,
90, 100 and 120 by the real compiler (so not under TRITON_INTERPRET=1), and cuobjdump reads registers, stack and shared
memory. A stack means spilled registers, for no kernel here has local arrays: any fails, but for sixteen bytes on
sm_120, as does too much shared memory. Attention wider than 128 is only reported. --thorough: in bf16, fp16 and fp32,
at the case's `compiled` shapes too, with and without gradients.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fusedlm.kernels import backend
from fusedlm.kernels._launch import Launch, record_launches
from fusedlm.testing.cases import CASES
from fusedlm.testing.contract import OpCase, Shape, deterministic_algorithms

# Shared memory a program may take, in bytes.
SHARED_LIMITS = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
SPILL_LIMITS = {80: 0, 89: 0, 90: 0, 100: 0, 120: 16}  # bytes a thread
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# ptxas of Triton 3.6 keeps one dead register across the end of a group of warps, outside of all loops.
SPILLS = {"hopper_dkv_kernel": 8}
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.bool: "i1",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes. registers, stack: a thread, the stack in bytes. shared: bytes a program."""

    op: str
    kernel: str
    constants: dict[str, Any]
    capability: int
    registers: int
    stack: int
    shared: int

    @property
    def fits(self) -> bool:
        wide = self.op == "attention" and self.constants["BLOCK_D"] > 128
        return (
            wide or self.stack <= SPILLS.get(self.kernel, SPILL_LIMITS[self.capability])
        ) and self.shared <= SHARED_LIMITS[self.capability]


def _launches(
    case: OpCase, shape: Shape, dtype: torch.dtype, capability: int = 90, *, gradients: bool = True
) -> list[Launch]:
    """What a forward pass, and a backward pass where there are gradients, launch on a GPU. Nothing is computed."""
    with torch.device("meta"):
        inputs = {}
        for name, value in case.inputs(shape, None).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                value = value.to(torch.float32 if name in case.fixed else dtype)
                value.requires_grad_(gradients and name in case.gradients)
            inputs[name] = value
        with backend("triton"), record_launches(capability) as launches:
            result = case.op(**inputs)
            outputs = [o for o in (result if isinstance(result, tuple) else (result,)) if o.requires_grad]
            if outputs:
                torch.autograd.backward(
                    outputs, [torch.empty_like(o) for o in outputs], retain_graph=not case.deterministic
                )
            if outputs and not case.deterministic:  # other kernels give the same bits at each call
                with deterministic_algorithms():
                    torch.autograd.backward(outputs, [torch.empty_like(o) for o in outputs])
        return launches


def _compile(launch: Launch, capability: int) -> Any:
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    options = dict(launch.constants)
    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[i] if i < len(launch.arguments) else options.pop(name)
        if i >= len(launch.arguments) or value is None or value is True or value is False:
            signature[name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}{value.block_shape},{value.layout!r}>"
            continue
        if isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    kind = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    source = kind(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _read(compiled: Any) -> tuple[int, int]:
    """Registers and stack bytes a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [str(CUOBJDUMP), "-res-usage", cubin.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", text))
    return int(found["REG"]), int(found["STACK"])


def compile_case(
    case: OpCase, *, capabilities: Iterable[int] = tuple(SHARED_LIMITS), thorough: bool = False
) -> Iterator[Resources]:
    """Every kernel that an op launches at its shapes to time (or the contract's), for generations of GPU."""
    seen = set()
    every = case.bench or case.shapes
    # The smallest, the middle and the largest of many; all where products and so widths decide, and for Hopper.
    few = every if case.flops or not case.bench else case.bench[:: max(1, len(case.bench) // 2)]
    more: tuple[Shape, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    passes: tuple[bool, ...] = (True,)
    if thorough:
        more, dtypes, passes = case.compiled, (torch.bfloat16, torch.float16, torch.float32), (True, False)
    settings = [
        (shape, *rest, capability)
        for capability in capabilities
        for shape, *rest in itertools.product((every if capability == 90 else few) + more, dtypes, passes)
    ]
    for shape, dtype, gradients, capability in settings:
        for launch in _launches(case, shape, dtype, capability, gradients=gradients):
            types = tuple(a.dtype if isinstance(a, Tensor) else type(a) for a in launch.arguments)
            key = (launch.kernel, capability, types, tuple(launch.constants.items()))
            if key in seen:
                continue
            seen.add(key)
            compiled = _compile(launch, capability)
            registers, stack = _read(compiled)
            shared = compiled.metadata.shared
            name = launch.kernel.__name__
            yield Resources(case.name, name, launch.constants, capability, registers, stack, shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="ops; all where none is named")
    parser.add_argument(
        "--for", type=int, nargs="+", choices=SHARED_LIMITS, default=tuple(SHARED_LIMITS), dest="capabilities"
    )
    parser.add_argument("--thorough", action="store_true", help="every dtype, more shapes, also without gradients")
    parser.add_argument("--json", action="store_true", help="print all as JSON")
    options = parser.parse_args()
    how = {"capabilities": options.capabilities, "thorough": options.thorough}
    found = [r for name in options.names or CASES for r in compile_case(CASES[name], **how)]
    bad = [r for r in found if not r.fits]
    if options.json:
        print(json.dumps([asdict(r) for r in found]))
    else:
        for r in (r for r in found if r.stack or not r.fits):
            print(f"{r.op} {r.kernel} sm_{r.capability} {r.constants}: stack {r.stack} B, shared {r.shared} B")
        print(f"Triton {triton.__version__}: {len(found)} kernels compiled, {len(bad)} spill too much or do not fit")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
