"""A small text, prepared once, and runs of a few small steps."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers

from fusedlm import LanguageModel
from fusedlm.data.documents import find_sources
from fusedlm.data.prepare import prepare
from fusedlm.kernels import join_master
from fusedlm.models import PRESETS, build_model
from fusedlm.tokenizer.bpe import BPETokenizer
from fusedlm.tokenizer.description import BPEDescription, added_token, bpe_document, byte_level
from fusedlm.training.checkpoints import Checkpoints
from fusedlm.training.config import RunConfig, make_config
from fusedlm.training.metrics import Record
from fusedlm.training.ranks import Ranks
from fusedlm.training.run import train
from fusedlm.training.saver import Saver, load_state
from fusedlm.training.trainer import Result

TINY: dict[str, dict[str, Any]] = {
    "model": {"n_layers": 2, "n_heads": 2, "width": 32, "context_length": 16},
    "training": {"steps": 8, "batch_size": 4, "lr": 1e-2, "warmup": 2, "precision": "fp32"},
    "evaluation": {"interval": 0, "sample_tokens": 0},
    "checkpoints": {"interval": 4},
    "log": {"interval": 1},
}


def make_masters_whole(folder: Path, step: int) -> None:
    """Write a run's checkpoint anew as earlier versions did: with fp32 masters of bf16 parameters, rounded to even."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    checkpoints, ranks = Checkpoints(folder / "checkpoints", keep=9), Ranks(0, 1, torch.device("cpu"))
    found = checkpoints.verify(step)
    saved = FileSystemReader(found.folder).read_metadata().state_dict_metadata
    state = {name: torch.empty(facts.size, dtype=facts.properties.dtype) for name, facts in saved.items()}  # type: ignore[union-attr]
    load_state(found, state, ranks)
    lows = [name for name in state if name.endswith(".master_low")]
    assert lows
    for name in lows:
        whole = name.removesuffix("_low")
        parameter = whole.replace("optimizer.", "model.", 1).removesuffix(".master")
        state[whole] = join_master(state[parameter], state.pop(name))
        state[parameter] = state[whole].bfloat16()
    saver = Saver(checkpoints, ranks, run=found.manifest.run, model=found.manifest.model, asynchronous=False)
    saver.save(step, state)
    saver.close()


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Matrices here are so small that threads cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20,000 characters of words that repeat, so that a small model learns something."""
    rng = random.Random(5)
    words = ["the", "cat", "sat", "on", "mats", "and", "42", "naive", "rats;", "(x)"]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(" ".join(rng.choices(words, k=8)) for _ in range(600)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def dataset_folder(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text as a dataset of characters, with a split val."""
    folder = tmp_path_factory.mktemp("dataset")
    prepare(find_sources([text]), folder, "characters")
    return folder


@pytest.fixture
def configure(dataset_folder: Path) -> Callable[..., RunConfig]:
    """A configuration of a few small steps; overrides as --set takes them."""

    def configure(*overrides: str) -> RunConfig:
        sections = {**TINY, "data": {"sources": [str(dataset_folder)]}}
        return make_config(None, None, overrides, **sections)

    return configure


class Heard:
    """An observer that keeps what it hears."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.said: list[str] = []
        self.samples: list[tuple[int, str]] = []
        self.trainer: Any = None
        self.began: list[int] = []
        self.ended = 0

    def begin(self, run: Any, done: int) -> None:
        self.trainer = run
        self.began.append(done)

    def record(self, record: Record) -> None:
        self.records.append(record)

    def say(self, text: str) -> None:
        self.said.append(text)

    def sample(self, step: int, text: str) -> None:
        self.samples.append((step, text))

    def end(self) -> None:
        self.ended += 1

    @property
    def losses(self) -> list[float]:
        return [r.loss for r in self.records if r.loss is not None]

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.trainer.model.named_parameters()}


@pytest.fixture
def heard_of() -> type[Heard]:
    return Heard


@pytest.fixture
def run(configure: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., tuple[Heard, Result]]:
    """Train in tmp_path/NAME, on the CPU, and give what was heard."""

    def run(name: str, *overrides: str, resume: bool = False, **options: Any) -> tuple[Heard, Result]:
        heard = Heard()
        config = configure(*overrides)
        return heard, train(config, tmp_path / name, resume=resume, device="cpu", observers=[heard], **options)

    return run


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    """A model on disk whose tokenizer has a token a byte, two of ChatML, and a template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: id for id, token in enumerate(letters)}
    added = [added_token(256 + i, token, special=True) for i, token in enumerate(("<|im_start|>", "<|im_end|>"))]
    document = bpe_document(vocab, [], byte_level(use_regex=True), added_tokens=added)
    named = {"eos_token": "<|im_end|>"}
    description = BPEDescription(source="bytes", document=document, named_tokens=named, chat_template=CHATML)
    model = build_model(replace(PRESETS["tiny-llama"], vocab_size=258, n_layers=1))
    model.init_weights(torch.Generator().manual_seed(1))
    LanguageModel(model, BPETokenizer(description)).save(tmp_path / "model")
    return tmp_path / "model"
