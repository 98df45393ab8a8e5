"""Llama's training step by transformers with Liger's kernels: parameters and AdamW's states in bf16."""

from typing import Any

import torch
from torch import Tensor

from fusedlm.models import LlamaConfig


class LigerLlamaStep:
    """A step of transformers' Llama with Liger's norms, rotary positions, SwiGLU and fused loss, and torch's AdamW.

    Needs a GPU, transformers and liger-kernel.
    """

    def __init__(self, config: LlamaConfig, device: torch.device, *, lr: float = 3e-4) -> None:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
        from transformers import LlamaConfig as TheirConfig
        from transformers import LlamaForCausalLM

        apply_liger_kernel_to_llama(rope=True, rms_norm=True, swiglu=True, fused_linear_cross_entropy=True)
        theirs = TheirConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.context_length,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tied,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            use_cache=False,
            attn_implementation="sdpa",
        )
        with torch.device(device):
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.bfloat16)
            try:
                self.model: Any = LlamaForCausalLM(theirs)
            finally:
                torch.set_default_dtype(before)
        self.model.train()
        options: dict[str, Any] = {"lr": lr, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **options)

    def __call__(self, ids: Tensor, targets: Tensor) -> Tensor:
        """One step of one batch, (B, T). Returns its loss, on the device."""
        # shift_labels are targets as we have them: of each token the one behind it.
        loss = self.model(input_ids=ids, labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()
