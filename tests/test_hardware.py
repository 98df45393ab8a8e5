"""The table of GPUs against what their multiprocessors can do in a clock; the GPU that is there, pretended; cores."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fusedlm.hardware import DTYPES, GPU, GPUS, available_cores, detect, dtype_name, find_gpu

# fp16 operations a multiprocessor and clock with fp32 sums, and the boost clock in GHz: of architecture white papers.
CLOCKS = {
    "v100": (1024, 1.53),
    "v100-32gb": (1024, 1.53),
    "t4": (1024, 1.59),
    "a100-40gb": (2048, 1.41),
    "a100": (2048, 1.41),
    "a30": (2048, 1.44),
    "a10": (1024, 1.695),
    "a40": (1024, 1.74),
    "a6000": (1024, 1.80),
    "rtx3090": (512, 1.695),
    "l4": (1024, 2.04),
    "l40s": (1024, 2.49),
    "rtx6000ada": (1024, 2.505),
    "rtx4090": (512, 2.52),
    "h100": (4096, 1.83),
    "h100-pcie": (4096, 1.62),
    "h100-nvl": (4096, 1.545),
    "h200": (4096, 1.83),
    "b200": (8192, 1.85),
    "gb200": (8192, 2.0),
    "rtx5090": (512, 2.407),
}


@pytest.mark.parametrize("name", GPUS)
def test_peaks_are_dense(name: str) -> None:
    operations, clock = CLOCKS[name]
    gpu = GPUS[name]
    assert gpu.flops["fp16"] == pytest.approx(gpu.sms * operations * clock * 1e9, rel=0.02)
    if "bf16" in gpu.flops:
        assert gpu.capability >= (8, 0)
        assert gpu.flops["bf16"] == gpu.flops["fp16"]
        assert gpu.flops["tf32"] == pytest.approx(gpu.flops["bf16"] / 2, rel=0.03)
    assert ("fp8" in gpu.flops) == (gpu.capability >= (8, 9))
    if "fp8" in gpu.flops:
        assert gpu.flops["fp8"] == pytest.approx(gpu.flops["bf16"] * 2, rel=0.02)


def test_gpus_by_many_names() -> None:
    for name, key in {
        "H100": "h100",
        "A100 80GB": "a100",
        "RTX 4090": "rtx4090",
        "4090": "rtx4090",
        "NVIDIA H200": "h200",
    }.items():
        assert find_gpu(name) is GPUS[key]
    assert find_gpu(GPUS["l4"]) is GPUS["l4"]
    with pytest.raises(ValueError, match=r"unknown GPU 'h10'; did you mean .*h100"):
        find_gpu("h10")
    with pytest.raises(ValueError, match="unknown GPU 'zebra'; expected one of v100, "):
        find_gpu("zebra")


def test_dtypes_by_many_names() -> None:
    assert [dtype_name(d) for d in (torch.bfloat16, "bfloat16", "BF16", torch.float32, torch.float8_e4m3fn)] == [
        "bf16",
        "bf16",
        "bf16",
        "fp32",
        "fp8",
    ]
    assert [dtype_name(d) for d in DTYPES] == list(DTYPES)
    with pytest.raises(ValueError, match=r"dtype is 'torch\.int8'; expected one of fp32, tf32"):
        dtype_name(torch.int8)
    with pytest.raises(ValueError, match="Tesla T4 has no peak for bf16; expected one of: fp32, fp16"):
        GPUS["t4"].peak("bf16")


@pytest.mark.parametrize(
    ("name", "gib", "key"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA H100 PCIe", 79.1, "h100-pcie"),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40gb"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", 79.1, "a100"),
        ("Tesla V100-SXM2-32GB", 31.7, "v100-32gb"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.6, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9.6, None),
        ("NVIDIA Something New", 100.0, None),
    ],
)
def test_the_gpu_that_is_there(name: str, gib: float, key: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = int(gib * 2**30)
    said = SimpleNamespace(name=name, total_memory=memory, multi_processor_count=7, L2_cache_size=5, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: said)
    found = detect()
    assert isinstance(found, GPU)
    assert (found.memory, found.sms, found.l2, found.capability) == (memory, 7, 5, (9, 0))
    if key is None:
        with pytest.raises(ValueError, match="none is known of this GPU"):
            found.peak("bf16")
    else:
        assert found.flops == GPUS[key].flops


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert detect() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert detect("cpu") is None


@pytest.mark.parametrize(
    ("contents", "expected"), [("max 100000", None), ("100000 100000", 1), ("150000 100000", 2), ("1000 100000", 1)]
)
def test_a_containers_share_is_kept(contents: str, expected: int | None, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(contents + "\n")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert available_cores(tmp_path / "cpu.max") == (cores if expected is None else min(cores, expected))


def test_no_container(tmp_path: Path) -> None:
    assert available_cores(tmp_path / "missing") >= 1
