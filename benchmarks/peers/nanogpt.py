"""GPT-2's training step as nanoGPT does it: fp32 parameters, bf16 products by autocast, torch.compile, fused AdamW.

Written anew after its README and settings, in torch's own modules; the sizes of its model are those it is given.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedlm.models import ModelConfig


class _Block(nn.Module):
    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        C = config.width
        self.heads, self.dropout = config.n_heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
        self.qkv, self.out = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.up, self.down = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(C, dim=2))
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        x = x + self.drop(self.out(y.transpose(1, 2).reshape(B, T, C)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


class NanoGPT(nn.Module):
    """GPT-2 without biases, its head tied to the embedding."""

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.context_length, config.width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(config, dropout) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                into_residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layers) if into_residual else 0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """ids, targets: (B, T). Returns the logits, (B, T, V), and the mean cross-entropy."""
        x = self.drop(self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device)))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


class NanoGPTStep:
    """A step: autocast to bf16 on a GPU, gradients clipped at 1, fused AdamW, decay on matrices alone."""

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        *,
        dropout: float = 0.0,
        lr: float = 6e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        compiled: bool = True,
    ) -> None:
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True  # as nanoGPT does
        self.model = NanoGPT(config, dropout).to(device)
        self.compiled: Any = torch.compile(self.model) if compiled else self.model
        self.autocast = lambda: torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.logits: Tensor | None = None
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=device.type == "cuda")

    def __call__(self, ids: Tensor, targets: Tensor) -> Tensor:
        """One step of one batch, (B, T). Returns its loss, on the device."""
        with self.autocast():
            # As its training loop does, whose variable holds the logits until the next step has computed its own.
            self.logits, loss = self.compiled(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @torch.no_grad()
    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Without training: the mean loss of a batch, eager, so that its shape compiles nothing."""
        self.model.eval()
        with self.autocast():
            _, loss = self.model(ids, targets)
        self.model.train()
        return loss
