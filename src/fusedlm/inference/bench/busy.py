"""A token's time while other processes keep the cores busy."""

import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fusedlm.inference.bench import peers
from fusedlm.inference.bench.decode import Setting, bench_model, runners
from fusedlm.inference.bench.runners import random_prompt


@contextmanager
def busy_processes(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """So many processes that each compute without end until the block ends."""
    started = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()


def measure_busy(name: str, counts: Iterable[int], setting: Setting, folder: Path) -> list[dict[str, Any]]:
    """Rows of "model", "precision", "runner", "busy", "token_seconds", "token_rounds" and "setting", in 8 bits.

    token_rounds: the mean of each round, for every wait counts. token_seconds: their median, for rounds differ much.
    counts: of busy processes. folder: where peers' files are kept. Of a setting, long_prompt is not used.
    """
    model, source = bench_model(name)
    vocab_size = model.config.vocab_size
    found = runners(name, model, source, "int8", setting, folder)
    for r in found:
        r.step(r.read(random_prompt(setting.prompt, vocab_size)))  # compiles, allocates, and reads files
    times: dict[tuple[str, int], list[float]] = {}
    for i in range(setting.rounds):
        prompt = random_prompt(setting.prompt, vocab_size, i + 1)
        for count in counts:
            for r in found:
                token = r.read(prompt)
                with busy_processes(count):
                    time.sleep(0.5)  # until they have started
                    start = time.perf_counter()
                    for _ in range(setting.new_tokens):
                        token = r.step(token)
                    seconds = (time.perf_counter() - start) / setting.new_tokens
                times.setdefault((r.name, count), []).append(seconds)
    for r in found:
        if isinstance(r, peers.LlamaCpp):
            r.close()
    same = {"model": name, "precision": "int8", "setting": asdict(setting)}
    return [
        {
            **same,
            "runner": runner,
            "busy": count,
            "token_seconds": statistics.median(seconds),
            "token_rounds": seconds,
        }
        for (runner, count), seconds in times.items()
    ]
