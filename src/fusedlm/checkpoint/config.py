"""Hugging Face's config.json to our configs and back. An option that changes the result and is not built: an error."""

from collections.abc import Mapping
from typing import Any

import torch

from fusedlm.checkpoint.errors import CheckpointError
from fusedlm.models import GPT2Config, LlamaConfig, ModelConfig, RopeScaling

# GPT-2 with grouped or multi-query attention, or a head width of its own, has no Hugging Face architecture. It is saved
# under this name, so that other readers refuse it and do not misread it.
GROUPED_GPT2 = "fusedlm-gpt2"


class _Keys:
    """A mapping that names the file and the key in every complaint."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where, self.values = where, values

    def fail(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {message}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if value is None and default is not None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.fail(f"{key} is {value!r}; expected a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.fail(f"{key} is {value!r}; expected a number")
        return float(value)

    def expect(self, key: str, default: object, *allowed: object) -> None:
        value = self.values.get(key, default)
        if value not in allowed:
            expected = " or ".join(repr(a) for a in allowed)
            raise self.fail(f"{key} is {value!r}, which is not supported; expected {expected}")

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.fail(f"{key} is {value!r}; expected true or false")
        return value


def config_from_huggingface(values: Mapping[str, Any], *, where: str) -> ModelConfig:
    """Our config for the contents of a config.json. where: how errors name the file.

    Raises CheckpointError for an architecture or an option that is not supported, and for values that make no sense.
    """
    keys = _Keys(where, values)
    kind = values.get("model_type")
    try:
        if kind in ("gpt2", GROUPED_GPT2):
            return _gpt2(keys)
        if kind == "llama":
            return _llama(keys)
    except CheckpointError:
        raise
    except ValueError as error:  # from the config's own checks
        raise keys.fail(str(error)) from error
    raise keys.fail(f"model_type is {kind!r}, an architecture that is not supported; expected 'gpt2' or 'llama'")


def _gpt2(keys: _Keys) -> GPT2Config:
    keys.expect("activation_function", "gelu_new", "gelu_new", "gelu_pytorch_tanh")
    keys.expect("scale_attn_weights", True, True)
    keys.expect("scale_attn_by_inverse_layer_idx", False, False)
    keys.expect("add_cross_attention", False, False)
    width, n_heads = keys.integer("n_embd"), keys.integer("n_head")
    if n_heads < 1 or (width % n_heads and "head_dim" not in keys.values):
        raise keys.fail(f"n_embd {width} is not a multiple of n_head {n_heads}")
    return GPT2Config(
        vocab_size=keys.integer("vocab_size"),
        context_length=keys.integer("n_positions"),
        n_layers=keys.integer("n_layer"),
        n_heads=n_heads,
        n_kv_heads=keys.integer("n_kv_head", n_heads),
        head_dim=keys.integer("head_dim", width // n_heads),
        width=width,
        mlp_width=keys.integer("n_inner", 4 * width),
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        tied=keys.boolean("tie_word_embeddings", True),
        bias=keys.boolean("bias", True),
    )


def _llama(keys: _Keys) -> LlamaConfig:
    keys.expect("hidden_act", "silu", "silu", "swish")
    keys.expect("attention_bias", False, False)
    keys.expect("mlp_bias", False, False)
    width, n_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    if n_heads < 1 or (width % n_heads and keys.values.get("head_dim") is None):
        raise keys.fail(f"hidden_size {width} is not a multiple of num_attention_heads {n_heads}; expected a head_dim")
    theta, scaling = _rope(keys)
    return LlamaConfig(
        vocab_size=keys.integer("vocab_size"),
        context_length=keys.integer("max_position_embeddings"),
        n_layers=keys.integer("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=keys.integer("num_key_value_heads", n_heads),
        head_dim=keys.integer("head_dim", width // n_heads),
        width=width,
        mlp_width=keys.integer("intermediate_size"),
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        tied=keys.boolean("tie_word_embeddings", False),
        rope_theta=theta,
        rope_scaling=scaling,
    )


def _rope(keys: _Keys) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (before)."""
    parameters = keys.values.get("rope_parameters") or keys.values.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise keys.fail(f"the rope parameters are {parameters!r}; expected an object")
    rope = _Keys(keys.where, {"rope_theta": keys.values.get("rope_theta", 10000.0), **parameters})
    theta = rope.number("rope_theta")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise keys.fail(f"rope_type is {kind!r}, which is not supported; expected 'default' or 'llama3'")
    return theta, RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_context_length=rope.integer("original_max_position_embeddings"),
    )


def config_to_huggingface(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The contents of the config.json that `transformers` (4 and 5) reads as the same model.

    Raises TypeError for another architecture.
    """
    values: dict[str, Any] = {
        "torch_dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": config.tied,
        "vocab_size": config.vocab_size,
    }
    if isinstance(config, GPT2Config):
        grouped = config.n_kv_heads != config.n_heads or config.n_heads * config.head_dim != config.width
        if grouped:
            values |= {"model_type": GROUPED_GPT2, "n_kv_head": config.n_kv_heads, "head_dim": config.head_dim}
        else:
            values |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
        values |= {
            "activation_function": "gelu_new",
            "n_positions": config.context_length,
            "n_embd": config.width,
            "n_layer": config.n_layers,
            "n_head": config.n_heads,
            "n_inner": config.mlp_width,
            "layer_norm_epsilon": config.norm_eps,
        }
        if not config.bias:
            values["bias"] = False
    elif isinstance(config, LlamaConfig):
        values |= {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
            "max_position_embeddings": config.context_length,
            "hidden_size": config.width,
            "num_hidden_layers": config.n_layers,
            "num_attention_heads": config.n_heads,
            "num_key_value_heads": config.n_kv_heads,
            "head_dim": config.head_dim,
            "intermediate_size": config.mlp_width,
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta,
            "attention_bias": False,
            "mlp_bias": False,
        }
        if config.rope_scaling is not None:
            values["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": config.rope_scaling.factor,
                "low_freq_factor": config.rope_scaling.low_freq_factor,
                "high_freq_factor": config.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": config.rope_scaling.original_context_length,
            }
    else:
        raise TypeError(f"no Hugging Face config for a {type(config).__name__}")
    return values
