"""Kill a run at random moments, saving included, until it is done; its weights must be those of a run left alone.

    python tests/training/kills.py DATASET FOLDER [--kills 50] [--seed 0]

Processes are forked from this one, which has imported everything, so that a kill costs tenths of a second. Prints how
many kills there were and at which steps runs went on; exits with 1 where a resume fails or weights differ.
"""

import argparse
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint

from fusedlm.training.config import make_config
from fusedlm.training.run import train

SECTIONS: dict[str, dict[str, Any]] = {
    "model": {"n_layers": 2, "n_heads": 2, "width": 32, "context_length": 16},
    "training": {"steps": 40, "batch_size": 4, "lr": 1e-2, "warmup": 2, "dropout": 0.1, "spike_sigmas": 6.0},
    "evaluation": {"interval": 10, "batches": 2, "sample_tokens": 0},
    "checkpoints": {"interval": 3, "keep": 2},
    "log": {"interval": 1},
}


class Steps:
    """Notes in a file at which step a process went on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, run: Any, done: int) -> None:
        with self.path.open("a") as file:
            file.write(f"{done}\n")

    def __getattr__(self, name: str) -> Any:
        return lambda *given: None


def start(dataset: Path, folder: Path, log: Path) -> int:
    """Begin the run or go on with it, in a process of its own; gives its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        config = make_config(None, None, (), **SECTIONS, data={"sources": [str(dataset)]})
        begun = (folder / "run.toml").exists()
        train(config, folder, resume=begun or folder.exists(), device="cpu", observers=[Steps(log)])
        code = 0
    except BaseException as error:
        with log.open("a") as file:
            file.write(f"failed: {type(error).__name__}: {error}\n")
    finally:
        os._exit(code)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(options.seed)

    begin = time.monotonic()
    alone = options.folder / "alone"
    _, status = os.waitpid(start(options.dataset, alone, options.folder / "alone.log"), 0)
    length = time.monotonic() - begin
    if status:
        print((options.folder / "alone.log").read_text())
        return 1

    killed = runs = inside = 0
    resumed: list[int] = []
    while killed < options.kills:
        folder, log = options.folder / f"run-{runs}", options.folder / f"run-{runs}.log"
        while True:
            pid = start(options.dataset, folder, log)
            end = time.monotonic() + rng.uniform(0.0, length) if killed < options.kills else float("inf")
            status = None
            while status is None and time.monotonic() < end:
                done, found = os.waitpid(pid, os.WNOHANG)
                status = found if done else None
                time.sleep(0.001)
            if status is None:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                killed += 1
                inside += any(path.name.startswith(".step-") for path in folder.glob("checkpoints/.step-*"))
            elif status:
                print(f"{folder}: {log.read_text()}")
                return 1
            else:
                break
        if weights(folder) != weights(alone):
            print(f"{folder}: its weights differ from those of the run that was left alone")
            return 1
        resumed += [int(line) for line in log.read_text().split()]
        runs += 1
    print(f"{killed} kills in {runs} runs of {length:.1f} s, {inside} inside a save; went on from steps {resumed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
