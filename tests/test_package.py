"""What `import fusedlm` gives, and what it costs."""

import importlib.metadata
import json
import subprocess
import sys

import pytest

import fusedlm


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_all_is_what_is_exported() -> None:
    for name in fusedlm.__all__:
        assert getattr(fusedlm, name) is not None
    assert set(dir(fusedlm)) == set(fusedlm.__all__)


def test_version_is_the_installed_one() -> None:
    try:
        installed = importlib.metadata.version("fusedlm")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from a source tree that is not installed")
    assert installed == fusedlm.__version__


def test_the_package_runs_as_the_command() -> None:
    command = [sys.executable, "-m", "fusedlm"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["fusedlm", fusedlm.__version__]
    wrong = subprocess.run([*command, "trian"], capture_output=True, text=True)
    assert (wrong.returncode, "trian" in wrong.stderr) == (2, True)


def test_import_works_without_triton_and_brings_nothing_heavy() -> None:
    code = """
import sys, json
sys.modules["triton"] = None  # as if it were not there
import fusedlm
fusedlm.load, fusedlm.ChatSession
import fusedlm.kernels, fusedlm.models
print(json.dumps([m for m in ("transformers", "gguf", "huggingface_hub.hf_api") if m in sys.modules]))
"""
    assert json.loads(run(code)) == []


def test_import_costs_little_beyond_torch() -> None:
    """And so does the first use of a name, which imports the rest: about 0.3 s, most of it Triton."""
    code = """
import time
import torch
start = time.perf_counter()
import fusedlm
middle = time.perf_counter()
fusedlm.load
print(middle - start, time.perf_counter() - start)
"""
    times = [[float(t) for t in run(code).split()] for _ in range(3)]
    assert min(t for t, _ in times) < 0.3
    assert min(t for _, t in times) < 1.0
