"""LoRA (Hu et al. 2021): y = x W^T + (alpha / r) (x A^T) B^T, of which A, (r, K), and B, (N, r), alone are trained."""

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fusedlm.checkpoint.huggingface import sha256_of
from fusedlm.kernels import linear
from fusedlm.models import DecoderModel
from fusedlm.models.layers import Linear
from fusedlm.training.config import LoRAConfig


class LoRALinear(nn.Module):
    """A linear layer that stays as it is, and a low-rank addition. B is zero at first, so nothing changes."""

    def __init__(self, base: Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        N, K = base.weight.shape
        self.base = base
        self.scale = alpha / rank
        a = torch.randn(rank, K, generator=generator) / math.sqrt(K)
        self.a = nn.Parameter(a.to(base.weight.device, base.weight.dtype))
        self.b = nn.Parameter(torch.zeros(N, rank, device=base.weight.device, dtype=base.weight.dtype))

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self._added(self.base(x), x)

    def without_bias(self, x: Tensor) -> Tensor:
        return self._added(self.base.without_bias(x), x)

    def _added(self, y: Tensor, x: Tensor) -> Tensor:
        return torch.add(y, linear(linear(x, self.a), self.b), alpha=self.scale)


def add_lora(model: DecoderModel, lora: LoRAConfig, seed: int) -> None:
    """Freeze a model and put additions beside the matrices that are named, in place.

    Raises ValueError for a name that no block has.
    """
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    matrices = [name for name, module in model.blocks[0].named_modules() if isinstance(module, Linear)]
    for target in lora.targets:
        if target not in matrices:
            raise ValueError(f"lora.targets has {target!r}; expected some of {', '.join(matrices)}")
        parent, _, leaf = target.rpartition(".")
        for block in model.blocks:
            owner = block.get_submodule(parent)
            setattr(owner, leaf, LoRALinear(getattr(owner, leaf), lora.rank, lora.alpha, generator))


@torch.no_grad()
def merged(parameters: Mapping[str, Tensor], lora: LoRAConfig) -> dict[str, Tensor]:
    """Parameters by the names they have without LoRA, the additions added in fp32; without any, the same ones."""
    found = {}
    for name, value in parameters.items():
        owner, _, leaf = name.rpartition(".")
        if f"{owner}.a" in parameters or owner.endswith(".base"):
            if leaf in ("a", "b"):
                continue
            owner = owner.removesuffix(".base")
            if leaf == "weight":
                a, b = (parameters[f"{owner}.{part}"].float() for part in ("a", "b"))
                value = (value.float() + lora.alpha / lora.rank * (b @ a)).to(value.dtype)
            name = f"{owner}.{leaf}"
        found[name] = value
    return found


def frozen_fingerprint(model: nn.Module) -> str | None:
    """Hexadecimal SHA-256 of all parameters that are not trained; None where all are. A run keeps it and not them."""
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    if not frozen:
        return None
    return hashlib.sha256("".join(f"{name} {sha256_of(p)}" for name, p in frozen).encode()).hexdigest()
