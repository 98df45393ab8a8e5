"""Whole runs of a few steps: they learn, they leave what they should, and the model is a model."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedlm
from fusedlm.data.dataset import Dataset
from fusedlm.data.loader import Evaluation, Loader
from fusedlm.models import build_model
from fusedlm.tokenizer.characters import CharacterTokenizer
from fusedlm.training.config import DataConfig, make_config
from fusedlm.training.datasets import open_dataset
from fusedlm.training.metrics import COLUMNS, read_metrics
from fusedlm.training.randomness import seed_step
from fusedlm.training.ranks import Ranks
from fusedlm.training.run import read_run, train


def test_a_run_learns_and_leaves_a_model(run: Callable[..., Any], tmp_path: Path, dataset_folder: Path) -> None:
    heard, result = run(
        "run", "training.steps=60", "evaluation.interval=30", "training.batch_size=8", "training.dropout=0.1"
    )
    folder = tmp_path / "run"
    assert heard.losses[0] == pytest.approx(math.log(heard.trainer.model.config.vocab_size), abs=0.2)
    assert heard.losses[-1] < heard.losses[0] - 1
    assert (result.steps, result.interrupted, heard.ended) == (60, 0, 1)
    records = read_metrics(folder / "metrics.csv")
    assert [r.loss for r in records if r.loss is not None] == pytest.approx(heard.losses, rel=1e-8)
    assert [r.step for r in records if r.val_loss is not None] == [30, 60]
    assert records[-1].tokens == 60 * 8 * 16
    assert (folder / "metrics.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    assert read_run(folder) == heard.trainer.config

    model = fusedlm.load(folder, device="cpu")
    total = count = 0.0
    for batch in Evaluation(Dataset(dataset_folder), batch_size=4, context=16):
        losses = torch.nn.functional.cross_entropy(
            model(batch.tokens).detach().double().flatten(0, 1), batch.targets.flatten(), reduction="none"
        )
        total, count = total + float(losses.sum()), count + int((batch.targets != -100).sum())
    assert result.val_loss == pytest.approx(total / count, abs=1e-5)
    assert model.generate("the ", max_new_tokens=5).text
    for name, p in model.model.named_parameters():
        assert torch.equal(p, heard.weights()[name])


def test_a_run_is_what_a_plain_loop_does(run: Callable[..., Any], dataset_folder: Path) -> None:
    """The same rows, schedule, clipping, decay and optimizer, written out with torch's own."""
    heard, _ = run("run", "training.steps=12", "training.max_norm=0.3", "training.min_lr=1e-4")
    model = build_model(heard.trainer.model.config)
    model.init_weights(torch.Generator().manual_seed(1337))
    model.double()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    loader = Loader(Dataset(dataset_folder), batch_size=4, context=16, seed=1337)
    for step in range(12):
        lr = 1e-2 * (step + 1) / 2 if step < 2 else 1e-4 + 0.99e-2 * (1 + math.cos(math.pi * (step - 2) / 9)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = loader.batch(step)
        logits = model(batch.tokens)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        record = heard.records[step]
        assert record.loss == pytest.approx(loss.item(), abs=1e-4)
        assert record.lr == pytest.approx(lr)
        assert record.norm == pytest.approx(norm.item(), rel=1e-3)


def test_every_step_and_rank_has_random_numbers_of_its_own() -> None:
    def drawn(seed: int, step: int, rank: int = 0) -> float:
        seed_step(seed, step, Ranks(rank, 4, torch.device("cpu")))
        return float(torch.rand(()))

    with torch.random.fork_rng():
        found = [drawn(seed, step, rank) for seed in (1, 2) for step in range(5) for rank in range(4)]
        assert len(set(found)) == len(found)
        assert drawn(2, 3, 1) == drawn(2, 3, 1)


def test_the_same_run_twice_is_the_same(run: Callable[..., Any]) -> None:
    once, _ = run("once", "training.dropout=0.2")
    torch.rand(7)  # whatever torch's generator was at
    twice, _ = run("twice", "training.dropout=0.2")
    other, _ = run("other", "training.dropout=0.2", "training.seed=5")
    assert once.losses == twice.losses
    assert all(torch.equal(p, twice.weights()[name]) for name, p in once.weights().items())
    assert once.losses != other.losses


def test_evaluating_changes_nothing(run: Callable[..., Any]) -> None:
    without, _ = run("without", "training.dropout=0.2")
    often, _ = run(
        "often", "training.dropout=0.2", "evaluation.interval=2", "evaluation.sample_tokens=3", sample=random_sample
    )
    assert often.losses == without.losses
    assert [step for step, _ in often.samples] == [2, 4, 6, 8]


def random_sample(model: Any, tokenizer: Any, tokens: int) -> str:
    assert not model.training
    return tokenizer.decode(torch.randint(0, 5, (tokens,)).tolist())


def test_sources_are_prepared_in_the_runs_folder(text: Path, tmp_path: Path) -> None:
    sections: Any = {
        "data": {"sources": [str(text)], "tokenizer": "characters"},
        "model": {"n_layers": 1, "n_heads": 2, "width": 16, "context_length": 8, "architecture": "llama"},
        "training": {"steps": 2, "batch_size": 2},
    }
    result = train(make_config(None, None, [], **sections), tmp_path / "run", device="cpu")
    assert Dataset(tmp_path / "run" / "data").split("val").n_tokens > 1000
    assert result.val_loss is not None
    assert fusedlm.load(tmp_path / "run").model.config.n_layers == 1


def test_what_is_refused(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(ValueError, match=r"full exists already; expected a new folder, or --resume"):
        run("full")
    with pytest.raises(ValueError, match="batch_size is 4; expected a multiple"):
        run("uneven", "training.micro_batches=3")
    with pytest.raises(ValueError, match="the model has 5 tokens, and the dataset"):
        run("small", "model.vocab_size=5")
    with pytest.raises(ValueError, match="device is 'tpu'; expected auto, cuda or cpu"):
        train(make_config("python-char"), tmp_path / "x", device="tpu")
    with pytest.raises(ValueError, match=r"holds no run: .*run\.toml is missing"):
        read_run(tmp_path / "nothing")


def test_a_separator_has_the_escapes_that_people_type(tmp_path: Path) -> None:
    """As `fusedlm data prepare --separator` takes it."""
    (tmp_path / "text.txt").write_text("\n%%\n".join(["abc ab", "cab", "bca"] * 20))
    data = DataConfig(sources=(str(tmp_path / "text.txt"),), tokenizer="characters", separator="\\n%%\\n")
    tokenizer = open_dataset(data, tmp_path / "data").tokenizer()
    assert isinstance(tokenizer, CharacterTokenizer)
    assert sorted(tokenizer.characters) == [" ", "a", "b", "c"]
