"""Put fusedlm's kernels into a Llama or GPT-2 of transformers: the same parameters, the same logits, less time.

    python examples/kernels_in_transformers.py             # compares logits; on a GPU it also measures
    python examples/kernels_in_transformers.py --json results.json

`use_kernels(model)` gives modules of one model other classes with another forward. Nothing else in the process changes,
parameters keep their names, and checkpoints save and load as before. `language_modeling_loss` then takes the place of
`model(ids, labels=labels).loss` and never holds all logits.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from fusedlm.kernels import (
    GELU,
    Dropout,
    Embedding,
    LayerNorm,
    add_rms_norm,
    linear_cross_entropy,
    rms_norm,
    rope,
    swiglu,
)


class FusedRMSNorm(LlamaRMSNorm):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return rms_norm(x, self.weight, self.variance_epsilon)
        return add_rms_norm(x, residual, self.weight, self.variance_epsilon)


class FusedLlamaMLP(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class HalfTables(LlamaRotaryEmbedding):
    """Cosines and sines as `rope` takes them: one half, (B, 1, T, D/2), in fp32."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = super().forward(x.float(), position_ids)  # (B, T, D) each
        half = cos.shape[-1] // 2
        return cos[:, None, :, :half], sin[:, None, :, :half]


class FusedLlamaAttention(LlamaAttention):
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,  # the cache's name before transformers 5.20
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        assert position_embeddings is not None
        cache = past_key_values if cache is None else cache
        B, T, _ = hidden_states.shape
        q, k, v = (
            project(hidden_states).view(B, T, -1, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, H or G, T, D)
        q, k = rope(q, *position_embeddings), rope(k, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        dropout = self.attention_dropout if self.training else 0.0
        y, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(y.reshape(B, T, -1)), weights


class FusedLlamaLayer(LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x, _ = self.self_attn(self.input_layernorm(hidden_states), *args, **kwargs)
        x, residual = self.post_attention_layernorm(x, hidden_states)
        return residual + self.mlp(x)


class FusedGPT2Block(GPT2Block):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = self.attn(self.ln_1(hidden_states), *args, **kwargs)[0]
        x, residual = self.ln_2(x, hidden_states, self.dropout_p)
        return residual + self.mlp(x)


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    LlamaRMSNorm: FusedRMSNorm,
    LlamaMLP: FusedLlamaMLP,
    LlamaRotaryEmbedding: HalfTables,
    LlamaAttention: FusedLlamaAttention,
    LlamaDecoderLayer: FusedLlamaLayer,
    GPT2Block: FusedGPT2Block,
    nn.LayerNorm: LayerNorm,
    nn.Embedding: Embedding,
    nn.Dropout: Dropout,
}


def use_kernels(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, a Llama or GPT-2, with the kernels in it. Raises ValueError for what they do not cover."""
    if not isinstance(model, LlamaForCausalLM | GPT2LMHeadModel):
        raise ValueError(f"the model is a {type(model).__name__}; expected LlamaForCausalLM or GPT2LMHeadModel")
    activation = getattr(model.config, "hidden_act", None) or model.config.activation_function
    if activation not in ("silu", "gelu_new") or getattr(model.config, "add_cross_attention", False):
        raise ValueError(f"{activation}, cross-attention: expected silu (Llama) or gelu_new (GPT-2) and none")
    if model.config._attn_implementation == "eager":
        raise ValueError("attn_implementation is 'eager'; expected 'sdpa' or another of transformers' fused ones")
    for module in list(model.modules()):
        if type(module) in FUSED:
            module.__class__ = FUSED[type(module)]
        if isinstance(module, FusedGPT2Block):
            module.dropout_p = module.attn.resid_dropout.p  # what attention adds is dropped where it is added
            module.attn.resid_dropout = nn.Identity()
            assert isinstance(module.mlp.act, NewGELUActivation)
            module.mlp.act = GELU(approximate="tanh")
    return model


def language_modeling_loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The mean loss of each token from those before it, without all logits. ids: (B, T) int64."""
    hidden = model.base_model(ids, use_cache=False).last_hidden_state
    return linear_cross_entropy(hidden[:, :-1], model.lm_head.weight, ids[:, 1:])


CONFIGS: dict[str, Any] = {
    "gpt2": GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    ),
}
TINY: dict[str, Any] = {
    "gpt2": GPT2Config(vocab_size=199, n_embd=48, n_layer=2, n_head=3, n_positions=64),
    "llama-3.2-1b": LlamaConfig(
        vocab_size=199,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    ),
}


def build(config: Any, dtype: torch.dtype, device: str) -> PreTrainedModel:
    torch.manual_seed(0)
    kind = GPT2LMHeadModel if isinstance(config, GPT2Config) else LlamaForCausalLM
    with torch.device(device):
        return kind(config).to(dtype)


def difference(config: Any, device: str) -> float:
    """The largest difference between logits in fp32, with and without the kernels, over the largest logit."""
    model = build(config, torch.float32, device).eval()
    ids = torch.randint(0, config.vocab_size, (2, 33), device=device)
    with torch.no_grad():
        before = model(ids).logits
        after = use_kernels(model)(ids).logits
    return float((after - before).abs().max() / before.abs().max())


def measure(config: Any, B: int, T: int, rounds: int = 7) -> dict[str, float]:
    """Milliseconds and peak GiB of a forward pass and of a training step without its optimizer, bf16, in turns."""
    plain = build(config, torch.bfloat16, "cuda")
    fused = use_kernels(copy.deepcopy(plain))
    ids = torch.randint(0, config.vocab_size, (B, T), device="cuda")

    def forward(model: PreTrainedModel) -> None:
        with torch.no_grad():
            model.base_model(ids, use_cache=False)

    def train(model: PreTrainedModel) -> None:
        loss = language_modeling_loss(model, ids) if model is fused else model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    results: dict[str, float] = {}
    for name, work in (("forward", forward), ("train", train)):
        times: dict[str, list[float]] = {"transformers": [], "fusedlm": []}
        for turn in range(rounds + 2):
            for variant, model in (("transformers", plain), ("fusedlm", fused)):
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                work(model)
                torch.cuda.synchronize()
                if turn > 1:
                    times[variant].append(time.perf_counter() - start)
                    results[f"{name} {variant} GiB"] = torch.cuda.max_memory_allocated() / 2**30
        for variant, seconds in times.items():
            results[f"{name} {variant} ms"] = statistics.median(seconds) * 1e3
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else "CPU"}
    for name, (B, T) in {"gpt2": (16, 1024), "llama-3.2-1b": (4, 2048)}.items():
        far = difference(CONFIGS[name] if device == "cuda" else TINY[name], device)
        print(f"{name}: logits in fp32 differ by {far:.1e} of the largest")
        results[name] = {"logits differ by": far}
        if device == "cuda":
            figures = results[name] | measure(CONFIGS[name], B, T) | {"B": B, "T": T}
            results[name] = figures
            for work in ("forward", "train"):
                theirs, ours = (figures[f"{work} {v} ms"] for v in ("transformers", "fusedlm"))
                memory = [figures[f"{work} {v} GiB"] for v in ("transformers", "fusedlm")]
                print(
                    f"  {work} {B} x {T}, bf16: transformers {theirs:.1f} ms, {memory[0]:.1f} GiB; with the kernels "
                    f"{ours:.1f} ms, {memory[1]:.1f} GiB: {theirs / ours:.2f}x"
                )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
