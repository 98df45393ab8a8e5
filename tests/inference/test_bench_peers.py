"""What `fusedlm bench` measures beside ours: that the peers are there, and compute the same model."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fusedlm.inference.bench import peers
from fusedlm.inference.bench.busy import busy_processes
from fusedlm.inference.bench.decode import Setting, runners
from fusedlm.inference.bench.runners import random_prompt
from fusedlm.models import PRESETS, DecoderModel

Build = Callable[..., DecoderModel]
SETTING = Setting(rounds=1, prompt=5, new_tokens=3, long_prompt=20, threads=1)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Say whether a C++ compiler is there; llama.cpp is not."""
    installed = peers.installed
    monkeypatch.setattr(peers, "installed", lambda package: package != "llama_cpp" and installed(package))

    def there(yes: bool) -> None:
        monkeypatch.setattr(shutil, "which", lambda name: "/bin/" + name if yes else None)

    return there


@pytest.mark.parametrize("there", [True, False])
def test_transformers_is_compiled_where_a_compiler_is(
    there: bool, compiler: Callable[[bool], None], random_model: Build, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    compiler(there)
    model = random_model("tiny-gpt2")
    names = [r.name for r in runners("tiny", model, None, "float32", SETTING, tmp_path)]
    assert names == ["fusedlm", "transformers"] + ["transformers, compiled"] * there
    assert [r.name for r in runners("tiny", model, None, "int8", SETTING, tmp_path)] == ["fusedlm"]


@pytest.mark.parametrize("preset", ["tiny-gpt2", "tiny-llama"])
def test_the_likeliest_tokens_of_transformers_compiled_are_those_of_float64(
    preset: str, random_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    compile, called = torch.compile, []

    def traced(model: torch.nn.Module) -> torch.nn.Module:
        called.append(model)
        return compile(model, backend="eager")  # traced, guarded, and no compiler needed

    monkeypatch.setattr(torch, "compile", traced)
    config = replace(PRESETS[preset], context_length=64)
    runner = peers.Transformers(random_model(config), 24, compiled=True)
    assert len(called) == 1
    truth = random_model(config, dtype=torch.float64)
    for n in (8, 5):  # the second prompt over what the first left
        ids = random_prompt(24, config.vocab_size, seed=n)
        found = [runner.read(ids[:n])] + [runner.step(token) for token in ids[n:]]
        with torch.no_grad():
            assert found == truth(torch.tensor([ids]))[0, n - 1 :].argmax(-1).tolist()


def test_busy_processes_are_there_and_gone() -> None:
    before = os.times().children_user
    with busy_processes(2) as processes:
        time.sleep(1)
        assert [process.poll() for process in processes] == [None, None]
    assert None not in [process.poll() for process in processes]
    assert os.times().children_user - before > 0.1, "they computed"
