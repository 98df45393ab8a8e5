"""Peers' figures kept between runs while one works on an op. Never for figures that are published."""

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

from benchmarks.peers import Peer, version
from fusedlm.testing import OpCase, Shape


class PeerCache:
    """A folder with a file an op. A figure is found again for one GPU, driver, versions, adapter, shape and dtype."""

    def __init__(self, folder: Path, environment: dict[str, Any]) -> None:
        self.folder = folder
        self.machine = [environment[name] for name in ("gpu", "driver", "torch", "triton")]

    def _key(self, case: OpCase, name: str, peer: Peer, shape: Shape, direction: str) -> str:
        code = hashlib.sha256(inspect.getsource(peer.source or peer.function).encode()).hexdigest()[:12]
        of = [*self.machine, name, version(name), code, case.name, dict(shape), str(case.bench_dtype), direction]
        return json.dumps(of)

    def _path(self, case: OpCase) -> Path:
        return self.folder / f"{case.name}.json"

    def _all(self, case: OpCase) -> dict[str, Any]:
        path = self._path(case)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def get(self, case: OpCase, name: str, peer: Peer, shape: Shape, direction: str) -> dict[str, Any] | None:
        """What `put` was given, or None."""
        return self._all(case).get(self._key(case, name, peer, shape, direction))

    def put(self, case: OpCase, name: str, peer: Peer, shape: Shape, direction: str, measured: dict[str, Any]) -> None:
        """Keep what was measured (seconds, extra_bytes)."""
        found = self._all(case)
        found[self._key(case, name, peer, shape, direction)] = measured
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path(case).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
