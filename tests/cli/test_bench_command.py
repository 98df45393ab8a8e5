"""`fusedlm bench` on a tiny model: what it prints and writes."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from fusedlm.inference.bench import busy, peers

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def _no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "installed", lambda package: False)


FEW = ("--rounds", "1", "--prompt-tokens", "5", "--new-tokens", "3", "--long-prompt", "20", "--threads", "2")


def test_decode_measures_every_precision_and_replaces_rows(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    for _ in range(2):
        outcome = run("bench", "decode", "--model", tiny_model, *FEW, "--json", file)
        assert outcome.code == 0, outcome.err
    rows = json.loads(file.read_text())["decode"]
    assert [(r["precision"], r["runner"]) for r in rows] == [(p, "fusedlm") for p in ("int8", "bfloat16", "float32")]
    assert all(r["token_seconds"] > 0 and r["prompt_tokens_per_second"] > 0 for r in rows)
    assert outcome.out.count("ms/token") == 3
    assert run("bench", "decode", "--model", tiny_model, *FEW, "--precision", "bfloat16", "--json", file).code == 0
    again = json.loads(file.read_text())["decode"]
    assert [i for i in range(3) if again[i] != rows[i]] == [1], "measured anew, in its old place"
    assert again[1]["precision"] == "bfloat16"
    assert json.loads(file.read_text())["machine"]["cores"] >= 1


def test_busy_cores(run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, counts = tmp_path / "results.json", ("--processes", "0", "--processes", "3")
    few = ("--rounds", "1", "--prompt-tokens", "5", "--new-tokens", "40", "--threads", "2")
    started: list[int] = []
    monkeypatch.setattr(busy, "busy_processes", lambda count: nullcontext(started.append(count)))
    for _ in range(2):
        outcome = run("bench", "busy", "--model", tiny_model, *few, *counts, "--json", file)
        assert outcome.code == 0, outcome.err
    assert started == [0, 3, 0, 3]
    rows = json.loads(file.read_text())["busy"]
    assert [(r["runner"], r["busy"]) for r in rows] == [("fusedlm", 0), ("fusedlm", 3)]
    assert all(0 < r["token_seconds"] < 10 for r in rows)
    assert all([r["token_seconds"]] == r["token_rounds"] for r in rows), "one round"
    assert outcome.out.count("ms/token") == 2


def test_quality_of_eight_bits(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    text, file = tmp_path / "text.txt", tmp_path / "results.json"
    text.write_text("To be, or not to be, that is the question. " * 20)
    outcome = run("bench", "quality", text, "--model", tiny_model, "--tokens", "80", "--json", file)
    assert outcome.code == 0, outcome.err
    wide, narrow = json.loads(file.read_text())["quality"]
    assert wide["mean_kl"] == 0
    assert 0 < narrow["mean_kl"] < 1e-3
    assert narrow["perplexity"] == pytest.approx(wide["perplexity"], rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("decode", "--device", "cuda"), "device is 'cuda'; expected cpu"),
        (("decode", "--precision", "int4"), "unknown precision 'int4'; expected one of int8, bfloat16, float32"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: tuple[str, ...], message: str, run: Run) -> None:
    outcome = run("bench", *arguments)
    assert outcome.code == 1
    assert outcome.err == f"fusedlm: error: {message}\n"
