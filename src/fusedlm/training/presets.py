"""Runs by name: what differs from the defaults. A name of `fusedlm.models.PRESETS` trains that model."""

import copy
import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fusedlm.models import PRESETS as MODELS
from fusedlm.models import GPT2Config

DEFAULT = "python-char"

# Gentle, every row once an epoch.
_FINETUNE: Mapping[str, Any] = MappingProxyType(
    {
        "data": {"order": "shuffled"},
        "training": {
            "steps": 500,
            "batch_size": 16,
            "lr": 2e-5,
            "min_lr": 0.0,
            "warmup": 20,
            "schedule": "linear",
            "weight_decay": 0.0,
        },
        "evaluation": {"interval": 100},
        "checkpoints": {"interval": 100},
    }
)

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # A minute or so on two cores. nanoGPT's sizes for a CPU; with GPT-2's architecture the loss is 0.35 higher.
        "python-char": {
            "data": {"sources": ["python"], "tokenizer": "characters"},
            "model": {"architecture": "llama", "n_layers": 4, "n_heads": 4, "width": 128, "context_length": 128},
            "training": {
                "steps": 600,
                "batch_size": 16,
                "lr": 3e-3,
                "warmup": 50,
                "betas": (0.9, 0.99),
            },
            "evaluation": {"interval": 200, "batches": 20, "sample_tokens": 150, "prompt": "def "},
            "checkpoints": {"interval": 200},
        },
        # nanoGPT's config/train_shakespeare_char.py, evaluated on all of the split and not on random parts of it.
        "shakespeare-char": {
            "data": {"sources": ["tinyshakespeare"], "tokenizer": "characters"},
            "model": {"n_layers": 6, "n_heads": 6, "width": 384, "context_length": 256, "bias": False},
            "training": {
                "steps": 5000,
                "batch_size": 64,
                "lr": 1e-3,
                "warmup": 100,
                "betas": (0.9, 0.99),
                "dropout": 0.2,
            },
            "evaluation": {"interval": 250, "sample_tokens": 300},
            "checkpoints": {"interval": 1000},
        },
        # Where --init names a model and nothing else is said, and where --lora does too: additions begin at zero, and
        # take ten times the learning rate.
        "finetune": _FINETUNE,
        "finetune-lora": {**_FINETUNE, "training": {**_FINETUNE["training"], "lr": 2e-4}, "lora": {"rank": 8}},
    }
)

# nanoGPT's settings for GPT-2 124M: 480 rows of 1,024 tokens a step.
_LARGE: Mapping[str, Any] = MappingProxyType(
    {
        "data": {"sources": ["openwebtext"]},
        "training": {
            "steps": 600_000,
            "batch_size": 480,
            "lr": 6e-4,
            "warmup": 2000,
        },
        "evaluation": {"interval": 2000, "batches": 200},
        "checkpoints": {"interval": 2000},
    }
)


def preset(name: str) -> dict[str, Any]:
    """The settings of a run by its name, as nested tables. Raises ValueError for a name there is not."""
    if name in PRESETS:
        return _plain(PRESETS[name])
    if name in MODELS:
        values = _plain(_LARGE)
        gpt2 = isinstance(MODELS[name], GPT2Config)
        # Rows of the embedding beyond the tokenizer's make every product's sizes multiples of 64.
        values["model"] = {"preset": name, "vocab_multiple": 64} if gpt2 else {"preset": name}
        if not gpt2:
            values["data"]["tokenizer"] = name
            values["training"] |= {"context": 4096, "batch_size": 128}
        return values
    known = [*PRESETS, *MODELS]
    near = difflib.get_close_matches(name, known, n=2)
    expected = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(known)}"
    raise ValueError(f"unknown preset {name!r}; {expected}")


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy that can be changed."""
    return {k: _plain(v) if isinstance(v, Mapping) else copy.copy(v) for k, v in values.items()}
