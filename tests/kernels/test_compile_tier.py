"""Every kernel compiles for every generation of GPU without spilling, on a machine that has none."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler for NVIDIA GPUs is for Linux")


def _compiled(*arguments: str) -> tuple[list[dict[str, Any]], int]:
    """What the compile tier found, in a process of its own, and its exit status."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # the compiler, not the interpreter
    command = [sys.executable, str(Path(__file__).with_name("compile_tier.py")), *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.stdout, done.stderr
    return json.loads(done.stdout), done.returncode


def test_kernels_compile_without_spills() -> None:
    from compile_tier import SPILLS

    found, status = _compiled()
    assert {r["op"] for r in found} >= {"layer_norm", "rms_norm"}
    assert {r["capability"] for r in found} == {80, 89, 90, 100, 120}
    assert all(0 < r["registers"] <= 255 for r in found)
    narrow = [r for r in found if r["op"] != "attention" or r["constants"]["BLOCK_D"] <= 128]
    assert [r for r in narrow if r["stack"] > SPILLS.get(r["kernel"], 0) and r["capability"] != 120] == []
    assert status == 0


def test_the_loss_compiles_for_hopper_in_all_its_forms() -> None:
    """Rows that fit shared memory and longer ones, every dtype, with and without gradients and smoothing."""
    found, status = _compiled("linear_cross_entropy", "--for", "90", "--thorough")
    losses = [r for r in found if r["kernel"] in ("loss_kernel", "hopper_loss_kernel")]
    forms = {tuple(r["constants"][k] for k in ("SUM", "GRADIENT")) for r in losses}
    hopper = [r["constants"] for r in losses if r["kernel"] == "hopper_loss_kernel"]
    assert forms == {(a, b) for a in (False, True) for b in (False, True)}
    assert {(c["SUM"], c["GRADIENT"], c["STREAM"] > 0) for c in hopper} >= {(a, b, b) for a, b in forms}
    assert [r for r in losses if r["kernel"] == "loss_kernel"]  # a V that TMA cannot read
    assert [r for r in losses if r["stack"]] == []
    assert status == 0
