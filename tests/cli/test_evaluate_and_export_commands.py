"""`fusedlm evaluate` and `fusedlm export` against transformers."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import fusedlm
from fusedlm.training.config import make_config
from fusedlm.training.run import train

WORDS = "def a cat sat on the mat, naïve\n"


def make_run(folder: Path, *overrides: str) -> Path:
    text = folder.parent / "text.txt"
    text.write_text(WORDS * 200, encoding="utf-8")
    sections: dict[str, dict[str, Any]] = {
        "data": {"sources": [str(text)], "tokenizer": "characters"},
        "model": {"n_layers": 2, "n_heads": 2, "width": 16, "context_length": 16},
        "training": {"steps": 6, "batch_size": 2, "lr": 1e-2, "warmup": 0},
        "evaluation": {"interval": 0},
        "checkpoints": {"interval": 3},
    }
    train(make_config(None, None, overrides, **sections), folder, device="cpu")
    return folder


def test_evaluate_is_what_transformers_says(run: Callable[..., Any], tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    text = tmp_path / "other.txt"
    text.write_text(WORDS * 3 + "the mat", encoding="utf-8")
    done = run("evaluate", text, "--model", folder, "--json", "--device", "cpu", "--batch-size", 3)
    assert done.code == 0, done.err
    found = json.loads(done.out)

    ids = fusedlm.load(folder).encode(text.read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    total = 0.0
    with torch.no_grad():
        for begin in range(0, len(ids) - 1, 16):
            row = torch.tensor(ids[begin : begin + 17])
            logits = model(row[None, :-1]).logits[0]
            total += float(F.cross_entropy(logits, row[1:], reduction="sum"))
    assert found["tokens"] == len(ids) - 1
    assert found["loss"] == pytest.approx(total / (len(ids) - 1), abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    size = len(text.read_bytes()) - 1  # the first character is no target
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / size, abs=1e-5)

    spoken = run("evaluate", folder / "data", "--model", folder, "--device", "cpu")
    assert "bits per byte, over" in spoken.out
    refused = run("evaluate", folder / "data", "--model", folder, "--split", "test")
    assert (refused.code, "has no split 'test'" in refused.err) == (1, True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_export_is_a_model_of_transformers(run: Callable[..., Any], tmp_path: Path, precision: str) -> None:
    folder = make_run(tmp_path / "run", f"training.precision={precision}", "training.dropout=0.1")
    done = run("export", folder, tmp_path / "last")
    assert done.code == 0, done.err
    assert "the model of step 6, in " + {"fp32": "float32", "bf16": "bfloat16"}[precision] in done.out
    ids = torch.randint(0, 16, (2, 9))
    ours = fusedlm.load(tmp_path / "last", dtype="float64", device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "last", dtype=torch.float64)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-9, atol=1e-9)
    published = fusedlm.load(folder, dtype="float64", device="cpu")
    torch.testing.assert_close(ours(ids), published(ids), rtol=0, atol=0)

    assert run("export", folder, tmp_path / "middle", "--step", 3).code == 0
    middle = fusedlm.load(tmp_path / "middle", dtype="float64", device="cpu")
    assert (ours(ids) - middle(ids)).abs().max() > 1e-3
    assert run("export", folder, tmp_path / "wide", "--masters").code == 0
    wide = fusedlm.load(tmp_path / "wide", dtype="float32", device="cpu")
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["torch_dtype"] == "float32"
    weight, narrow = wide.model.embedding.weight, ours.model.embedding.weight
    assert torch.equal(weight.bfloat16().double(), narrow) == (precision == "bf16")
    assert torch.equal(weight.double(), narrow) == (precision == "fp32")


def test_lora_is_merged(run: Callable[..., Any], tmp_path: Path) -> None:
    first = make_run(tmp_path / "first")
    tuned = tmp_path / "tuned"
    options = ["--init", first, "--data", tmp_path / "text.txt", "--lora", 2, "--steps", 4, "--device", "cpu"]
    done = run("train", *options, "-o", tuned, "--set", "training.lr=1e-2", "--set", "training.warmup=0")
    assert done.code == 0, done.err
    assert "4 steps, best validation loss" in done.out
    assert run("export", tuned, tmp_path / "out").code == 0
    ids = torch.randint(0, 16, (2, 9))
    paths = (tmp_path / "out", tuned, first)
    logits = [fusedlm.load(path, dtype="float32", device="cpu")(ids) for path in paths]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-6, atol=1e-6)
    assert (logits[0] - logits[2]).abs().max() > 1e-3
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits[0], theirs(ids).logits, rtol=1e-4, atol=1e-5)


def test_what_is_refused(run: Callable[..., Any], tmp_path: Path) -> None:
    for arguments, said in (
        (("export", tmp_path / "none", tmp_path / "x"), "holds no run"),
        (("evaluate", tmp_path / "none.txt", "--model", tmp_path / "none"), "none"),
    ):
        done = run(*arguments)
        assert done.code == 1
        assert said in done.err
    folder = make_run(tmp_path / "run")
    assert "step-00000004/manifest.json is missing" in run("export", folder, tmp_path / "x", "--step", 4).err
    assert "already" in run("export", folder, folder).err
    assert "context is 0" in run("evaluate", tmp_path / "text.txt", "--model", folder, "--context", 0).err
    (folder / "config.json").unlink()
    assert f"fusedlm export {folder} FOLDER writes its model" in run("generate", "x", "--model", folder).err


def test_a_gpt2_that_transformers_does_not_have(run: Callable[..., Any], tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "model.n_kv_heads=1")
    done = run("export", folder, tmp_path / "out")
    assert (done.code, "transformers has no GPT-2 with" in done.err) == (0, True)
    fusedlm.load(tmp_path / "out", device="cpu")
