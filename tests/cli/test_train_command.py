"""`fusedlm train` from the command line: with a text of one's own, resumed, and refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SMALL = [
    *("--set", "model.n_layers=1", "--set", "model.width=16", "--set", "model.n_heads=2"),
    *("--set", "model.context_length=16", "--set", "training.batch_size=2", "--set", "evaluation.sample_tokens=4"),
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("def a cat sat on the mat\n" * 300, encoding="utf-8")
    return path


def test_a_text_becomes_a_model_that_generates(run: Callable[..., Any], text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run(
        "train", "--data", text, "--preset", "python-char", "--steps", 3, *SMALL, "-o", folder, "--device", "cpu"
    )
    assert done.code == 0, done.err
    assert "3 steps, best validation loss" in done.out
    assert f"--model {folder}" in done.out
    assert "validation loss" in done.err
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "--- step 3\ndef " in (folder / "samples.txt").read_text()
    written = run("generate", "def ", "--model", folder, "-n", 3)
    assert written.code == 0, written.err
    assert written.out.startswith("def ")

    more = run("train", "--resume", folder, "--steps", 5, "--device", "cpu")
    assert more.code == 0, more.err
    assert "from step 3 on" in more.err
    assert "5 steps" in more.out
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["3", "3", "5", "5"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "training.lrr=1"], "unknown key training.lrr; did you mean training.lr?"),
        (["--preset", "gpt"], "unknown preset 'gpt'; did you mean gpt2"),
        (["--resume", "there/is/none"], "holds no run"),
        (["--resume", "x", "--preset", "gpt2"], "--preset is given with --resume; a run goes on with its own settings"),
        (["--lora", 4], "lora.rank is 4, and there is no --init"),
        (["--set", "lora.rank=4", "--preset", "shakespeare-char"], "lora.rank is 4, and there is no --init"),
        (["--data", "nosuchfile.txt"], "there is no file, folder or named set 'nosuchfile.txt'"),
    ],
)
def test_what_is_refused(run: Callable[..., Any], arguments: list[str], said: str, tmp_path: Path) -> None:
    out = [] if "--resume" in arguments else ["-o", tmp_path / "run"]
    done = run("train", *arguments, *out)
    assert done.code == 1
    assert said in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()  # so that the next try may have its name


def test_a_text_of_ones_own_is_continued_from_its_own_beginning(
    run: Callable[..., Any], text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    done = run("train", "--data", text, "--steps", 1, *SMALL, "-o", folder, "--device", "cpu")
    assert done.code == 0, done.err
    assert "--- step 1\n\n" in (folder / "samples.txt").read_text()


def test_documents_without_a_split_val_say_so(run: Callable[..., Any], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a cat sat on a mat, and a rat sat on a cat"}\n' * 3, encoding="utf-8")
    done = run(
        "train", "--data", rows, "-t", "characters", "--steps", 1, *SMALL, "-o", tmp_path / "run", "--device", "cpu"
    )
    assert done.code == 0, done.err
    assert "no split val, so no validation loss; data.val_fraction=0.1 would make one" in done.err
