"""The models, written once: what they compute, and nothing of caches, trainers or devices."""

import torch

from fusedlm.kernels import RopeScaling
from fusedlm.models.config import GPT2Config, LlamaConfig, ModelConfig
from fusedlm.models.decoder import DecoderModel
from fusedlm.models.gpt2 import GPT2
from fusedlm.models.layers import Cache
from fusedlm.models.llama import Llama
from fusedlm.models.presets import PRESETS

__all__ = [
    "GPT2",
    "PRESETS",
    "Cache",
    "DecoderModel",
    "GPT2Config",
    "Llama",
    "LlamaConfig",
    "ModelConfig",
    "RopeScaling",
    "build_model",
]


def build_model(
    config: ModelConfig,
    *,
    dropout: float = 0.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> DecoderModel:
    """The model of a config, its parameters still to be filled (on "meta": with none, for counting and for loading).

    dropout: while it trains, see `DecoderModel`.

    Raises TypeError for a config of no known architecture.
    """
    with torch.device(device or "cpu"):
        if isinstance(config, GPT2Config):
            model: DecoderModel = GPT2(config, dropout)
        elif isinstance(config, LlamaConfig):
            model = Llama(config, dropout)
        else:
            raise TypeError(f"no model for a {type(config).__name__}; expected GPT2Config or LlamaConfig")
    return model if dtype is None else model.to(dtype)
