"""Which kernel serves a product with an epilogue, and its launch."""

import functools
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from fusedlm.kernels._backend import forced, interpreting
from fusedlm.kernels._columns import sum_partials
from fusedlm.kernels._launch import capability, launch, launch_described, num_programs
from fusedlm.kernels._philox import drop_threshold
from fusedlm.kernels._triton import triton
from fusedlm.kernels.linear.product import product_kernel

Epilogue = Literal["add", "gelu", "dgelu", "swiglu", "dswiglu"]

MIN_ROWS = 1024  # on Hopper, fewer rows do not fill its programs


@dataclass(frozen=True)
class Product:
    """What is done to a @ b^T before it is stored, beside its tensors; see `product_kernel`.

    keep: store what a backward pass needs too. totals: sum y over rows. seed, p, stream: of a dropout.
    """

    epilogue: Epilogue
    tanh: bool = True
    keep: bool = False
    totals: bool = False
    seed: Tensor | None = None
    p: float = 0.0
    stream: int = 0


def kernel_for(a: Tensor, N: int, K: int) -> Literal["hopper", "plain"] | None:
    """Which kernel computes a product of a, (M, K), with N columns; None where the vendor's and a pass behind it do.

    By itself only what was measured faster: Hopper's, in 16 bits. With `backend("triton")` there is always one.
    """
    wanted = forced() == "triton"
    if a.itemsize == 2 and capability(a.device) == 90 and not (N % 8 or K % 8) and (wanted or a.shape[0] >= MIN_ROWS):
        return "hopper"
    return "plain" if wanted else None


@functools.cache
def _config(itemsize: int, capability: int) -> dict[str, Any]:
    if interpreting():
        return {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}
    if itemsize > 2:  # fp32 products take no tensor cores and more of everything
        return {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 1}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3 if capability != 89 else 2}


def _described(t: Tensor, block: list[int]) -> Any:
    """A descriptor for tiles of a matrix; of a copy where the hardware cannot read the matrix itself."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from fusedlm.kernels._gluon import gl

    if t.stride(1) != 1 or t.stride(0) % 8 or not t.stride(0) or t.data_ptr() % 16:
        t = t.contiguous()
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16 if t.dtype == torch.bfloat16 else gl.float16)
    return TensorDescriptor(t, list(t.shape), [t.stride(0), 1], block, layout)


def product(
    a: Tensor, b: Tensor, bias: Tensor | None, given: Tensor | None, what: Product
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, what is kept, the sums of y over rows): a @ b^T with an epilogue, by the kernel that `kernel_for` names.

    a: (M, K), b: (N, K), any strides. given: see `product_kernel`; contiguous. Nothing is empty.
    """
    (M, K), N = a.shape, b.shape[0]
    name = what.epilogue
    new = functools.partial(torch.empty, dtype=a.dtype, device=a.device)
    y = new((M, {"swiglu": N // 2, "dswiglu": 2 * N}.get(name, N)))
    kept = new((M, N)) if what.keep else None
    numbers = (M, N, K, what.stream, *drop_threshold(what.p))
    if kernel_for(a, N, K) == "hopper":
        totals = new((8 * triton.cdiv(M, 256), N), dtype=torch.float32) if what.totals else None
        rows = b.stride(1) == 1 or b.stride(0) != 1 or name == "swiglu"  # else it lies as (K, N) in memory
        described = (
            _described(a, [128, 64]),
            _described(b, [64 if name == "swiglu" else 128, 64]) if rows else _described(b.T, [64, 128]),
        )
        constants: dict[str, Any] = {"B_ROWS": rows, "EPILOGUE": name, "TANH": what.tanh, "GROUP_M": 8, "STAGES": 3}
        constants["AHEAD"] = 0 if name == "dswiglu" else 2  # as many as need no more registers than there are
        arguments = (*described, y, kept, bias, given, what.seed, totals, *numbers)
        kernel = import_module("fusedlm.kernels.linear.hopper").hopper_product_kernel  # late: it needs Triton
        programs = min(num_programs(a.device, 1), triton.cdiv(M, 256) * triton.cdiv(N, 128))
        launch_described(kernel, (programs, 1, 1), arguments, {**constants, "num_warps": 4})
    else:
        config = _config(a.itemsize, capability(a.device))
        if name == "swiglu":
            N //= 2
            numbers = (M, N, *numbers[2:])
        lines = triton.cdiv(M, config["BLOCK_M"])
        totals = new((lines, N), dtype=torch.float32) if what.totals else None
        tensors = (a, b, y, kept, bias, given, what.seed, totals)
        key = tuple(None if t is None else t.dtype for t in tensors)
        constants = {"EPILOGUE": name, "TANH": what.tanh, "PRECISION": "ieee", **config}
        grid = (lines * triton.cdiv(N, config["BLOCK_N"]), 1, 1)
        launch(product_kernel, grid, key, tensors, (*a.stride(), *b.stride(), *numbers), constants)
    sums = None if totals is None else sum_partials(totals.unsqueeze(0), a.dtype)[0]
    return y, kept, sums
