import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import (
    gpt2,
    gpt2_metadata,
    gpt2_tensors,
    llama,
    llama_metadata,
    llama_tensors,
    published_rope_factors,
    write_gguf,
)

from fusedlm.checkpoint.errors import CheckpointError
from fusedlm.checkpoint.gguf import GGUFFile, config_from_gguf
from fusedlm.kernels import rotary_frequencies
from fusedlm.models import PRESETS, GPT2Config, LlamaConfig, ModelConfig

LLAMA = LlamaConfig(
    vocab_size=101,
    context_length=128,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=32,
    width=64,
    mlp_width=96,
    norm_eps=1e-5,
    tied=True,
    rope_theta=10000.0,
)
GPT2 = GPT2Config(
    vocab_size=101,
    context_length=128,
    n_layers=2,
    n_heads=4,
    n_kv_heads=4,
    head_dim=16,
    width=64,
    mlp_width=256,
    norm_eps=1e-5,
    tied=True,
)
REMOVED = object()


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., ModelConfig]:
    """The config of a small model's file, its metadata (keys without the architecture's name) and tensors changed."""

    def build(architecture: str = "llama", tensors: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
        model: Any = {"llama": llama, "gpt2": gpt2}[architecture]()
        metadata = (llama_metadata if architecture == "llama" else gpt2_metadata)(model.config)
        found = (llama_tensors if architecture == "llama" else gpt2_tensors)(model)
        changed = metadata | {f"{architecture}.{key}": value for key, value in changes.items()}
        metadata = {key: value for key, value in changed.items() if value is not REMOVED}
        found = {name: t for name, t in (found | (tensors or {})).items() if t is not REMOVED}
        return config_from_gguf(GGUFFile(write_gguf(tmp_path / "m.gguf", architecture, metadata, found)))

    return build


def test_sizes(read: Callable[..., ModelConfig]) -> None:
    assert read() == LLAMA
    assert read("gpt2") == GPT2


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"vocab_size": REMOVED}),
        ("llama", {"rope.dimension_count": REMOVED, "rope.freq_base": REMOVED}),
        ("llama", {"attention.value_length": REMOVED}),
        ("llama", {"attention.head_count": [4, 4], "attention.head_count_kv": [2, 2], "feed_forward_length": [96, 96]}),
        ("llama", {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}),
        ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}),
        ("llama", {"rope.scaling.type": "yarn", "rope.scaling.factor": 1.0, "rope.scaling.finetuned": True}),
        ("llama", {"expert_count": 0, "expert_used_count": 0, "tensor_data_layout": "Meta AI original pth"}),
        ("gpt2", {"vocab_size": 101, "attention.head_count_kv": 4}),
        ("gpt2", {"attention.key_length": 16, "attention.value_length": 16}),
    ],
)
def test_keys_that_may_be_there_or_not(
    read: Callable[..., ModelConfig], architecture: str, changes: dict[str, Any]
) -> None:
    assert read(architecture, **changes) == (LLAMA if architecture == "llama" else GPT2)


def test_heads_follow_from_the_width(tmp_path: Path) -> None:
    model = llama(head_dim=16, num_key_value_heads=4)
    metadata = llama_metadata(model.config)
    for key in ("attention.key_length", "attention.value_length", "attention.head_count_kv"):
        del metadata[f"llama.{key}"]
    config = config_from_gguf(GGUFFile(write_gguf(tmp_path / "m.gguf", "llama", metadata, llama_tensors(model))))
    assert (config.n_heads, config.n_kv_heads, config.head_dim) == (4, 4, 16)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("llama", {"context_length": REMOVED}, "llama.context_length is missing"),
        ("llama", {"embedding_length": REMOVED}, "llama.embedding_length is missing"),
        ("llama", {"block_count": REMOVED}, "llama.block_count is missing"),
        ("llama", {"feed_forward_length": REMOVED}, "llama.feed_forward_length is missing"),
        ("llama", {"attention.head_count": REMOVED}, "llama.attention.head_count is missing"),
        ("llama", {"attention.layer_norm_rms_epsilon": REMOVED}, "layer_norm_rms_epsilon is missing"),
        ("gpt2", {"attention.layer_norm_epsilon": REMOVED}, "gpt2.attention.layer_norm_epsilon is missing"),
        ("llama", {"context_length": "128"}, "llama.context_length is '128'; expected a whole number, 1 or more"),
        ("llama", {"context_length": 128.0}, "expected a whole number"),
        ("llama", {"context_length": True}, "expected a whole number"),
        ("llama", {"context_length": 0}, "expected a whole number, 1 or more"),
        ("llama", {"context_length": [128, 128]}, "expected a whole number"),
        ("llama", {"rope.freq_base": 10000}, "expected a finite floating-point number"),
        ("llama", {"rope.freq_base": math.nan}, "expected a finite floating-point number"),
        ("llama", {"rope.freq_base": -1.0}, "rope_theta is -1.0"),
        ("llama", {"attention.layer_norm_rms_epsilon": 0.0}, "norm_eps is 0.0"),
        ("llama", {"attention.head_count": [4, 2]}, r"head_count is \[4, 2\]; expected the same for all layers"),
        ("llama", {"attention.head_count": [4, 4, 4]}, "expected a whole number"),
        ("llama", {"attention.head_count_kv": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
        (
            "llama",
            {"attention.head_count": 8},
            r"attn_q.weight has shape \(128, 64\); the metadata ask for \(256, 64\)",
        ),
        ("llama", {"attention.head_count_kv": 4}, r"attn_k.weight has shape \(64, 64\); the metadata ask for"),
        ("llama", {"attention.key_length": REMOVED, "attention.head_count": 3}, "expected a divisor of 64"),
        ("llama", {"attention.value_length": 16}, "value_length is 16; expected 32"),
        ("llama", {"rope.dimension_count": 16}, "rope.dimension_count is 16; expected 32, the width of a head"),
        ("llama", {"block_count": 3}, "block_count is 3; expected 2, as many as have tensors"),
        ("llama", {"block_count": 2**31}, "expected 2, as many as have tensors"),
        ("llama", {"vocab_size": 2**31}, "token_embd.weight has shape"),
        ("llama", {"feed_forward_length": 2**31}, "ffn_up.weight has shape"),
        ("gpt2", {"context_length": 64}, "position_embd.weight has shape"),
        ("gpt2", {"attention.head_count": 3}, "expected a divisor of 64"),
        ("gpt2", {"attention.head_count_kv": 2}, "attn_qkv.weight has shape"),
        (
            "llama",
            {"expert_count": 8, "expert_feed_forward_length": 96},
            "expert_count is 8; expected 0: a mixture of experts is not supported",
        ),
        ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, "factor is 2.0; expected 1"),
        ("llama", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "factor is 4.0; expected 1"),
        ("llama", {"rope.scaling.factor": 4.0}, "factor is 4.0; expected 1"),
        ("llama", {"rope.scale_linear": 4.0}, "scale_linear is 4.0; expected 1"),
        ("llama", {"rope.scaling.type": "longrope"}, "rope.scaling.type is 'longrope'; expected 'none'"),
        (
            "llama",
            {"rope.freq_bass": 5e5},
            "unknown metadata 'llama.rope.freq_bass'; did you mean 'llama.rope.freq_base'",
        ),
        ("llama", {"logit_scale": 2.0}, "unknown metadata 'llama.logit_scale'"),
        ("gpt2", {"rope.freq_base": 5e5}, "unknown metadata 'gpt2.rope.freq_base'"),
    ],
)
def test_refused(read: Callable[..., ModelConfig], architecture: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(architecture, **changes)


def test_a_damaged_key_does_not_become_its_default(tmp_path: Path) -> None:
    model = llama()
    metadata = llama_metadata(model.config) | {"llamb.rope.freq_base": 5e5}
    del metadata["llama.rope.freq_base"]
    file = GGUFFile(write_gguf(tmp_path / "m.gguf", "llama", metadata, llama_tensors(model)))
    with pytest.raises(CheckpointError, match=r"unknown metadata 'llamb.rope.freq_base'; did you mean 'llama.rope"):
        config_from_gguf(file)


def test_missing_embedding(read: Callable[..., ModelConfig]) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor token_embd.weight"):
        read(tensors={"token_embd.weight": REMOVED}, vocab_size=REMOVED)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_tied_where_the_head_is_the_embedding(read: Callable[..., ModelConfig], architecture: str) -> None:
    embedding = {"gpt2": gpt2, "llama": llama}[architecture]().get_input_embeddings().weight.detach().numpy()
    other = embedding.copy()
    other[-1, -1] += 1
    assert read(architecture).tied
    assert read(architecture, tensors={"output.weight": (embedding, "F32")}).tied
    assert not read(architecture, tensors={"output.weight": (other, "F32")}).tied
    assert not read(architecture, tensors={"output.weight": (embedding, "F16")}).tied
    blocks = embedding.astype(np.float16).view(np.uint8)
    as_other_types = {"token_embd.weight": (blocks, "F16"), "output.weight": (blocks, "BF16")}
    assert not read(architecture, tensors=as_other_types).tied


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.2-1b", "llama-3.2-3b"])
def test_published_rope_scalings_are_recovered_exactly(read: Callable[..., ModelConfig], name: str) -> None:
    preset = PRESETS[name]
    assert isinstance(preset, LlamaConfig)
    rope = {"factor": preset.rope_scaling.factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    D = preset.head_dim
    factors = published_rope_factors(preset.rope_theta, D, rope, 8192)
    config = rope_config(read, preset.rope_theta, factors)
    assert config.rope_scaling == preset.rope_scaling


def rope_config(read: Callable[..., ModelConfig], theta: float, factors: np.ndarray, **changes: Any) -> LlamaConfig:
    """A model of 4 and 2 heads of any width and with these factors."""
    D = 2 * len(factors)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in (("q", (4 * D, 64)), ("k", (2 * D, 64)))}
    tensors = {f"blk.{i}.attn_{x}.weight": (zeros[x], "F32") for i in range(2) for x in "qk"}
    lengths = {"attention.key_length": D, "attention.value_length": D, "rope.dimension_count": D}
    config = read(
        tensors=tensors | {"rope_freqs.weight": (factors, "F32")}, **{"rope.freq_base": theta} | lengths | changes
    )
    assert isinstance(config, LlamaConfig)
    return config


@pytest.mark.parametrize(
    ("theta", "D", "factor", "low", "high", "original"),
    [
        (10000.0, 64, 16.0, 2.5, 7.0, 2048),
        (1e6, 128, 64.0, 1.0, 32.0, 4096),
        (1e6, 256, 100.0, 1.2, 3.3, 8192),
        (500000.0, 16, 8.0, 1.0, 4.0, 8192),  # one frequency is blended: 1 and 4 are taken
        (500000.0, 8, 8.0, 1.0, 4.0, 8192),  # none is
    ],
)
@pytest.mark.parametrize("tell_original", [True, False])
def test_any_rope_scaling_is_recovered(
    read: Callable[..., ModelConfig],
    theta: float,
    D: int,
    factor: float,
    low: float,
    high: float,
    original: int,
    tell_original: bool,
) -> None:
    rope = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    factors = published_rope_factors(theta, D, rope, original)
    assert len(set(factors)) > 1
    told = {"rope.scaling.original_context_length": original} if tell_original else {}
    found = rope_config(read, theta, factors, **told).rope_scaling
    assert found is not None
    assert found.original_context_length == (original if tell_original else 8192)
    if tell_original:
        assert (found.factor, found.low_freq_factor, found.high_freq_factor) == pytest.approx((factor, low, high), 1e-5)
    expected = rotary_frequencies(D, theta, None) / torch.from_numpy(factors).double()
    torch.testing.assert_close(rotary_frequencies(D, theta, found), expected, rtol=1e-5, atol=0)


def test_no_rope_scaling(read: Callable[..., ModelConfig]) -> None:
    assert rope_config(read, 10000.0, np.ones(16, np.float32)) == LLAMA


def published() -> np.ndarray:
    return published_rope_factors(5e5, 64, {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 8192)


def changed(index: int, value: float) -> np.ndarray:
    factors = published()
    factors[index] = value
    return factors


@pytest.mark.parametrize(
    "factors",
    [
        published()[::-1].copy(),
        np.full(32, 2.0, np.float32),
        changed(0, math.nan),
        changed(0, math.inf),
        changed(0, 0.0),
        changed(0, -1.0),
        changed(20, float(published()[20]) * 1.001),
        np.linspace(1, 8, 32, dtype=np.float32),
    ],
)
def test_other_rope_tables_are_refused(read: Callable[..., ModelConfig], factors: np.ndarray) -> None:
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight is not the scaling of Llama 3.1"):
        rope_config(read, 5e5, factors)


def test_rope_table_of_another_length(read: Callable[..., ModelConfig]) -> None:
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight has shape \(32,\); expected \(16,\)"):
        read(tensors={"rope_freqs.weight": (published(), "F32")})
