"""The examples do what they say."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[1] / "examples"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernels_in_transformers", EXAMPLES / "kernels_in_transformers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["gpt2", "llama-3.2-1b"])
def test_a_transformers_model_keeps_its_logits_gradients_and_names(example: Any, name: str) -> None:
    config = example.TINY[name]
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    assert example.difference(config, DEVICE) < 2e-6
    plain = example.build(config, torch.float32, DEVICE)
    fused = example.use_kernels(example.build(config, torch.float32, DEVICE))
    assert fused.state_dict().keys() == plain.state_dict().keys()
    ids = torch.randint(0, config.vocab_size, (2, 21), device=DEVICE)
    plain(ids, labels=ids).loss.backward()
    loss = example.language_modeling_loss(fused, ids)
    loss.backward()
    for (path, p), q in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad - q.grad).norm() < 1e-5 * q.grad.norm(), path
    want = plain.eval().generate(ids[:1], max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(fused.eval().generate(ids[:1], max_new_tokens=8, do_sample=False, pad_token_id=0), want)


def test_dropout_of_a_transformers_gpt2_is_ours_in_training_alone(example: Any) -> None:
    config = example.TINY["gpt2"]
    config.resid_pdrop = config.embd_pdrop = 0.3
    model = example.use_kernels(example.build(config, torch.float32, DEVICE))
    ids = torch.randint(0, config.vocab_size, (1, 30), device=DEVICE)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)
    config.resid_pdrop = config.embd_pdrop = 0.0


def test_a_model_that_the_kernels_do_not_cover_is_refused(example: Any) -> None:
    with pytest.raises(ValueError, match="the model is a Linear; expected LlamaForCausalLM"):
        example.use_kernels(torch.nn.Linear(2, 2))
