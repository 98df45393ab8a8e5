"""The same ops by others, at their best setting: torch eager, torch.compile, Liger where it is installed."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.peers.eager import EAGER
from fusedlm.testing import OpCase


def peers_of(case: OpCase) -> dict[str, Callable[..., Any]]:
    """Variants by name, each taking the case's inputs."""
    torch._dynamo.reset()
    eager = EAGER.get(case.name, case.reference)
    peers: dict[str, Callable[..., Any]] = {"torch": eager, "compile": torch.compile(eager, dynamic=False)}
    try:
        from benchmarks.peers.liger import LIGER
    except ImportError:
        return peers
    if case.name in LIGER:
        peers["liger"] = LIGER[case.name]
    return peers
