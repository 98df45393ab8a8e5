"""A tiny model on disk, and the command line run in this process."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from fusedlm import LanguageModel
from fusedlm.cli import main
from fusedlm.models import PRESETS, DecoderModel, build_model
from fusedlm.tokenizer.bpe import BPETokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, gpt2_files: Path) -> Path:
    """A GPT-2 of random weights with GPT-2's vocabulary, a context of 96 and a chat template."""
    config = replace(PRESETS["tiny-gpt2"], vocab_size=50257, width=16, head_dim=4, mlp_width=32, context_length=96)
    model: DecoderModel = build_model(config)
    model.init_weights(torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("models") / "tiny"
    LanguageModel(model, BPETokenizer.from_directory(gpt2_files)).save(path)
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return path


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run `fusedlm` with arguments; a traceback would come out as an exception here."""

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["fusedlm", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run
