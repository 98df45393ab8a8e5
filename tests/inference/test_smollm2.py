"""The default model itself: downloaded, tokenized as llama.cpp does, continued as transformers does.

The expected ids are in tests/fixtures/smollm2_greedy.json; make_smollm2_greedy.py beside it says how they were made.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from fusedlm import LanguageModel, load
from fusedlm.inference.decoder import EagerDecoder
from fusedlm.models import PRESETS

pytestmark = pytest.mark.network

FIXTURE: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "fixtures/smollm2_greedy.json").read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def model(smollm2_file: Path) -> LanguageModel:
    return load(smollm2_file, device="cpu", dtype="float32")


def test_the_file_is_the_one_of_the_fixture(smollm2_file: Path) -> None:
    assert smollm2_file.stat().st_size == 98_362_432
    assert hashlib.sha256(smollm2_file.read_bytes()).hexdigest() == FIXTURE["sha256"]


def test_its_config_is_the_presets(model: LanguageModel) -> None:
    assert model.model.config == PRESETS["smollm2-135m-instruct"]


@pytest.mark.parametrize("case", FIXTURE["cases"], ids=[c["prompt"][:20] for c in FIXTURE["cases"]])
def test_prompts_and_greedy_tokens(case: dict[str, Any], model: LanguageModel) -> None:
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(case["prompt"], allow_special=True)
    assert ids == case["prompt_ids"]
    decoder = EagerDecoder(model.model, 1, len(ids) + 20)
    logits, tokens = decoder.prefill([ids]), []
    for _ in range(20):  # through the end of text, too: the fixture goes on behind it
        tokens.append(int(logits[0].argmax()))
        logits = decoder.step([tokens[-1]], [True])
    assert tokens == case["greedy"]
