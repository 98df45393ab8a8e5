"""The same ops by others, each at its best setting: torch eager, torch.compile, Liger where it is installed.

An adapter takes a case's inputs by name. A case without adapters has its reference as a peer, eager and compiled.
"""

import importlib.metadata
import importlib.util

import torch

from benchmarks.peers.eager import COMPILED, EAGER, MORE
from benchmarks.peers.peer import Peer
from fusedlm.testing import OpCase, Shape

__all__ = ["Peer", "peers_of"]


def peers_of(case: OpCase, shape: Shape) -> dict[str, Peer]:
    """Peers of an op at a shape, by name. Call it once a shape: torch.compile begins anew and with it its limits."""
    torch._dynamo.reset()
    eager = EAGER.get(case.name, Peer(case.reference))
    peers = {"torch": eager, **MORE.get(case.name, {})}
    peers = {name: peer for name, peer in peers.items() if peer.takes(shape)}
    compiled = COMPILED.get(case.name, eager)
    if compiled is not None and compiled.takes(shape):
        function = torch.compile(compiled.function, dynamic=False)
        peers["compile"] = Peer(function, source=compiled.function, random=compiled.random)
    if importlib.util.find_spec("liger_kernel"):
        from benchmarks.peers.liger import LIGER

        if case.name in LIGER and LIGER[case.name].takes(shape):
            peers["liger"] = LIGER[case.name]
    return peers


def version(variant: str) -> str:
    """The version of what makes a variant."""
    return importlib.metadata.version("liger-kernel") if variant == "liger" else torch.__version__
