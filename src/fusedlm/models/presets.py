"""The sizes people know by name."""

from fusedlm.kernels import RopeScaling
from fusedlm.models.config import GPT2Config, LlamaConfig, ModelConfig


def _gpt2(
    n_layers: int, n_heads: int, width: int, *, vocab_size: int = 50257, context_length: int = 1024
) -> GPT2Config:
    return GPT2Config(
        vocab_size=vocab_size,
        context_length=context_length,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=width // n_heads,
        width=width,
        mlp_width=4 * width,
        norm_eps=1e-5,
        tied=True,
    )


def _llama(
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    width: int,
    mlp_width: int,
    *,
    vocab_size: int,
    context_length: int,
    rope_theta: float,
    head_dim: int | None = None,
    rope_scaling: RopeScaling | None = None,
    tied: bool = True,
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        context_length=context_length,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim or width // n_heads,
        width=width,
        mlp_width=mlp_width,
        norm_eps=1e-5,
        tied=tied,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
    )


def _smollm2(
    n_layers: int, n_heads: int, n_kv_heads: int, width: int, mlp_width: int, rope_theta: float
) -> LlamaConfig:
    return _llama(
        n_layers,
        n_heads,
        n_kv_heads,
        width,
        mlp_width,
        vocab_size=49152,
        context_length=8192,
        rope_theta=rope_theta,
    )


def _llama3(n_layers: int, n_heads: int, width: int, mlp_width: int, *, factor: float, tied: bool) -> LlamaConfig:
    scaling = RopeScaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=8192)
    return _llama(
        n_layers,
        n_heads,
        8,
        width,
        mlp_width,
        vocab_size=128256,
        context_length=131072,
        rope_theta=500000.0,
        rope_scaling=scaling,
        tied=tied,
    )


_BASE: dict[str, ModelConfig] = {
    "smollm2-135m": _smollm2(30, 9, 3, 576, 1536, 100000.0),
    "smollm2-360m": _smollm2(32, 15, 5, 960, 2560, 100000.0),
    "smollm2-1.7b": _smollm2(24, 32, 32, 2048, 8192, 130000.0),
    "llama-3.2-1b": _llama3(16, 32, 2048, 8192, factor=32.0, tied=True),
    "llama-3.2-3b": _llama3(28, 24, 3072, 8192, factor=32.0, tied=True),
    "llama-3.1-8b": _llama3(32, 32, 4096, 14336, factor=8.0, tied=False),
}

PRESETS: dict[str, ModelConfig] = {
    "gpt2": _gpt2(12, 12, 768),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "gpt2-large": _gpt2(36, 20, 1280),
    "gpt2-xl": _gpt2(48, 25, 1600),
    **{f"{name}{suffix}": config for name, config in _BASE.items() for suffix in ("", "-instruct")},
    "tiny-gpt2": _gpt2(2, 4, 64, vocab_size=512, context_length=128),
    "tiny-llama": _llama(2, 4, 2, 64, 160, vocab_size=512, context_length=128, rope_theta=10000.0),
}
