"""Floating-point operations of matrix products: what a model asks for, and which share of a GPU's peak that is.

A multiplication and an addition are two operations. Norms, activations and sums are left out: they are bound by memory.
"""

from dataclasses import dataclass, fields

import torch

from fusedlm.hardware import GPU, find_gpu
from fusedlm.models import ModelConfig
from fusedlm.planner.parameters import Layer


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations of a forward pass, by product, all layers together. attention: scores, and weights times values."""

    qkv: float
    attention: float
    out: float
    mlp: float
    head: float

    @property
    def forward(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def backward(self) -> float:
        """Each product y = x w has two in the backward pass: dx = dy w^T and dw = x^T dy."""
        return 2 * self.forward

    @property
    def total(self) -> float:
        """Of a training step: the model's own operations. What is recomputed does not count, so that a share of the
        peak made of it (MFU, Chowdhery et al. 2022) says how fast the model trains and not how busy the GPU is."""
        return 3 * self.forward


def flops_per_token(config: ModelConfig, context: int) -> Flops:
    """Operations a token, the mean over a sequence of `context` tokens.

    Attention is causal and counted so: token t sees t + 1 keys, (context + 1) / 2 in the mean. An embedding is a row
    that is looked up: no operation. The head is a product, tied or not.
    """
    if context < 1:
        raise ValueError(f"context is {context}; expected 1 token or more")
    L, layer = config.n_layers, Layer.of(config)
    qkv, out, up, down = (2 * L * N * K for N, K in (layer.qkv, layer.out, layer.up, layer.down))
    return Flops(
        qkv=qkv,
        attention=L * 4 * config.n_heads * config.head_dim * (context + 1) / 2,
        out=out,
        mlp=up + down,
        head=2 * config.vocab_size * config.width,
    )


def compute_mfu(flops: float, seconds: float, *, gpu: str | GPU, dtype: str | torch.dtype, gpus: int = 1) -> float:
    """The share of the peak that `flops` operations in `seconds` are, on `gpus` GPUs together; 1 is all of it.

    For a training step flops is `flops_per_token(config, context).total * tokens`: then this is the model FLOPs
    utilisation. gpu: a name of `fusedlm.hardware.GPUS`, or what `detect` found. dtype: of the products.
    Raises ValueError for an unknown GPU, a dtype that it does not have, negative flops, times that are not positive.
    """
    if flops < 0:
        raise ValueError(f"flops is {flops}; expected 0 or more")
    if not seconds > 0:
        raise ValueError(f"seconds is {seconds}; expected more than 0")
    if gpus < 1:
        raise ValueError(f"gpus is {gpus}; expected 1 or more")
    return flops / seconds / (find_gpu(gpu).peak(dtype) * gpus)
