"""GGUF files for tests, by the gguf package's own writer, as llama.cpp's converter names and permutes."""

import math
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFEndian, GGUFWriter
from torch import Tensor
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from fusedlm.checkpoint.gguf import GGUFFile, load_gguf
from fusedlm.models import DecoderModel

TOKENS = ["<unk>", "a", "b", "é", "日本"]

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

Tensors = dict[str, tuple[np.ndarray, str]]


def write_gguf(
    path: Path,
    architecture: str,
    metadata: dict[str, Any],
    tensors: Tensors,
    *,
    alignment: int | None = None,
    endianess: GGUFEndian = GGUFEndian.LITTLE,
) -> Path:
    """tensors: values (or, as uint8, blocks) and the name of their type. Whole numbers are written as uint32."""
    writer = GGUFWriter(path, architecture, endianess=endianess)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    for name, (values, type_name) in tensors.items():
        type_ = GGMLQuantizationType[type_name]
        blocks = values if values.dtype == np.uint8 else gguf.quants.quantize(values, type_)
        writer.add_tensor(name, blocks, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def published_permutation(weight: Tensor, n_heads: int) -> Tensor:
    """LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py, row by row.

    There: reshape(n_heads, 2, D/2, ...), swap axes 1 and 2, reshape back. So row 2 i + s of a head in the file is row
    s D/2 + i of that head in Hugging Face's matrix.
    """
    D = weight.shape[0] // n_heads
    rows = [h * D + s * (D // 2) + i for h in range(n_heads) for i in range(D // 2) for s in range(2)]
    return torch.stack([weight[row] for row in rows])


def published_rope_factors(theta: float, D: int, rope: dict[str, Any], original: int) -> np.ndarray:
    """LlamaModel.generate_extra_tensors there: what the rotary frequencies are divided by, in its float32."""
    low_wavelength, high_wavelength = original / rope["low_freq_factor"], original / rope["high_freq_factor"]
    factors = []
    for frequency in 1.0 / theta ** (torch.arange(0, D, 2, dtype=torch.float32) / D):
        wavelength = 2 * math.pi / float(frequency)
        if wavelength < high_wavelength:
            factors.append(1.0)
        elif wavelength > low_wavelength:
            factors.append(rope["factor"])
        else:
            smooth = (original / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def llama_metadata(config: transformers.LlamaConfig) -> dict[str, Any]:
    return {
        "general.name": "a llama",
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [2, 1, 1, 1, 1],
        "tokenizer.ggml.add_bos_token": False,
    }


def llama_tensors(model: LlamaForCausalLM, type_name: str = "F32") -> Tensors:
    """Matrices as type_name, norms in float32."""
    config = model.config
    state = {name.removeprefix("model."): p.detach().float() for name, p in model.named_parameters()}
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    found = {"token_embd": state["embed_tokens.weight"], "output_norm": state["norm.weight"]}
    for i in range(config.num_hidden_layers):
        for theirs, name in names.items():
            weight = state[f"layers.{i}.{theirs}.weight"]
            found[f"blk.{i}.{name}"] = published_permutation(weight, heads[name]) if name in heads else weight
    if not config.tie_word_embeddings:
        found["output"] = state["lm_head.weight"]
    tensors = {f"{name}.weight": (w.numpy(), type_name if w.ndim == 2 else "F32") for name, w in found.items()}
    if config.rope_parameters["rope_type"] == "llama3":
        rope = config.rope_parameters
        factors = published_rope_factors(
            rope["rope_theta"], config.head_dim, rope, rope["original_max_position_embeddings"]
        )
        tensors["rope_freqs.weight"] = (factors, "F32")
    return tensors


def gpt2_metadata(config: transformers.GPT2Config) -> dict[str, Any]:
    return {
        "general.name": "a gpt2",
        "gpt2.context_length": config.n_positions,
        "gpt2.embedding_length": config.n_embd,
        "gpt2.block_count": config.n_layer,
        "gpt2.feed_forward_length": config.n_inner or 4 * config.n_embd,
        "gpt2.attention.head_count": config.n_head,
        "gpt2.attention.layer_norm_epsilon": config.layer_norm_epsilon,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": TOKENS,
    }


def gpt2_tensors(model: GPT2LMHeadModel, type_name: str = "F32", *, output: bool = False) -> Tensors:
    """Matrices as type_name, biases, norms and positions in float32. output: with a copy of a tied head."""
    state = {name.removeprefix("transformer."): p.detach().float() for name, p in model.named_parameters()}
    names = {
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    }
    found = {"token_embd.weight": state["wte.weight"], "position_embd.weight": state["wpe.weight"]}
    for i in range(model.config.n_layer):
        for theirs, name in names.items():
            weight, bias = state[f"h.{i}.{theirs}.weight"], state[f"h.{i}.{theirs}.bias"]
            found[f"blk.{i}.{name}.weight"] = weight.t().contiguous() if weight.ndim == 2 else weight  # Conv1D
            found[f"blk.{i}.{name}.bias"] = bias
    found |= {"output_norm.weight": state["ln_f.weight"], "output_norm.bias": state["ln_f.bias"]}
    if output or not model.config.tie_word_embeddings:
        found["output.weight"] = state["wte.weight" if model.config.tie_word_embeddings else "lm_head.weight"]
    return {
        name: (w.numpy(), type_name if w.ndim == 2 and name != "position_embd.weight" else "F32")
        for name, w in found.items()
    }


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A small random one: 2 layers, 4 heads of 32 over 2, width 64."""
    sizes: dict[str, Any] = {
        "vocab_size": 101,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    return _random(LlamaForCausalLM, transformers.LlamaConfig(**sizes | changes), seed)


def gpt2(seed: int = 0, **changes: Any) -> GPT2LMHeadModel:
    """A small random one: 2 layers, 4 heads of 16, width 64."""
    sizes: dict[str, Any] = {
        "vocab_size": 101,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
    }
    return _random(GPT2LMHeadModel, transformers.GPT2Config(**sizes | changes), seed)


def _random(kind: Any, config: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    model = kind._from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():  # norms and biases too, or a lost one would not show
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def write_llama(path: Path, model: Any = None, type_name: str = "F32", **options: Any) -> Path:
    model = model or llama()
    return write_gguf(path, "llama", llama_metadata(model.config), llama_tensors(model, type_name), **options)


def write_gpt2(path: Path, model: Any = None, type_name: str = "F32", **options: Any) -> Path:
    model = model or gpt2()
    return write_gguf(path, "gpt2", gpt2_metadata(model.config), gpt2_tensors(model, type_name), **options)


def random_blocks(type_name: str, rows: int, width: int) -> np.ndarray:
    """Any bits, but for scales of ordinary size. Returns (rows, bytes a row) uint8."""
    r = np.random.default_rng(0)
    block, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    n = rows * width // block
    if type_name in ("F32", "F16", "BF16"):
        values = r.standard_normal((rows, width)).astype(np.float16 if type_name == "F16" else np.float32)
        return (
            values.view(np.uint8)
            if type_name != "BF16"
            else values.view(np.uint8).reshape(n, 4)[:, 2:].reshape(rows, -1)
        )
    blocks = r.integers(0, 256, (n, size), dtype=np.uint8)
    halves = {"Q8_0": [0], "Q4_0": [0], "Q5_0": [0], "Q6_K": [208]}.get(type_name, [0, 2])
    for at in halves:
        blocks[:, at : at + 2] = r.uniform(-0.1, 0.1, (n, 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def packed(text: str | bytes) -> bytes:
    """A string as files have it, behind its length."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def load(path: Path, dtype: torch.dtype = torch.float32) -> DecoderModel:
    return load_gguf(GGUFFile(path), dtype=dtype, device=torch.device("cpu"))


@contextmanager
def allocating_less_than(size: float) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size
