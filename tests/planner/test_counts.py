"""Parameters against transformers, operations against torch's counter, tokens against a search on the loss."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fusedlm.hardware import GPUS
from fusedlm.models import PRESETS, GPT2Config, ModelConfig, build_model
from fusedlm.planner import compute_mfu, count_parameters, fitted_tokens, flops_per_token, optimal_tokens, parameters
from fusedlm.planner.tokens import ALPHA, BETA, A, B

ODD = {
    "gpt2, grouped": replace(PRESETS["tiny-gpt2"], n_kv_heads=2, mlp_width=200),
    "gpt2, no biases": replace(PRESETS["tiny-gpt2"], bias=False),
    "gpt2, untied": replace(PRESETS["tiny-gpt2"], tied=False),
    "llama, wide heads": replace(PRESETS["tiny-llama"], head_dim=40, tied=False),
}


def transformers_model(config: ModelConfig) -> Any:
    import transformers

    sizes = {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tied}
    with torch.device("meta"):
        if isinstance(config, GPT2Config):
            return transformers.GPT2LMHeadModel(
                transformers.GPT2Config(
                    n_positions=config.context_length,
                    n_embd=config.width,
                    n_layer=config.n_layers,
                    n_head=config.n_heads,
                    n_inner=config.mlp_width,
                    **sizes,
                )
            )
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=config.width,
                intermediate_size=config.mlp_width,
                num_hidden_layers=config.n_layers,
                num_attention_heads=config.n_heads,
                num_key_value_heads=config.n_kv_heads,
                head_dim=config.head_dim,
                **sizes,
            )
        )


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-xl", 1_557_611_200),
        ("smollm2-135m", 134_515_008),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.1-8b", 8_030_261_248),
    ],
)
def test_parameters_are_those_of_transformers(name: str, total: int) -> None:
    found = parameters(PRESETS[name])
    theirs: dict[str, int] = {}
    parts = {"wte": "embedding", "embed_tokens": "embedding", "wpe": "positions", "attn": "attention", "mlp": "mlp"}
    for path, p in transformers_model(PRESETS[name]).named_parameters():
        kind = next((parts[s.removeprefix("self_")] for s in path.split(".") if s.removeprefix("self_") in parts), None)
        part = kind or ("head" if path.startswith("lm_head") else "norms")
        theirs[part] = theirs.get(part, 0) + p.numel()
    assert {part: count for part, count in vars(found).items() if count} == theirs
    assert found.total == sum(theirs.values()) == total


@pytest.mark.parametrize("config", [*ODD.values(), *PRESETS.values()], ids=[*ODD, *PRESETS])
def test_parameters_are_those_of_our_models(config: ModelConfig) -> None:
    assert count_parameters(config) == sum(p.numel() for p in build_model(config, device="meta").parameters())


@pytest.mark.parametrize("config", [PRESETS["tiny-gpt2"], PRESETS["tiny-llama"], *ODD.values()])
def test_operations_are_those_torch_counts(config: ModelConfig) -> None:
    """torch counts attention's products in full, masked or not: (T + 1) / 2T of it is under the causal mask."""
    B, T = 3, 50
    model = build_model(config)
    model.init_weights(torch.Generator().manual_seed(0))
    ids = torch.zeros(B, T, dtype=torch.int64)
    counted = []
    with sdpa_kernel(SDPBackend.MATH):  # by products that the counter knows
        loss = None
        for work in (lambda: model.loss(ids, ids), lambda: loss.backward()):  # noqa: B023
            with FlopCounterMode(display=False) as counter:
                loss = work()
            counted.append({str(op): n for op, n in counter.get_flop_counts()["Global"].items()})
    flops = flops_per_token(config, T)
    for times, found in zip((1, 2), counted, strict=True):
        square = found.pop("aten.bmm")
        assert square * (T + 1) == 2 * T * times * flops.attention * B * T
        assert sum(found.values()) == times * (flops.forward - flops.attention) * B * T
    assert flops.backward == 2 * flops.forward
    assert flops.total == flops.forward + flops.backward


def test_mfu() -> None:
    assert compute_mfu(989.4e12, 2.0, gpu="h100", dtype="bf16") == pytest.approx(0.5)
    assert compute_mfu(989.4e12, 1.0, gpu=GPUS["h100"], dtype=torch.float32, gpus=2) == pytest.approx(989.4 / 66.9 / 2)
    with pytest.raises(ValueError, match="seconds is 0; expected more than 0"):
        compute_mfu(1.0, 0, gpu="h100", dtype="bf16")
    with pytest.raises(ValueError, match=r"flops is -1\.0; expected 0 or more"):
        compute_mfu(-1.0, 1.0, gpu="h100", dtype="bf16")
    with pytest.raises(ValueError, match="gpus is 0; expected 1 or more"):
        compute_mfu(1.0, 1.0, gpu="h100", dtype="bf16", gpus=0)
    with pytest.raises(ValueError, match="context is 0; expected 1 token or more"):
        flops_per_token(PRESETS["gpt2"], 0)


@pytest.mark.parametrize("N", [1.2e8, 1e9, 7e10])
def test_the_fitted_tokens_minimise_the_loss(N: float) -> None:
    D = fitted_tokens(N)
    sizes = N * np.linspace(0.5, 2, 100_001)  # others, of the same compute
    loss = A / sizes**ALPHA + B / (N * D / sizes) ** BETA
    assert sizes[loss.argmin()] == pytest.approx(N, rel=1e-4)


def test_chinchilla() -> None:
    assert optimal_tokens(70e9) == 1.4e12
    with pytest.raises(ValueError, match="parameters is 0; expected more than 0"):
        optimal_tokens(0)
