"""Runs for tests/training/test_parallel.py, under torchrun: python -m torch.distributed.run ... two_processes.py SPEC

SPEC: JSON, a list of runs: {"folder", "resume", "overrides", "sections", "device"}. The first rank writes losses beside
each, and of the last step how often weights were gathered and gradients exchanged, and these gradients' dtypes.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusedlm.training import run
from fusedlm.training.config import make_config
from fusedlm.training.judge import TrainingError


class Collectives(TorchDispatchMode):
    """Counts the gathers and the exchanges inside."""

    gathers = exchanges = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.gathers += str(func).startswith("c10d._allgather")
        self.exchanges += str(func).startswith("c10d.alltoall")
        return func(*args, **(kwargs or {}))


class Losses:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.losses: list[float] = []
        self.said: list[str] = []
        self.gathers = self.exchanges = 0
        self.parameters: list[torch.Tensor] = []

    def begin(self, trainer: Any, done: int) -> None:
        step = trainer.step.backward
        self.parameters = trainer.optimizer.parameters

        def counted(batches: Any) -> torch.Tensor:
            with Collectives() as seen:
                result = step(batches)
            self.gathers, self.exchanges = seen.gathers, seen.exchanges
            return result

        trainer.step.backward = counted

    def record(self, record: Any) -> None:
        if record.loss is not None:
            self.losses.append(record.loss)
        else:
            self.val_loss = record.val_loss

    def say(self, text: str) -> None:
        self.said.append(text)

    def end(self) -> None:
        counts = {"gathers": self.gathers, "exchanges": self.exchanges}
        dtypes = sorted({str(p.grad.dtype) for p in self.parameters if p.grad is not None})
        self.path.write_text(json.dumps({"losses": self.losses, "said": self.said, "gradients": dtypes, **counts}))

    def __getattr__(self, name: str) -> Any:
        return lambda *given: None


if __name__ == "__main__":
    torch.set_num_threads(1)
    specs = json.loads(sys.argv[1])
    devices = {spec.get("device", "cpu") for spec in specs}
    if "cuda" in devices:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if "cuda" in devices else "gloo")  # once for all runs
    if os.environ["RANK"] != "0":
        del run.first_model  # none but the first makes a whole model
    for spec in specs:
        config = make_config(None, None, spec["overrides"], **spec["sections"])
        folder = Path(spec["folder"])
        losses = Losses(folder.with_name(f"{folder.name}.json"))
        try:
            device = spec.get("device", "cpu")
            run.train(config, folder, resume=spec.get("resume", False), device=device, observers=[losses])
        except TrainingError as error:  # on every rank, so that the next run can begin
            folder.with_name(f"{folder.name}.error").write_text(str(error))
