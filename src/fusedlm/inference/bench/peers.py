"""llama.cpp and transformers on the same weights, where they are installed. Neither is ever needed."""

import ctypes
import importlib
import shutil
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusedlm.checkpoint.load import save_checkpoint
from fusedlm.checkpoint.names import gguf_names
from fusedlm.models import DecoderModel, GPT2Config

LLAMA_FILE_TYPES = {"F32": 0, "Q8_0": 7, "BF16": 32}  # llama_ftype of llama.h


def llama_cpp() -> Any:
    """The package llama-cpp-python, silenced; None where it is not installed."""
    if not installed("llama_cpp"):
        return None
    lib: Any = importlib.import_module("llama_cpp")
    if not hasattr(lib, "_silenced"):
        lib._silenced = lib.llama_log_callback(lambda level, text, data: None)
        lib.llama_log_set(lib._silenced, ctypes.c_void_p(0))
        lib.llama_backend_init()
    return lib


def installed(package: str) -> bool:
    return find_spec(package) is not None


def can_compile() -> bool:
    """Whether torch.compile finds the C++ compiler that it needs on a CPU."""
    from torch._inductor import config

    return any(name is not None and shutil.which(name) is not None for name in config.cpp.cxx)


def llama_file(folder: Path, model: DecoderModel, source: Path | None, kind: str) -> Path:
    """A GGUF file of a model in a type of llama.cpp's, made of `source`, its own GGUF file, or written anew (GPT-2)."""
    lib = llama_cpp()
    wide, path = folder / "F32.gguf", folder / f"{kind}.gguf"
    if not wide.exists():
        if source is None:
            _write_gpt2(wide, model)
        else:
            _quantize(lib, source, wide, "F32")
    if not path.exists():
        _quantize(lib, wide, path, kind)
    return path


def _quantize(lib: Any, source: Path, target: Path, kind: str) -> None:
    options = lib.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = LLAMA_FILE_TYPES[kind], True
    if lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)):
        raise ValueError(f"llama.cpp could not make {kind} of {source}")


def _write_gpt2(path: Path, model: DecoderModel) -> None:
    """A GPT-2 as GGUF in float32, with a vocabulary that only has the right size."""
    from gguf import GGUFWriter

    c = model.config
    if not isinstance(c, GPT2Config):
        raise ValueError(f"a GGUF file of a {type(c).__name__} is not written here; expected a GPT2Config")
    writer = GGUFWriter(path, "gpt2")
    writer.add_context_length(c.context_length)
    writer.add_embedding_length(c.width)
    writer.add_block_count(c.n_layers)
    writer.add_feed_forward_length(c.mlp_width)
    writer.add_head_count(c.n_heads)
    writer.add_layer_norm_eps(c.norm_eps)
    writer.add_file_type(0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(c.vocab_size)])
    writer.add_token_types([1] * c.vocab_size)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    parameters = dict(model.named_parameters())
    for ours, pieces in gguf_names(c).items():
        for piece in pieces:
            writer.add_tensor(piece.name, parameters[ours].detach()[piece.start : piece.stop].float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """llama.cpp through its low-level interface: no sampling, no text, nothing but llama_decode and an argmax."""

    def __init__(self, name: str, path: Path, threads: int, capacity: int = 1024) -> None:
        self.name, self._lib = name, llama_cpp()
        lib = self._lib
        self._model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        options = lib.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = capacity, 512, 512
        options.n_threads = options.n_threads_batch = threads
        self._context = lib.llama_init_from_model(self._model, options)
        if not self._model or not self._context:
            raise ValueError(f"llama.cpp could not load {path}")
        self.vocab_size: int = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))

    def close(self) -> None:
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def read(self, prompt: Sequence[int]) -> int:
        self._clear()
        return self._decode(prompt)

    def step(self, token: int) -> int:
        return self._decode([token])

    def all_logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits behind every one of at most 512 tokens, (T, V)."""
        lib, n = self._lib, len(tokens)
        self._clear()
        batch = lib.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if lib.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        logits = np.ctypeslib.as_array(lib.llama_get_logits(self._context), shape=(n, self.vocab_size)).copy()
        lib.llama_batch_free(batch)
        return torch.from_numpy(logits)

    def _clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _decode(self, tokens: Sequence[int]) -> int:
        lib = self._lib
        array = (lib.llama_token * len(tokens))(*tokens)
        if lib.llama_decode(self._context, lib.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")
        logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(self._context, -1), shape=(self.vocab_size,))
        return int(logits.argmax())


class Transformers:
    """transformers in float32: its model, its cache, and nothing of its generate loop.

    compiled: steps by torch.compile, over a cache that has room for `capacity` tokens from the start, as its
    documentation advises. Prompts are read without: compiled they are no faster, and every length would take seconds.
    """

    def __init__(self, model: DecoderModel, capacity: int = 1024, *, compiled: bool = False) -> None:
        self.name = "transformers, compiled" if compiled else "transformers"
        self._lib = importlib.import_module("transformers")
        self._lib.utils.logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(model, Path(folder))
            self._model = self._lib.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._forward = torch.compile(self._model) if compiled else self._model
        self._capacity = capacity if compiled else None

    def _new_cache(self) -> Any:
        if self._capacity is None:
            return self._lib.DynamicCache()
        return self._lib.StaticCache(config=self._model.config, max_cache_len=self._capacity)

    def read(self, prompt: Sequence[int]) -> int:
        self._cache, self._length = self._new_cache(), 0
        return self._run(self._model, prompt)

    def step(self, token: int) -> int:
        return self._run(self._forward, [token])

    @torch.inference_mode()
    def _run(self, forward: Any, tokens: Sequence[int]) -> int:
        positions = torch.arange(self._length, self._length + len(tokens))
        self._length += len(tokens)
        out = forward(
            torch.tensor([list(tokens)]),
            past_key_values=self._cache,
            position_ids=positions.unsqueeze(0),
            use_cache=True,
            logits_to_keep=1,
        )
        return int(out.logits[0, -1].argmax())
