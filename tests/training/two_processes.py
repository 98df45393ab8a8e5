"""Runs for tests/training/test_parallel.py, under torchrun: python -m torch.distributed.run ... two_processes.py SPEC

SPEC: JSON, a list of runs: {"folder", "resume", "overrides", "sections"}. The first rank writes losses beside each.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from fusedlm.training import run
from fusedlm.training.config import make_config
from fusedlm.training.judge import TrainingError


class Losses:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.losses: list[float] = []
        self.said: list[str] = []

    def record(self, record: Any) -> None:
        if record.loss is not None:
            self.losses.append(record.loss)
        else:
            self.val_loss = record.val_loss

    def say(self, text: str) -> None:
        self.said.append(text)

    def end(self) -> None:
        self.path.write_text(json.dumps({"losses": self.losses, "said": self.said}))

    def __getattr__(self, name: str) -> Any:
        return lambda *given: None


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")  # once for all runs
    if os.environ["RANK"] != "0":
        del run.first_model  # none but the first makes a whole model
    for spec in json.loads(sys.argv[1]):
        config = make_config(None, None, spec["overrides"], **spec["sections"])
        folder = Path(spec["folder"])
        losses = Losses(folder.with_name(f"{folder.name}.json"))
        try:
            run.train(config, folder, resume=spec.get("resume", False), device="cpu", observers=[losses])
        except TrainingError as error:  # on every rank, so that the next run can begin
            folder.with_name(f"{folder.name}.error").write_text(str(error))
