"""What a machine can do: a table of GPUs, what can be measured, and the cores that a process may use."""

import difflib
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

DTYPES = ("fp32", "tf32", "bf16", "fp16", "fp8")  # of products; tf32 rounds fp32 inputs, fp8 is E4M3
_ALIASES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float8_e4m3fn": "fp8"}
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True, kw_only=True)
class GPU:
    """What one GPU is said to do.

    flops: peak floating-point operations a second of dense matrix products, by dtype, with sums in fp32. memory: bytes,
    as the driver reports them. bandwidth: bytes a second of its memory. sms: multiprocessors. l2: bytes. capability:
    the compute capability.
    """

    name: str
    flops: Mapping[str, float] = field(default_factory=dict)
    memory: int
    bandwidth: float
    sms: int
    l2: int
    capability: tuple[int, int]

    def peak(self, dtype: str | torch.dtype) -> float:
        """Peak dense FLOP/s in a dtype. Raises ValueError for one that the GPU does not have, or nobody knows of."""
        name = dtype_name(dtype)
        if name not in self.flops:
            known = ", ".join(self.flops) or "none is known of this GPU"
            raise ValueError(f"{self.name} has no peak for {name}; expected one of: {known}")
        return self.flops[name]


def dtype_name(dtype: str | torch.dtype) -> str:
    """ "bf16" of "bf16", "bfloat16" or torch.bfloat16. Raises ValueError for one that is not in DTYPES."""
    given = str(dtype).removeprefix("torch.").lower()
    name = _ALIASES.get(given, given)
    if name not in DTYPES:
        raise ValueError(f"dtype is {str(dtype)!r}; expected one of {', '.join(DTYPES)}")
    return name


def _gpu(
    name: str,
    capability: tuple[int, int],
    mib: int,
    bandwidth: float,
    sms: int,
    l2_mib: float,
    fp32: float,
    tf32: float | None,
    bf16: float | None,
    fp16: float,
    fp8: float | None,
) -> GPU:
    """Bandwidth in GB/s, peaks in TFLOP/s."""
    peaks = dict(zip(DTYPES, (fp32, tf32, bf16, fp16, fp8), strict=True))
    return GPU(
        name=name,
        flops={dtype: peak * 1e12 for dtype, peak in peaks.items() if peak is not None},
        memory=mib * 2**20,
        bandwidth=bandwidth * 1e9,
        sms=sms,
        l2=int(l2_mib * 2**20),
        capability=capability,
    )


# Peaks are dense: where NVIDIA prints figures "with sparsity", half of them. Sums are fp32: GeForce cards do products
# of fp16 and fp8 with fp32 sums at half the rate that is printed for fp16 sums. fp32 is that of the ordinary cores.
# Sources, all NVIDIA's: data sheets of V100, T4, A10, A30, A40, L4, L40S, RTX A6000, RTX 6000 Ada, H100, H200, HGX B200
# and GB200 NVL72; the architecture white papers of A100, GA102 (RTX 3090), H100, Ada (RTX 4090) and RTX Blackwell
# (RTX 5090). Memory is what nvidia-smi prints, which is less than what is sold where the card reserves some for ECC.
#                                         capability    MiB   GB/s  SMs    L2   fp32  tf32   bf16   fp16    fp8
GPUS: dict[str, GPU] = {
    "v100": _gpu("Tesla V100-SXM2-16GB", (7, 0), 16384, 900, 80, 6, 15.7, None, None, 125, None),
    "v100-32gb": _gpu("Tesla V100-SXM2-32GB", (7, 0), 32768, 900, 80, 6, 15.7, None, None, 125, None),
    "t4": _gpu("Tesla T4", (7, 5), 15360, 320, 40, 4, 8.1, None, None, 65, None),
    "a100-40gb": _gpu("NVIDIA A100-SXM4-40GB", (8, 0), 40960, 1555, 108, 40, 19.5, 156, 312, 312, None),
    "a100": _gpu("NVIDIA A100-SXM4-80GB", (8, 0), 81920, 2039, 108, 40, 19.5, 156, 312, 312, None),
    "a30": _gpu("NVIDIA A30", (8, 0), 24576, 933, 56, 24, 10.3, 82, 165, 165, None),
    "a10": _gpu("NVIDIA A10", (8, 6), 23028, 600, 72, 6, 31.2, 62.5, 125, 125, None),
    "a40": _gpu("NVIDIA A40", (8, 6), 46068, 696, 84, 6, 37.4, 74.8, 149.7, 149.7, None),
    "a6000": _gpu("NVIDIA RTX A6000", (8, 6), 49140, 768, 84, 6, 38.7, 77.4, 154.8, 154.8, None),
    "rtx3090": _gpu("NVIDIA GeForce RTX 3090", (8, 6), 24576, 936, 82, 6, 35.6, 35.6, 71, 71, None),
    "l4": _gpu("NVIDIA L4", (8, 9), 23034, 300, 58, 48, 30.3, 60, 121, 121, 242.5),
    "l40s": _gpu("NVIDIA L40S", (8, 9), 46068, 864, 142, 96, 91.6, 183, 362, 362, 733),
    "rtx6000ada": _gpu("NVIDIA RTX 6000 Ada Generation", (8, 9), 49140, 960, 142, 96, 91.1, 182.1, 364.2, 364.2, 728.5),
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090", (8, 9), 24564, 1008, 128, 72, 82.6, 82.6, 165.2, 165.2, 330.3),
    "h100": _gpu("NVIDIA H100 80GB HBM3", (9, 0), 81559, 3350, 132, 50, 66.9, 494.7, 989.4, 989.4, 1978.9),
    "h100-pcie": _gpu("NVIDIA H100 PCIe", (9, 0), 81559, 2000, 114, 50, 51.2, 378, 756, 756, 1513),
    "h100-nvl": _gpu("NVIDIA H100 NVL", (9, 0), 95830, 3900, 132, 50, 60, 417.5, 835.5, 835.5, 1670.5),
    "h200": _gpu("NVIDIA H200", (9, 0), 143771, 4800, 132, 60, 66.9, 494.7, 989.4, 989.4, 1978.9),
    "b200": _gpu("NVIDIA B200", (10, 0), 183359, 7700, 148, 126.5, 75, 1100, 2250, 2250, 4500),
    "gb200": _gpu("NVIDIA GB200", (10, 0), 189471, 8000, 152, 126.5, 80, 1250, 2500, 2500, 5000),
    "rtx5090": _gpu("NVIDIA GeForce RTX 5090", (12, 0), 32607, 1792, 170, 96, 104.8, 104.8, 209.5, 209.5, 419),
}
_OTHER_NAMES = {
    "v100-16gb": "v100",
    "a100-80gb": "a100",
    "h100-sxm": "h100",
    "h100-80gb": "h100",
    "h200-sxm": "h200",
    "3090": "rtx3090",
    "4090": "rtx4090",
    "5090": "rtx5090",
    "rtxa6000": "a6000",
}


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def find_gpu(name: str | GPU) -> GPU:
    """A GPU of the table by a name such as "h100", "A100-40GB" or "RTX 4090"; a GPU is itself.

    Raises ValueError for another name, with those that are like it.
    """
    if isinstance(name, GPU):
        return name
    known = {_plain(key): key for key in GPUS} | {_plain(other): key for other, key in _OTHER_NAMES.items()}
    known |= {_plain(gpu.name): key for key, gpu in GPUS.items()}
    given = _plain(name)
    if given not in known:
        like = dict.fromkeys(known[name] for name in difflib.get_close_matches(given, known, n=5))
        expected = f"did you mean {' or '.join(like)}?" if like else f"expected one of {', '.join(GPUS)}"
        raise ValueError(f"unknown GPU {name!r}; {expected}")
    return GPUS[known[given]]


def detect(device: torch.device | str | int | None = None) -> GPU | None:
    """The GPU that is there, the current one where no device is named; None without one.

    Memory, multiprocessors and L2 are what the driver says; peaks and bandwidth are the table's. Of a GPU that is not
    in the table (a slice of one, MIG, among them) `peak` raises ValueError and the bandwidth is 0.
    """
    if not torch.cuda.is_available() or (device is not None and torch.device(device).type != "cuda"):
        return None
    found = torch.cuda.get_device_properties(device)
    gpu = _of_device_name(found.name, found.total_memory) or _unknown(found.name)
    return replace(
        gpu,
        memory=found.total_memory,
        sms=found.multi_processor_count,
        l2=found.L2_cache_size,
        capability=(found.major, found.minor),
    )


def _unknown(name: str) -> GPU:
    return GPU(name=name, memory=0, bandwidth=0.0, sms=0, l2=0, capability=(0, 0))


def _of_device_name(name: str, memory: int) -> GPU | None:
    """The GPU of the table that a driver's name means; those that differ in memory alone are told apart by it."""
    words = _model(name)
    if "mig" in words or "laptop" in words or "maxq" in words:
        return None
    if words.startswith("a100"):  # SXM4 and PCIe have the same peaks
        return GPUS["a100" if memory > 60 * 2**30 else "a100-40gb"]
    if words.startswith("v100sxm"):
        return GPUS["v100-32gb" if memory > 24 * 2**30 else "v100"]
    return {_model(gpu.name): gpu for gpu in GPUS.values()}.get(words)


def _model(name: str) -> str:
    """A driver's name without brands."""
    return _plain(name.replace("NVIDIA", "").replace("Tesla", "").replace("GeForce", ""))


def measure_bandwidth(device: torch.device, *, size: int = 1 << 28, repeats: int = 5) -> float:
    """Bytes a second that the device reads from its memory, the best of a few passes over `size` bytes.

    A sum over a buffer larger than the caches, with as many threads as torch uses. Takes about 0.2 s on a laptop.
    """
    buffer = torch.ones(size // 4, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        buffer.sum()
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return size / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def available_cores(quota: Path = _CGROUP_QUOTA) -> int:
    """Cores that this process may run on, and no more than a container's share of the time (cgroup v2) comes to."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        share, period = quota.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if share == "max" else max(1, min(cores, math.ceil(int(share) / int(period))))
