"""Models in GGUF files: what comes out is the model that went in, and memory holds little beside it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import (
    LLAMA3,
    Tensors,
    gpt2,
    gpt2_metadata,
    gpt2_tensors,
    llama,
    load,
    random_blocks,
    write_gguf,
    write_gpt2,
    write_llama,
)
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from fusedlm.models import DecoderModel

# It would let torch write to memory that must not be written to.
pytestmark = pytest.mark.filterwarnings("error:The given NumPy array is not writable")


def assert_same_logits(ours: DecoderModel, theirs: Any) -> None:
    ids = torch.randint(0, 101, (2, 29), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = ours(ids), theirs(ids).logits
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "num_key_value_heads": 4, "head_dim": 16},
        {"num_key_value_heads": 1, "rope_parameters": LLAMA3 | {"rope_theta": 1e4}, "rms_norm_eps": 1e-3},
        {"rope_parameters": LLAMA3, "head_dim": 64},
    ],
)
def test_llama_is_that_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    theirs = llama(**changes)
    assert_same_logits(load(write_llama(tmp_path / "m.gguf", theirs)), theirs)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-3, "n_inner": 100}])
def test_gpt2_is_that_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    theirs = gpt2(**changes)
    assert_same_logits(load(write_gpt2(tmp_path / "m.gguf", theirs)), theirs)


def test_gpt2_with_a_copy_of_its_embedding_is_tied(tmp_path: Path) -> None:
    theirs = gpt2()
    tensors = gpt2_tensors(theirs, output=True)
    ours = load(write_gguf(tmp_path / "m.gguf", "gpt2", gpt2_metadata(theirs.config), tensors))
    assert ours.head is None
    assert_same_logits(ours, theirs)


def test_alignment_of_another_width(tmp_path: Path) -> None:
    theirs = llama()
    assert_same_logits(load(write_llama(tmp_path / "m.gguf", theirs, alignment=256)), theirs)


def test_llama_as_transformers_reads_the_file(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf", llama(tie_word_embeddings=False), "Q8_0")
    # What from_pretrained(gguf_file=...) calls, which itself asks for a further package.
    config = load_gguf_checkpoint(path)["config"]
    theirs = LlamaForCausalLM(LlamaConfig(**config)).eval()
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=theirs)["tensors"]
    theirs.load_state_dict(tensors)
    assert_same_logits(load(path), theirs)


def test_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    theirs = llama()
    ours = load(write_llama(tmp_path / "m.gguf", theirs), torch.bfloat16)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    expected = theirs.model.layers[1].mlp.down_proj.weight.bfloat16()
    assert torch.equal(ours.get_parameter("blocks.1.mlp.down.weight"), expected)
    assert not ours.training


MEASURE = """
import sys, threading, time
import torch
from fusedlm.checkpoint.gguf import GGUFFile, load_gguf
from fusedlm.models import PRESETS, build_model

build_model(PRESETS["tiny-llama"], device="meta").to(torch.bfloat16)  # what torch imports when it is first used

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def sample():
    while not done.is_set():
        peaks.append(anonymous())
        time.sleep(0.001)

before, peaks, done = anonymous(), [], threading.Event()
sampler = threading.Thread(target=sample)
sampler.start()
model = load_gguf(GGUFFile(sys.argv[1]), dtype=getattr(torch, sys.argv[2]), device=torch.device("cpu"))
done.set()
sampler.join()
sizes = [p.numel() * p.element_size() for p in model.parameters()]
print(max(peaks) - before, sum(sizes), max(sizes), len(peaks))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_holds_little_beside_the_model(tmp_path: Path) -> None:
    """The bound is 1.2 models and one tensor; this one is tighter, so that a copy of the 78 MB file would break it."""
    V, C, F, n_layers = 49152, 512, 1536, 16
    blocks = random_blocks("Q8_0", V, C)

    def tensor(rows: int, width: int) -> tuple[np.ndarray, str]:
        return blocks.reshape(-1)[: rows * width // 32 * 34].reshape(rows, -1), "Q8_0"

    ones = (np.ones(C, np.float32), "F32")
    tensors: Tensors = {"token_embd.weight": tensor(V, C), "output_norm.weight": ones}
    shapes = {"attn_q": (C, C), "attn_k": (128, C), "attn_v": (128, C), "attn_output": (C, C)}
    shapes |= {"ffn_gate": (F, C), "ffn_up": (F, C), "ffn_down": (C, F)}
    for i in range(n_layers):
        tensors |= {f"blk.{i}.{name}.weight": tensor(*shape) for name, shape in shapes.items()}
        tensors |= {f"blk.{i}.attn_norm.weight": ones, f"blk.{i}.ffn_norm.weight": ones}
    metadata = {
        "llama.context_length": 2048,
        "llama.embedding_length": C,
        "llama.block_count": n_layers,
        "llama.feed_forward_length": F,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.tokens": [f"token {i}" for i in range(V)],
        "tokenizer.ggml.token_type": [1] * V,
    }
    path = write_gguf(tmp_path / "m.gguf", "llama", metadata, tensors)
    assert path.stat().st_size > 75e6
    for dtype in ("float32", "bfloat16"):
        command = [sys.executable, "-c", MEASURE, str(path), dtype]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peak, model, largest, samples = map(int, output.split())
        assert samples > 100
        assert peak <= 1.2 * model + largest
        assert peak <= model + 60e6, dtype
