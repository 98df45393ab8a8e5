"""Token ids in, logits out, a step at a time. The eager decoder runs the model as it is written."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusedlm.inference.cache import KVCache
from fusedlm.kernels._backend import forced
from fusedlm.models import DecoderModel

PREFILL_CHUNK = 512  # tokens a pass: long prompts then need no more memory for activations than short ones


# Not cuDNN's attention: it plans anew for every length of the cache, 48 ms at each step.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Decoder(Protocol):
    """How a model is run. Every decoder gives the same tokens; they differ in speed."""

    capacity: int

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read whole prompts, one a sequence. Returns the logits behind each, (B, V)."""
        ...

    def step(self, tokens: Sequence[int], active: Sequence[bool]) -> Tensor:
        """Append one token to each active sequence (others are computed and forgotten). Returns (B, V)."""
        ...


def make_decoder(model: DecoderModel, batch_size: int, capacity: int, *, threads: int | None = None) -> Decoder:
    """The fastest decoder for a model where it is: compiled steps for one sequence on a CPU, where numba is installed.

    threads: of compiled steps; by default as many as there are cores that this process may use. `backend("torch")`
    chooses the eager decoder.
    """
    if batch_size == 1 and _compiled_steps(model):
        from fusedlm.inference.compiled import CompiledDecoder

        return CompiledDecoder(model, capacity, threads=threads)
    return EagerDecoder(model, batch_size, capacity)


def first_step_compiles(model: DecoderModel) -> bool:
    """Whether the first step of one sequence will wait for a compiler, some seconds, because none was here before."""
    if not _compiled_steps(model):
        return False
    from fusedlm.inference.compiled import is_on_disk

    return not is_on_disk()


def _compiled_steps(model: DecoderModel) -> bool:
    if model.embedding.weight.device.type != "cpu" or forced() != "auto" or find_spec("numba") is None:
        return False
    from fusedlm.inference.compiled import supports

    return supports(model)


class EagerDecoder:
    """Runs the model's own forward pass over a `KVCache`.

    A prompt that begins with tokens the cache holds already (the next turn of a conversation) is read from where it
    differs; this is for one sequence, and the logits are those of reading it all.
    """

    def __init__(self, model: DecoderModel, batch_size: int, capacity: int, *, chunk: int = PREFILL_CHUNK) -> None:
        weight = model.embedding.weight
        self.model = model
        self.capacity = capacity
        self.chunk = chunk
        self.device = weight.device
        self.cache = KVCache(model.config, batch_size, capacity, dtype=weight.dtype, device=weight.device)
        self._held: list[int] = []  # the tokens of a single sequence's cache

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        return self.model.logits(self._read(prompts))

    @sdpa_kernel(_ATTENTION)
    def _read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Put whole prompts into the cache. Returns what the head takes behind each, (B, C)."""
        lengths = [len(p) for p in prompts]
        start = self._common_prefix(prompts)
        self.cache.truncate(start)
        self._held = self._held[:start]  # before anything is overwritten: the work may be interrupted
        last = torch.empty(len(prompts), self.model.config.width, dtype=self.cache.keys.dtype, device=self.device)
        # Padded to the right: a causal model never looks there, so each sequence gets what it gets alone.
        padded = torch.tensor([[*p, *([0] * (max(lengths) - len(p)))] for p in prompts])
        while start < max(lengths):
            end = min(start + self.chunk, max(lengths))
            hidden = self.model.hidden_states(padded[:, start:end].to(self.device), self.cache)  # (B, T, C)
            for b, n in enumerate(lengths):
                if start < n <= end:
                    last[b] = hidden[b, n - 1 - start]
            self.cache.advance([end - start] * len(prompts), end - start)
            start = end
        self.cache.lengths = lengths
        self._held = list(prompts[0])
        return last

    @torch.inference_mode()
    @sdpa_kernel(_ATTENTION)
    def step(self, tokens: Sequence[int], active: Sequence[bool]) -> Tensor:
        ids = torch.tensor(tokens).unsqueeze(1).to(self.device)
        hidden = self.model.hidden_states(ids, self.cache)  # (B, 1, C)
        self.cache.advance([int(a) for a in active], 1)
        if active[0]:
            self._held.append(tokens[0])
        return self.model.logits(hidden.squeeze(1))

    def _common_prefix(self, prompts: Sequence[Sequence[int]]) -> int:
        """Tokens at the start of a single prompt that need not be read again; its last one always is."""
        if len(prompts) > 1:
            return 0
        n = 0
        for a, b in zip(self._held, prompts[0][:-1], strict=False):
            if a != b:
                break
            n += 1
        return n
