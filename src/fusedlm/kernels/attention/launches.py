"""Which kernel serves an attention, with which tiles, and its launch."""

import functools
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fusedlm.kernels._backend import interpreting
from fusedlm.kernels._launch import capability, launch, launch_described
from fusedlm.kernels._philox import drop_threshold
from fusedlm.kernels._triton import triton
from fusedlm.kernels.attention.backward import dkv_kernel, dq_kernel
from fusedlm.kernels.attention.forward import fwd_kernel
from fusedlm.kernels.attention.fused import delta_kernel, narrow_kernel

# (BLOCK_M, BLOCK_N, num_warps, num_stages) by kernel and widest D, in 16 bits. Hopper's are measured, see
# docs/kernels/attention.md; the others are the largest that spill no registers from sm_80 to sm_120.
_HOPPER = {
    ("forward", 64): (64, 64, 4, 3),
    ("forward", 128): (64, 64, 4, 3),
    ("dq", 64): (64, 64, 4, 3),
    ("dq", 128): (128, 64, 8, 3),
    ("dkv", 64): (32, 64, 4, 2),
    ("dkv", 128): (32, 128, 8, 2),
}
_OTHERS = {
    ("forward", 64): (128, 64, 8, 2),
    ("forward", 128): (128, 64, 8, 2),
    ("dq", 64): (128, 64, 8, 2),
    ("dq", 128): (128, 32, 8, 2),
    ("dkv", 64): (32, 128, 8, 1),
    ("dkv", 128): (32, 64, 8, 1),
}


@dataclass(frozen=True)
class Setting:
    """What an attention does beside its tensors. offset: (B,) int64, or None where it is `start` for all."""

    offset: Tensor | None
    cu_seqlens: Tensor | None
    seed: Tensor | None
    causal: bool
    start: int
    scale: float
    p: float
    stream: int


@functools.cache
def _config(kernel: str, D: int, itemsize: int, capability: int) -> dict[str, int]:
    """Blocks of queries and keys, warps, and stages of the pipeline, of the kernels for every GPU."""
    block_d = max(triton.next_power_of_2(D), 16)
    if interpreting():
        return {"BLOCK_D": block_d, "BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    if block_d > 128 or itemsize > 2:  # fp32 products take no tensor cores and more of everything
        m, n, warps, stages = (64, 32, 8, 1) if kernel == "forward" else (32, 32, 8, 1)
    else:
        m, n, warps, stages = (_HOPPER if capability == 90 else _OTHERS)[kernel, max(block_d, 64)]
    return {"BLOCK_D": block_d, "BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}


def _hopper_config(kernel: str, q: Tensor, k: Tensor, setting: Setting) -> dict[str, int] | None:
    """Tile and stages of the kernel for Hopper; None where it cannot serve, or was measured slower than the other."""
    D, S = q.shape[3], k.shape[2]
    if capability(q.device) != 90 or q.itemsize != 2 or not 32 < D <= 128 or D % 8 or not k.numel():
        return None
    if setting.seed is not None or setting.cu_seqlens is not None:
        return None
    if kernel == "bwd":
        if D > 64 or torch.are_deterministic_algorithms_enabled():
            return None
        return {"BLOCK_D": 64, "BLOCK_M": 64, "STAGES": 3, "DS_STAGES": 2, "TOGETHER": 8, "REGISTERS": 208}
    if D > 64:
        size = {"BLOCK_D": 128}
        if kernel == "dkv":
            return size | {"BLOCK_M": 64, "STAGES": 2, "TOGETHER": 1}
        return size | {"BLOCK_N": 64 if kernel == "dq" and S <= 8192 else 128, "STAGES": 2}
    if kernel == "dkv":
        return {"BLOCK_D": 64, "BLOCK_M": 64, "STAGES": 2 if S <= 2048 else 3, "TOGETHER": 8}
    return None


@functools.cache
def _hopper_kernel(name: str) -> Any:
    """Imported late: it takes a tenth of a second, and works with Triton alone."""
    module = {"hopper_bwd_kernel": "hopper_bwd", "hopper_dkv_kernel": "hopper_dkv"}.get(name, "hopper")
    return getattr(import_module(f"fusedlm.kernels.attention.{module}"), name)


def tokens_outside(t: Tensor) -> Tensor:
    """An empty (B, H, T, D) that is (B, T, H, D) in memory: the next product takes heads side by side."""
    B, H, T, D = t.shape
    return t.new_empty((B, T, H, D)).transpose(1, 2)


def _tiled(t: Tensor) -> Tensor:
    """t, or a copy, with unit stride along D and tokens so near to each other that 32 bits do within a tile."""
    return t if t.stride(-1) == 1 and t.stride(-2) < 2**24 else t.contiguous()


def _described(t: Tensor, rows: int, columns: int) -> Any:
    """A descriptor for tiles of (rows, columns) of (B, H, T, D); of a copy where the hardware cannot read t itself."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from fusedlm.kernels._gluon import gl

    whole = 16 // t.itemsize
    pairs = list(zip(t.shape[:3], t.stride()[:3], strict=True))
    if t.stride(3) != 1 or t.data_ptr() % 16 or any(stride % whole or not stride for n, stride in pairs if n > 1):
        t = t.contiguous()
        pairs = list(zip(t.shape[:3], t.stride()[:3], strict=True))
    strides = [stride if n > 1 else t.shape[3] for n, stride in pairs]  # of one, any would do, if it is a multiple of 8
    block = [1, 1, rows, columns]
    dtypes = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
    layout = gl.NVMMASharedLayout.get_default_for(block, dtypes[t.dtype])
    return TensorDescriptor(t, list(t.shape), [*strides, 1], block, layout)


def _bounds(cu_seqlens: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """The first token of each token's sequence and the one behind its last, (T,) int32 each."""
    number = torch.searchsorted(cu_seqlens, torch.arange(T, device=cu_seqlens.device), right=True)
    ends = cu_seqlens.to(torch.int32)
    return ends[number - 1], ends[number.clamp(max=len(ends) - 1)]


def _launch(
    kernel: Any, blocks: int, setting: Setting, tensors: tuple[Tensor, ...], config: dict[str, int], ragged: bool
) -> None:
    """A kernel for every GPU. tensors: q, k, v and all others; those of four dimensions give their strides."""
    q, k = tensors[:2]
    (_, H, T, D), (_, G, S, _) = q.shape, k.shape
    bounds = (None, None) if setting.cu_seqlens is None else _bounds(setting.cu_seqlens, T)
    key = (q.dtype, setting.offset is None, setting.cu_seqlens is None, setting.seed is None)
    strides = [s for t in tensors if t.ndim == 4 for s in t.stride()[:3]]
    scalars = (*strides, H, H // G, T, S, setting.start, setting.scale, setting.stream, *drop_threshold(setting.p))
    # fp32 stays fp32: by itself a product would be of tf32.
    constants = {"D": D, "IS_CAUSAL": setting.causal, "RAGGED": ragged, "PRECISION": "ieee"} | config
    launch(kernel, (blocks, 1, 1), key, (*tensors, setting.offset, *bounds, setting.seed), scalars, constants)


def _launch_on_hopper(
    kernel: str, blocks: int, setting: Setting, q: Tensor, k: Tensor, arguments: tuple[Any, ...], config: dict[str, int]
) -> None:
    """One of Hopper's. arguments: its descriptors and tensors but for the offset."""
    (_, H, T, _), (_, G, S, _) = q.shape, k.shape
    scalars = (setting.offset, H, H // G, T, S, setting.start, setting.scale)
    constants = {"IS_CAUSAL": setting.causal, **config, "num_warps": 4}
    launch_described(_hopper_kernel(kernel), (blocks, 1, 1), (*arguments, *scalars), constants)


def new_lse(q: Tensor) -> Tensor:
    """For log2 of the sums of exponentials: (B, H, T) fp32, and twice as long where q is wide, see `store_lse`."""
    B, H, T, _ = q.shape
    return q.new_empty((B, H, 2 * T if q.itemsize > 2 else T), dtype=torch.float32)


def forward(q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
    """(output, see `new_lse`). Nothing is empty but k and v."""
    B, H, T, D = q.shape
    o = tokens_outside(q)
    lse = new_lse(q)
    config = _hopper_config("forward", q, k, setting)
    if config is not None:
        size = config["BLOCK_D"]
        queries = [_described(t, 64, size) for t in (q, o)]
        keys = [_described(t, config["BLOCK_N"], size) for t in (k, v)]
        arguments = (queries[0], *keys, queries[1], lse)
        _launch_on_hopper("hopper_fwd_kernel", B * H * triton.cdiv(T, 128), setting, q, k, arguments, config)
        return o, lse
    config = _config("forward", D, q.itemsize, capability(q.device))
    tensors = (_tiled(q), _tiled(k), _tiled(v), o, lse)
    blocks = B * H * triton.cdiv(T, config["BLOCK_M"])
    _launch(fwd_kernel, blocks, setting, tensors, config, k.shape[2] % config["BLOCK_N"] != 0)
    return o, lse


def _rows_config(D: int) -> tuple[int, dict[str, int]]:
    """Rows of a program of the two kernels around the fused one, and their constants."""
    rows = 16 if interpreting() else 64
    return rows, {"D": D, "BLOCK_D": max(triton.next_power_of_2(D), 16), "BLOCK_M": rows, "num_warps": 4}


def begin_sums(o: Tensor, do: Tensor) -> tuple[Tensor, Tensor]:
    """(rowsum(do * o), (B, H, T) fp32; zeros for dq's sums, (B, H, T, D) fp32). Stride 1 along D."""
    B, H, T, D = o.shape
    delta, sums = (torch.empty(shape, dtype=torch.float32, device=o.device) for shape in ((B, H, T), o.shape))
    rows, config = _rows_config(D)
    strides = (*o.stride()[:3], *do.stride()[:3])
    launch(delta_kernel, (B * H * triton.cdiv(T, rows), 1, 1), o.dtype, (o, do, delta, sums), (*strides, H, T), config)
    return delta, sums


def end_sums(sums: Tensor, scale: float, dq: Tensor) -> None:
    """dq = scale * sums, rounded. dq: any strides but for 1 along D."""
    B, H, T, D = dq.shape
    rows, config = _rows_config(D)
    scalars = (*dq.stride()[:3], H, T, scale)
    launch(narrow_kernel, (B * H * triton.cdiv(T, rows), 1, 1), dq.dtype, (sums, dq), scalars, config)


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    setting: Setting,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), written to the tensors given for them, whose stride along D is 1. Nothing is empty."""
    q, k, v, do = _tiled(q), _tiled(k), _tiled(v), _tiled(do)
    config = _hopper_config("bwd", q, k, setting)
    if config is None:
        return _in_two(do, q, k, v, o, lse, setting, gradients)
    dq, dk, dv = gradients
    B, G, S = q.shape[0], *k.shape[1:3]
    delta, sums = begin_sums(o, do)
    size = config["BLOCK_D"]
    qs, dos, dqs = (_described(t, config["BLOCK_M"], size) for t in (q, do, sums))
    ks, vs, dks, dvs = (_described(t, 64, size) for t in (k, v, dk, dv))
    arguments = (qs, ks, vs, dos, dqs, dks, dvs, lse, delta)
    _launch_on_hopper("hopper_bwd_kernel", B * G * triton.cdiv(S, 128), setting, q, k, arguments, config)
    end_sums(sums, setting.scale, dq)
    return dq, dk, dv


def _in_two(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    setting: Setting,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """As `backward`, by a kernel for dq and one for dk and dv, which give the same bits at each call."""
    dq, dk, dv = gradients
    delta = lse.new_empty(q.shape[:3])
    (B, H, T, D), (_, G, S, _) = q.shape, k.shape
    config = _hopper_config("dq", q, k, setting)
    if config is not None:
        size = config["BLOCK_D"]
        qs, os, dos, dqs = (_described(t, 64, size) for t in (q, o, do, dq))
        keys = [_described(t, config["BLOCK_N"], size) for t in (k, v)]
        arguments = (qs, *keys, os, dos, dqs, lse, delta)
        _launch_on_hopper("hopper_dq_kernel", B * H * triton.cdiv(T, 128), setting, q, k, arguments, config)
    else:
        config = _config("dq", D, q.itemsize, capability(q.device))
        blocks = B * H * triton.cdiv(T, config["BLOCK_M"])
        ragged = S % config["BLOCK_N"] != 0
        _launch(dq_kernel, blocks, setting, (q, k, v, o, do, lse, delta, dq), config, ragged)
    config = _hopper_config("dkv", q, k, setting)
    if config is not None:
        size = config["BLOCK_D"]
        qs, dos = (_described(t, config["BLOCK_M"], size) for t in (q, do))
        ks, vs, dks, dvs = (_described(t, 64, size) for t in (k, v, dk, dv))
        arguments = (qs, ks, vs, dos, dks, dvs, lse, delta)
        _launch_on_hopper("hopper_dkv_kernel", B * G * triton.cdiv(S, 128), setting, q, k, arguments, config)
    else:
        config = _config("dkv", D, q.itemsize, capability(q.device))
        blocks = B * G * triton.cdiv(S, config["BLOCK_N"])
        ragged = T % config["BLOCK_M"] != 0
        _launch(dkv_kernel, blocks, setting, (q, k, v, do, lse, delta, dk, dv), config, ragged)
    return dq, dk, dv
