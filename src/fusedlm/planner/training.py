"""How a model is trained, as far as memory depends on it, and what its memory is made of."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fusedlm.hardware import DTYPES
from fusedlm.models import ModelConfig
from fusedlm.planner.parameters import Layer, parameters

Recompute = Literal["none", "cheap", "blocks"]
PARTS = ("weights", "gradients", "masters", "optimizer", "activations", "logits", "workspace")
ACTIVATIONS = ("residual", "attention", "mlp")
_WIDTH = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 2}  # bytes of a weight and of an activation


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is trained, as far as memory depends on it.

    batch: sequences that a GPU takes at once. context: tokens of each. dtype: fp32 and tf32 keep everything in fp32;
    bf16 and fp16 keep weights, gradients and activations in two bytes; fp8 is bf16 whose blocks' products have fp8
    inputs, kept so for the backward pass, and fp8 copies of their weights (an estimate: nothing here trains so).
    masters: the optimizer updates fp32 masters of weights of two bytes. Beside weights of fp16 they are whole; beside
    those of bf16 there are the two bytes that these lack. grad_dtype: "same" as the weights', or "fp32", which those of
    fp16 always are, for their scale is divided out. state_dtype: of AdamW's two moments, "fp32" or "bf16". dropout:
    whether there is any. recompute: what is computed anew in the backward pass and not kept: "none"; "cheap": outputs
    of norms, GELU and SwiGLU; "blocks": everything but the inputs of each block. accumulate: gradients of one batch
    stay while the next is computed. gpus: weights, gradients, masters and moments are divided among so many (FSDP).
    reshard: they let go of a block's weights between its forward and backward pass (`parallel.reshard_after_forward`).
    direct: they write to each other's memory (`parallel.direct`), which takes buffers that stay.
    Raises ValueError for what cannot be.
    """

    batch: int
    context: int
    dtype: str = "bf16"
    masters: bool = True
    grad_dtype: str = "same"
    state_dtype: str = "fp32"
    dropout: bool = False
    recompute: Recompute = "none"
    accumulate: bool = False
    gpus: int = 1
    reshard: bool = True
    direct: bool = True

    def __post_init__(self) -> None:
        for name in ("batch", "context", "gpus"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a whole number, 1 or more")
        choices = {
            "dtype": DTYPES,
            "grad_dtype": ("same", "fp32"),
            "state_dtype": ("fp32", "bf16"),
            "recompute": ("none", "cheap", "blocks"),
        }
        for name, expected in choices.items():
            if getattr(self, name) not in expected:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(expected)}")

    @property
    def width(self) -> int:
        """Bytes of a weight and an activation."""
        return _WIDTH[self.dtype]

    @property
    def gradient_width(self) -> int:
        """Bytes of a gradient that is kept."""
        return 4 if self.grad_dtype == "fp32" or self.dtype == "fp16" else self.width

    @property
    def master_width(self) -> int:
        """Bytes of a master that are kept beside its weight."""
        return (4 if self.dtype == "fp16" else 2) if self.masters and self.width == 2 else 0

    @property
    def tokens(self) -> int:
        """Tokens that a GPU takes at once."""
        return self.batch * self.context


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the moment of a step that needs most of them, as torch's allocator counts them.

    parts: by part, see PARTS; their sum is total. activations: by kind, see ACTIVATIONS: what the forward pass keeps,
    and the backward pass's gradients of it; residual is the residual stream and its norms. most: of each part, the most
    that it ever is, maybe at another moment. moment: which it is. What CUDA itself takes (its context and code) and
    gaps between blocks are not in here.
    """

    parts: Mapping[str, int]
    activations: Mapping[str, int]
    most: Mapping[str, int]
    moment: str

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def fixed_bytes(config: ModelConfig, training: Training) -> dict[str, int]:
    """What stays from step to step, on one GPU: weights, masters, moments."""
    n, layer = parameters(config).total, Layer.of(config)
    states = {"fp32": 4, "bf16": 2}[training.state_dtype]
    copies = 0
    if training.dtype == "fp8":
        copies = config.n_layers * sum(N * K for N, K in (layer.qkv, layer.out, layer.up, layer.down))
    found = {
        "weights": n * training.width + copies,
        "masters": n * training.master_width,
        "optimizer": 2 * n * states,
    }
    return {part: -(-size // training.gpus) for part, size in found.items()}
