"""How many cores a process may use."""

import os
from pathlib import Path

import pytest

from fusedlm.inference.cores import available_cores


@pytest.mark.parametrize(
    ("contents", "expected"), [("max 100000", None), ("100000 100000", 1), ("150000 100000", 2), ("1000 100000", 1)]
)
def test_a_containers_share_is_kept(contents: str, expected: int | None, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(contents + "\n")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert available_cores(tmp_path / "cpu.max") == (cores if expected is None else min(cores, expected))


def test_no_container(tmp_path: Path) -> None:
    assert available_cores(tmp_path / "missing") >= 1
