"""Logits against `transformers` over random configurations, both directions: it writes and we read, we write and it
reads. In float64 GPT-2 must agree to 1e-10; Llama to 1e-6 with transformers as it is (its norm, rotary tables and
softmax go through float32) and to 1e-10 with those casts patched away."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import GPT2LMHeadModel, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from fusedlm.checkpoint.huggingface import load_huggingface, new_directory, save_huggingface
from fusedlm.models import DecoderModel, GPT2Config, build_model

CPU = torch.device("cpu")
WIDTHS = (60, 64, 96, 120, 192, 256, 384, 760, 768)


def gpt2_config(seed: int) -> transformers.GPT2Config:
    r = random.Random(seed)
    width = WIDTHS[seed % len(WIDTHS)]
    return transformers.GPT2Config(
        vocab_size=r.choice((97, 256, 501)),
        n_positions=r.choice((33, 64)),
        n_embd=width,
        n_layer=1 + seed % 3,
        n_head=r.choice([h for h in (1, 2, 3, 4, 5, 6, 8, 12) if width % h == 0]),
        n_inner=r.choice((None, 3 * width + 4)),
        layer_norm_epsilon=r.choice((1e-5, 1e-3)),
        tie_word_embeddings=seed % 3 != 0,
        initializer_range=width**-0.5,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0,
        attn_pdrop=0,
        embd_pdrop=0,
    )


def llama_config(seed: int) -> transformers.LlamaConfig:
    r = random.Random(seed)
    width = WIDTHS[seed % len(WIDTHS)]
    heads = r.choice([h for h in (1, 2, 3, 4, 5, 6, 8, 12) if width % h == 0])  # transformers insists
    kv = r.choice([g for g in (1, 2, 3, 4, 6, 12) if heads % g == 0])
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": r.choice((1e4, 5e5))}
    if seed % 2:
        rope |= {
            "rope_type": "llama3",
            "factor": r.choice((8.0, 32.0)),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": r.choice((16, 64, 8192)),
        }
    return transformers.LlamaConfig(
        vocab_size=r.choice((97, 256, 501)),
        max_position_embeddings=64,
        hidden_size=width,
        intermediate_size=r.choice((width, 2 * width + 6)),
        num_hidden_layers=1 + seed % 3,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=r.choice((16, 20, 32, 64)),  # heads * head_dim is rarely the width
        rms_norm_eps=r.choice((1e-5, 1e-6)),
        rope_parameters=rope,
        tie_word_embeddings=seed % 2 == 0,
        initializer_range=width**-0.5,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )


def build_theirs(config: Any, seed: int, dtype: torch.dtype) -> Any:
    torch.manual_seed(seed)
    kind = GPT2LMHeadModel if isinstance(config, transformers.GPT2Config) else LlamaForCausalLM
    model = kind._from_config(config, attn_implementation="eager", dtype=dtype)
    with torch.no_grad():
        for p in model.parameters():  # norms and biases too, or a missing one would not show
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def tokens(config: Any, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (2, 29), generator=generator)


@contextmanager
def pure_float64() -> Iterator[None]:
    """transformers' Llama without its casts to float32."""

    class Norm(torch.nn.Module):
        def __init__(self, norm: Any) -> None:
            super().__init__()
            self.weight, self.eps = norm.weight, norm.variance_epsilon

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def rotary(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        parameters = self.config.rope_parameters
        exponent = torch.arange(0, self.config.head_dim, 2, dtype=torch.float64) / self.config.head_dim
        inverse = 1.0 / parameters["rope_theta"] ** exponent
        if parameters["rope_type"] == "llama3":  # as in the model's own release, in plain Python
            old = parameters["original_max_position_embeddings"]
            low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
            stretched = []
            for f in inverse.tolist():
                wavelength = 2 * torch.pi / f
                smooth = (old / wavelength - low) / (high - low)
                if wavelength > old / low:
                    f = f / parameters["factor"]
                elif wavelength >= old / high:
                    f = (1 - smooth) * f / parameters["factor"] + smooth * f
                stretched.append(f)
            inverse = torch.tensor(stretched, dtype=torch.float64)
        angles = position_ids[..., None].double() * inverse
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    softmax = torch.nn.functional.softmax
    originals = modeling_llama.LlamaRotaryEmbedding.forward
    modeling_llama.LlamaRotaryEmbedding.forward = rotary
    torch.nn.functional.softmax = lambda x, dim=-1, dtype=None: softmax(x, dim=dim)
    try:
        yield Norm
    finally:
        modeling_llama.LlamaRotaryEmbedding.forward = originals
        torch.nn.functional.softmax = softmax


def their_logits(model: Any, ids: Tensor, *, pure: bool = False) -> Tensor:
    with torch.no_grad():
        if not pure:
            return model(ids, use_cache=False).logits
        with pure_float64() as Norm:
            for module in model.modules():
                for name, child in list(module.named_children()):
                    if type(child).__name__ == "LlamaRMSNorm":
                        setattr(module, name, Norm(child))
            return model(ids, use_cache=False).logits


def our_logits(model: DecoderModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids)


@pytest.mark.parametrize("seed", range(16))
def test_gpt2_read(seed: int, tmp_path: Path) -> None:
    config = gpt2_config(seed)
    theirs, ids = build_theirs(config, seed, torch.float64), tokens(config, seed)
    theirs.save_pretrained(tmp_path)
    expected = their_logits(theirs, ids)
    assert (
        relative_error(our_logits(load_huggingface(tmp_path, dtype=torch.float64, device=CPU), ids), expected) < 1e-10
    )
    ours = load_huggingface(tmp_path, dtype=torch.float32, device=CPU)
    assert relative_error(our_logits(ours, ids).double(), expected) < 1e-5


@pytest.mark.parametrize("seed", range(20))
def test_llama_read(seed: int, tmp_path: Path) -> None:
    config = llama_config(seed)
    theirs, ids = build_theirs(config, seed, torch.float64), tokens(config, seed)
    theirs.save_pretrained(tmp_path)
    ours = load_huggingface(tmp_path, dtype=torch.float64, device=CPU)
    assert relative_error(our_logits(ours, ids), their_logits(theirs, ids)) < 1e-6
    exact = their_logits(theirs, ids, pure=True)
    assert relative_error(our_logits(ours, ids), exact) < 1e-10
    ours = load_huggingface(tmp_path, dtype=torch.float32, device=CPU)
    assert relative_error(our_logits(ours, ids).double(), exact) < 1e-5


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_written(kind: str, seed: int, tmp_path: Path) -> None:
    """We read theirs, write it, sharded or not; they read ours."""
    config = gpt2_config(seed) if kind == "gpt2" else llama_config(seed)
    theirs, ids = build_theirs(config, seed, torch.float64), tokens(config, seed)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_huggingface(tmp_path / "theirs", dtype=torch.float64, device=CPU)
    with new_directory(tmp_path / "ours") as folder:
        save_huggingface(ours, folder, max_shard_bytes=200_000 if seed % 2 else 10**9)
    auto = transformers.AutoModelForCausalLM
    back = auto.from_pretrained(tmp_path / "ours", attn_implementation="eager", dtype=torch.float64).eval()
    assert relative_error(their_logits(back, ids), their_logits(theirs, ids)) < 1e-13


def test_gpt2_without_biases_is_written_with_zeros(tmp_path: Path) -> None:
    """Transformers computes its logits, and so does what we read back."""
    sizes = {"context_length": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "head_dim": 12, "width": 48}
    config = GPT2Config(vocab_size=97, mlp_width=192, norm_eps=1e-5, tied=True, bias=False, **sizes)
    ours = build_model(config)
    ours.init_weights(torch.Generator().manual_seed(5))
    ours = ours.to(torch.float64).eval()
    assert not [name for name, _ in ours.named_parameters() if name.endswith("bias")]
    ids = torch.randint(0, 97, (2, 29), generator=torch.Generator().manual_seed(6))
    with new_directory(tmp_path / "ours") as folder:
        save_huggingface(ours, folder)
    auto = transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(tmp_path / "ours", attn_implementation="eager", dtype=torch.float64).eval()
    assert relative_error(our_logits(ours, ids), their_logits(theirs, ids)) < 1e-13
    back = load_huggingface(tmp_path / "ours", dtype=torch.float64, device=CPU)
    assert back.config == replace(config, bias=True)
    assert relative_error(our_logits(back, ids), their_logits(theirs, ids)) < 1e-13


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_text_is_equal(kind: str, seed: int, tmp_path: Path) -> None:
    from fusedlm.inference.language_model import LanguageModel

    config = gpt2_config(seed) if kind == "gpt2" else llama_config(seed)
    theirs, ids = build_theirs(config, seed, torch.float32), tokens(config, seed)[:1, :9]
    theirs.save_pretrained(tmp_path)
    theirs.generation_config.eos_token_id = None
    options = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}  # 0 is a token like any other here
    expected = theirs.generate(ids, max_new_tokens=20, do_sample=False, **options)[0, 9:].tolist()
    ours = LanguageModel(load_huggingface(tmp_path, dtype=torch.float32, device=CPU))
    assert ours.generate(ids[0].tolist(), max_new_tokens=20, temperature=0).token_ids == expected


def test_multi_query_gpt2_against_gpt_bigcode(tmp_path: Path) -> None:
    """GPT-2 with one key/value head is what transformers calls GPTBigCode."""
    config = transformers.GPTBigCodeConfig(
        vocab_size=101,
        n_positions=40,
        n_embd=96,
        n_layer=3,
        n_head=6,
        multi_query=True,
        initializer_range=0.1,
        attention_softmax_in_fp32=False,
    )
    torch.manual_seed(0)
    theirs = transformers.GPTBigCodeForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float64)
    from fusedlm.models import GPT2Config, build_model

    ours = build_model(
        GPT2Config(
            vocab_size=101,
            context_length=40,
            n_layers=3,
            n_heads=6,
            n_kv_heads=1,
            head_dim=16,
            width=96,
            mlp_width=384,
            norm_eps=config.layer_norm_epsilon,
            tied=True,
        ),
        dtype=torch.float64,
    ).eval()
    state = theirs.eval().state_dict()
    renamed = {
        "embedding.weight": state["transformer.wte.weight"],
        "positions.weight": state["transformer.wpe.weight"],
        "norm.weight": state["transformer.ln_f.weight"],
        "norm.bias": state["transformer.ln_f.bias"],
    }
    for i in range(3):
        for a, b in (
            ("norm1", "ln_1"),
            ("attention.qkv", "attn.c_attn"),
            ("attention.out", "attn.c_proj"),
            ("norm2", "ln_2"),
            ("mlp.up", "mlp.c_fc"),
            ("mlp.down", "mlp.c_proj"),
        ):
            for kind in ("weight", "bias"):
                renamed[f"blocks.{i}.{a}.{kind}"] = state[f"transformer.h.{i}.{b}.{kind}"]
    ours.load_state_dict(renamed)
    ids = tokens(config, 0)
    assert relative_error(our_logits(ours, ids), their_logits(theirs, ids)) < 1e-10
    # Hugging Face has no such GPT-2: ours is saved under a name of its own, and comes back the same.
    with new_directory(tmp_path / "ours") as folder:
        save_huggingface(ours, folder)
    back = load_huggingface(tmp_path / "ours", dtype=torch.float64, device=CPU)
    assert torch.equal(our_logits(back, ids), our_logits(ours, ids))
    with pytest.raises(ValueError, match="fusedlm-gpt2"):
        transformers.AutoConfig.from_pretrained(tmp_path / "ours")
