"""Where each of our parameters lies in a Hugging Face checkpoint and in a GGUF file.

Ours fuse what is read together (queries, keys and values; gate and up), so a parameter is one or more pieces, stacked
along its rows. The same maps serve reading and writing.
"""

from dataclasses import dataclass

from fusedlm.models import GPT2Config, LlamaConfig, ModelConfig


@dataclass(frozen=True)
class Piece:
    """Rows start to stop of one of our parameters, as a tensor of a file.

    transposed: the file holds (in, out), as GPT-2's Conv1D does; ours are (out, in).
    rotary_heads: where not 0, the file's rows are permuted as GGUF's are, for rotary halves that lie interleaved;
    the number of heads in these rows.
    """

    name: str
    start: int
    stop: int
    transposed: bool = False
    rotary_heads: int = 0


NameMap = dict[str, list[Piece]]


def _attention_rows(config: ModelConfig) -> list[tuple[str, int, int]]:
    """(q, k or v, first row, last row + 1) of the fused projection."""
    D = config.head_dim
    q, k = config.n_heads * D, config.n_kv_heads * D
    return [("q", 0, q), ("k", q, q + k), ("v", q + k, q + 2 * k)]


def huggingface_names(config: ModelConfig) -> NameMap:
    """Hugging Face's names (GPT2LMHeadModel, LlamaForCausalLM). Raises TypeError for another architecture."""
    C, V, F = config.width, config.vocab_size, config.mlp_width
    names: NameMap = {}
    if isinstance(config, GPT2Config):
        names["embedding.weight"] = [Piece("transformer.wte.weight", 0, V)]
        names["positions.weight"] = [Piece("transformer.wpe.weight", 0, config.context_length)]
        for i in range(config.n_layers):
            for ours, theirs, rows in (
                ("norm1", "ln_1", C),
                ("attention.qkv", "attn.c_attn", config.qkv_width),
                ("attention.out", "attn.c_proj", C),
                ("norm2", "ln_2", C),
                ("mlp.up", "mlp.c_fc", F),
                ("mlp.down", "mlp.c_proj", C),
            ):
                theirs = f"transformer.h.{i}.{theirs}"
                is_matrix = not ours.startswith("norm")
                names[f"blocks.{i}.{ours}.weight"] = [Piece(f"{theirs}.weight", 0, rows, transposed=is_matrix)]
                if config.bias:
                    names[f"blocks.{i}.{ours}.bias"] = [Piece(f"{theirs}.bias", 0, rows)]
        for kind in ("weight", "bias") if config.bias else ("weight",):
            names[f"norm.{kind}"] = [Piece(f"transformer.ln_f.{kind}", 0, C)]
    elif isinstance(config, LlamaConfig):
        names["embedding.weight"] = [Piece("model.embed_tokens.weight", 0, V)]
        for i in range(config.n_layers):
            ours, theirs = f"blocks.{i}", f"model.layers.{i}"
            names[f"{ours}.norm1.weight"] = [Piece(f"{theirs}.input_layernorm.weight", 0, C)]
            names[f"{ours}.attention.qkv.weight"] = [
                Piece(f"{theirs}.self_attn.{x}_proj.weight", start, stop) for x, start, stop in _attention_rows(config)
            ]
            names[f"{ours}.attention.out.weight"] = [Piece(f"{theirs}.self_attn.o_proj.weight", 0, C)]
            names[f"{ours}.norm2.weight"] = [Piece(f"{theirs}.post_attention_layernorm.weight", 0, C)]
            names[f"{ours}.mlp.gate_up.weight"] = [
                Piece(f"{theirs}.mlp.gate_proj.weight", 0, F),
                Piece(f"{theirs}.mlp.up_proj.weight", F, 2 * F),
            ]
            names[f"{ours}.mlp.down.weight"] = [Piece(f"{theirs}.mlp.down_proj.weight", 0, C)]
        names["norm.weight"] = [Piece("model.norm.weight", 0, C)]
    else:
        raise TypeError(f"no Hugging Face names for a {type(config).__name__}")
    if not config.tied:
        names["head.weight"] = [Piece("lm_head.weight", 0, V)]
    return names


def gguf_names(config: ModelConfig) -> NameMap:
    """GGUF's names (architectures gpt2 and llama). Raises TypeError for another architecture."""
    C, V, F = config.width, config.vocab_size, config.mlp_width
    names: NameMap = {"embedding.weight": [Piece("token_embd.weight", 0, V)]}
    if isinstance(config, GPT2Config):
        names["positions.weight"] = [Piece("position_embd.weight", 0, config.context_length)]
        for i in range(config.n_layers):
            for ours, theirs, rows in (
                ("norm1", "attn_norm", C),
                ("attention.qkv", "attn_qkv", config.qkv_width),
                ("attention.out", "attn_output", C),
                ("norm2", "ffn_norm", C),
                ("mlp.up", "ffn_up", F),
                ("mlp.down", "ffn_down", C),
            ):
                for kind in ("weight", "bias"):
                    names[f"blocks.{i}.{ours}.{kind}"] = [Piece(f"blk.{i}.{theirs}.{kind}", 0, rows)]
        for kind in ("weight", "bias"):
            names[f"norm.{kind}"] = [Piece(f"output_norm.{kind}", 0, C)]
    elif isinstance(config, LlamaConfig):
        heads = {"q": config.n_heads, "k": config.n_kv_heads, "v": 0}
        for i in range(config.n_layers):
            ours, theirs = f"blocks.{i}", f"blk.{i}"
            names[f"{ours}.norm1.weight"] = [Piece(f"{theirs}.attn_norm.weight", 0, C)]
            names[f"{ours}.attention.qkv.weight"] = [
                Piece(f"{theirs}.attn_{x}.weight", start, stop, rotary_heads=heads[x])
                for x, start, stop in _attention_rows(config)
            ]
            names[f"{ours}.attention.out.weight"] = [Piece(f"{theirs}.attn_output.weight", 0, C)]
            names[f"{ours}.norm2.weight"] = [Piece(f"{theirs}.ffn_norm.weight", 0, C)]
            names[f"{ours}.mlp.gate_up.weight"] = [
                Piece(f"{theirs}.ffn_gate.weight", 0, F),
                Piece(f"{theirs}.ffn_up.weight", F, 2 * F),
            ]
            names[f"{ours}.mlp.down.weight"] = [Piece(f"{theirs}.ffn_down.weight", 0, C)]
        names["norm.weight"] = [Piece("output_norm.weight", 0, C)]
    else:
        raise TypeError(f"no GGUF names for a {type(config).__name__}")
    if not config.tied:
        names["head.weight"] = [Piece("output.weight", 0, V)]
    return names
