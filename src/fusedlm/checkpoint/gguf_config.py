"""What a GGUF file's metadata say of its model, as a config. Strict: what would change the model is never passed over.

Keys: docs/gguf.md of github.com/ggml-org/ggml, and what llama.cpp's converter writes.
"""

import dataclasses
import difflib
import math
import reprlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fusedlm.checkpoint.errors import CheckpointError
from fusedlm.kernels import rotary_frequencies
from fusedlm.models import GPT2Config, LlamaConfig, ModelConfig, RopeScaling

if TYPE_CHECKING:
    from fusedlm.checkpoint.gguf import GGUFFile

_COMMON = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "vocab_size",
    "expert_count",
    "expert_used_count",
    "tensor_data_layout",
)
# The keys known of each architecture, without its name in front.
ARCHITECTURES = {
    "gpt2": (*_COMMON, "attention.layer_norm_epsilon"),
    "llama": (
        *_COMMON,
        "attention.layer_norm_rms_epsilon",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
    ),
}


class _Keys:
    """The metadata of the file's architecture, by key without the architecture's name."""

    def __init__(self, file: "GGUFFile") -> None:
        self.file = file
        self.prefix = f"{file.architecture}."

    def error(self, key: str, given: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: {self.prefix}{key} is {reprlib.repr(given)}; expected {expected}")

    def has(self, key: str) -> bool:
        return self.prefix + key in self.file.metadata

    def get(self, key: str, default: Any) -> Any:
        assert key in ARCHITECTURES[self.file.architecture]
        value = self.file.metadata.get(self.prefix + key, default)
        if value is None:
            raise CheckpointError(f"{self.file.path}: metadata {self.prefix}{key} is missing")
        return value

    def size(self, key: str, default: int | None = None, *, least: int = 1, layers: int = 0) -> int:
        """A whole number; where layers is given also a list of that many equal ones."""
        value = self.get(key, default)
        if isinstance(value, list) and len(value) == layers:
            if len(set(value)) != 1:
                raise self.error(key, value, "the same for all layers")
            value = value[0]
        if type(value) is not int or value < least:
            raise self.error(key, value, f"a whole number, {least} or more")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number. Written as fp32, it is read as the shortest decimal that rounds to it: 1e-5 stays 1e-5."""
        value = self.get(key, default)
        if not isinstance(value, float) or not math.isfinite(value):
            raise self.error(key, value, "a finite floating-point number")
        with np.errstate(over="ignore"):
            single = np.float32(value)
        return float(str(single)) if float(single) == value else value

    def check_known(self) -> None:
        """Refuse keys that we do not know and that could change the model.

        These are all of the architecture's own, and any other that is one character from a known one: a key that is
        damaged would otherwise go over into its default without a word.
        """
        known = [self.prefix + key for key in ARCHITECTURES[self.file.architecture]]
        for key in self.file.metadata.keys() - set(known):
            near = [k for k in known if len(k) == len(key) and sum(a != b for a, b in zip(k, key, strict=True)) == 1]
            if key.startswith(self.prefix) or near:
                near = near or difflib.get_close_matches(key, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
                raise CheckpointError(f"{self.file.path}: unknown metadata {key!r}{hint}")


def config_from_gguf(file: "GGUFFile") -> ModelConfig:
    """The config of the model in a GGUF file, a GPT2Config or a LlamaConfig.

    The head is tied where the file has no output.weight, or one that is the embedding's copy byte for byte (llama.cpp
    wrote GPT-2's so). Llama 3.1's rope scaling is recovered from rope_freqs.weight.
    Raises CheckpointError where a key is missing, unknown or of another type, where sizes contradict the tensors, and
    for what is not supported: a mixture of experts, layers that differ, linear and YaRN rope scaling.
    """
    keys = _Keys(file)
    experts = keys.size("expert_count", 0, least=0)
    if experts:
        raise keys.error("expert_count", experts, "0: a mixture of experts is not supported")
    keys.check_known()
    n_layers = keys.size("block_count")
    layers = {name.split(".")[1] for name in file.names() if name.startswith("blk.")}
    if len(layers) != n_layers:
        raise keys.error("block_count", n_layers, f"{len(layers)}, as many as have tensors")
    width, n_heads = keys.size("embedding_length"), keys.size("attention.head_count", layers=n_layers)
    if width % n_heads and not keys.has("attention.key_length"):
        raise keys.error("attention.head_count", n_heads, f"a divisor of {width}, the embedding_length")
    head_dim = keys.size("attention.key_length", width // n_heads)
    value_dim = keys.size("attention.value_length", head_dim)
    if value_dim != head_dim:
        raise keys.error("attention.value_length", value_dim, f"{head_dim}, as the keys have")
    fields: dict[str, Any] = {
        "vocab_size": keys.size("vocab_size", file.shape("token_embd.weight")[0]),
        "context_length": keys.size("context_length"),
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": keys.size("attention.head_count_kv", n_heads, layers=n_layers),
        "head_dim": head_dim,
        "width": width,
        "mlp_width": keys.size("feed_forward_length", layers=n_layers),
        "tied": "output.weight" not in file.names() or file.same_data("output.weight", "token_embd.weight"),
    }
    is_gpt2 = file.architecture == "gpt2"
    fields["norm_eps"] = keys.number(f"attention.layer_norm_{'' if is_gpt2 else 'rms_'}epsilon")
    if not is_gpt2:
        fields["rope_theta"] = keys.number("rope.freq_base", 10000.0)
    try:
        config = GPT2Config(**fields) if is_gpt2 else LlamaConfig(**fields)
    except ValueError as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    _check_shapes(file, config)
    return _with_rope_scaling(file, keys, config) if isinstance(config, LlamaConfig) else config


def _check_shapes(file: "GGUFFile", config: ModelConfig) -> None:
    """Hold the sizes of the config against tensors that show them, before a model is built of any absurd one."""
    C, D = config.width, config.head_dim
    expected = {"token_embd.weight": (config.vocab_size, C), "blk.0.ffn_up.weight": (config.mlp_width, C)}
    if isinstance(config, LlamaConfig):
        expected["blk.0.attn_q.weight"] = (config.n_heads * D, C)
        expected["blk.0.attn_k.weight"] = (config.n_kv_heads * D, C)
    else:
        expected["blk.0.attn_qkv.weight"] = (config.qkv_width, C)
        expected["position_embd.weight"] = (config.context_length, C)
    for name, shape in expected.items():
        if file.shape(name) != shape:
            raise CheckpointError(f"{file.path}: {name} has shape {file.shape(name)}; the metadata ask for {shape}")


def _with_rope_scaling(file: "GGUFFile", keys: _Keys, config: LlamaConfig) -> LlamaConfig:
    """The config with what metadata and rope_freqs.weight say of its rotary frequencies."""
    D = config.head_dim
    rotated = keys.size("rope.dimension_count", D)
    if rotated != D:
        raise keys.error("rope.dimension_count", rotated, f"{D}, the width of a head")
    kind = keys.get("rope.scaling.type", "linear")  # llama.cpp's default
    if kind not in ("none", "linear", "yarn"):
        raise keys.error("rope.scaling.type", kind, "'none', or 'linear' or 'yarn' by a factor of 1")
    for key in ("rope.scaling.factor", "rope.scale_linear"):
        factor = keys.number(key, 1.0)
        if kind != "none" and factor != 1:
            raise keys.error(key, factor, f"1: rope scaling of type {kind!r} is not supported")
    if "rope_freqs.weight" not in file.names():
        return config
    if file.shape("rope_freqs.weight") != (D // 2,):
        raise CheckpointError(
            f"{file.path}: rope_freqs.weight has shape {file.shape('rope_freqs.weight')}; expected {(D // 2,)}"
        )
    divisors = torch.empty(D // 2, dtype=torch.float64)
    file.read("rope_freqs.weight", divisors)
    if bool((divisors == 1).all()):
        return config
    original = keys.size("rope.scaling.original_context_length", 8192)
    scaling = _find_rope_scaling(divisors, config.rope_theta, original)
    if scaling is None:
        raise CheckpointError(
            f"{file.path}: rope_freqs.weight is not the scaling of Llama 3.1 (a factor of 1 for high frequencies, a "
            f"larger one for low ones, and a blend between); it runs from {divisors[0]:g} to {divisors[-1]:g}"
        )
    return dataclasses.replace(config, rope_scaling=scaling)


def _find_rope_scaling(divisors: Tensor, theta: float, original: int) -> RopeScaling | None:
    """The scaling that divides the rotary frequencies by divisors, (D/2,) float64, to 1e-5 of each; None if none does.

    A frequency that makes t turns over the original context keeps a share k = (t - low) / (high - low), between 0 and
    1, of itself, and the rest is divided by the factor: 1 / divisor = k + (1 - k) / factor. Two divisors between 1 and
    the factor thus give low and high. These scale with the original context, so any length for it does as well.
    """
    plain = rotary_frequencies(2 * len(divisors), theta, None)
    factor = float(divisors.max())
    candidates = [(1.0, 4.0)]  # all published models
    blended = ((divisors > 1) & (divisors < factor)).nonzero().flatten().tolist()
    if len(blended) > 1:
        ends = [blended[0], blended[-1]]
        k0, k1 = ((1 / divisors[ends] - 1 / factor) / (1 - 1 / factor)).tolist()
        t0, t1 = (plain[ends] * original / (2 * math.pi)).tolist()
        span = (t0 - t1) / (k0 - k1) if k0 != k1 else 0.0
        low = t0 - k0 * span
        candidates.append((low, low + span))
    for low, high in candidates:
        try:
            scaling = RopeScaling(
                factor=factor, low_freq_factor=low, high_freq_factor=high, original_context_length=original
            )
        except ValueError:  # no such scaling: not a solution
            continue
        found = plain / rotary_frequencies(2 * len(divisors), theta, scaling)
        if bool(((found / divisors - 1).abs() <= 1e-5).all()):  # NaN is no solution either
            return scaling
    return None
