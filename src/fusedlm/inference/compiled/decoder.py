"""A decoder whose passes are compiled: one call a token, of a numba function that several threads run together."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedlm.hardware import available_cores
from fusedlm.inference.compiled.program import Program
from fusedlm.inference.compiled.step import TOKENS, run
from fusedlm.inference.decoder import EagerDecoder
from fusedlm.models import GPT2, DecoderModel, Llama
from fusedlm.models.decoder import check_length
from fusedlm.models.quantized import Int8Weight


def supports(model: DecoderModel) -> bool:
    """Whether a model's steps can be compiled: GPT-2 or Llama on a CPU, in float32, bfloat16 or 8 bits."""
    return isinstance(model, GPT2 | Llama) and all(
        p.device.type == "cpu"
        and p.dtype in (torch.float32, torch.bfloat16)
        and (isinstance(p, Int8Weight) or p.stride(-1) == 1)
        for p in model.parameters()
    )


class CompiledDecoder(EagerDecoder):
    """One sequence on a CPU: passes of the whole model over a few tokens of a prompt, or over one, by `step.run`.

    threads: so many take part in a pass; by default as many as there are cores that this process may use.
    """

    def __init__(self, model: DecoderModel, capacity: int, *, threads: int | None = None) -> None:
        super().__init__(model, 1, capacity)
        self.threads = threads or available_cores()
        self._program = Program(model, self.cache, self.threads)
        self._own = self._program.scratch()
        # One executor a thread, so that each has its scratch to itself; their threads sleep between passes.
        self._helpers = [(ThreadPoolExecutor(1, "fusedlm"), self._program.scratch()) for _ in range(self.threads - 1)]

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        prompt = list(prompts[0])
        if len(prompt) > self.capacity:
            raise ValueError(f"{len(prompt)} tokens do not fit a cache of {self.capacity}")
        start = self._common_prefix(prompts)
        self.cache.truncate(start)
        del self._held[start:]  # before anything is overwritten: the work may be interrupted
        for i in range(start, len(prompt), TOKENS):
            logits = self._pass(prompt[i : i + TOKENS], i, wanted=i + TOKENS >= len(prompt))
        return logits

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], active: Sequence[bool]) -> Tensor:
        position = self.cache.lengths[0]
        if position >= self.capacity:
            raise ValueError(f"{position + 1} tokens do not fit a cache of {self.capacity}")
        if active[0]:
            return self._pass(tokens, position)
        return torch.zeros(1, self.model.config.vocab_size)

    def _pass(self, tokens: Sequence[int], position: int, wanted: bool = True) -> Tensor:
        """Put at most TOKENS tokens into the cache. Returns the logits behind the last, (1, V), or nothing."""
        V, end = self.model.config.vocab_size, position + len(tokens)
        if min(tokens) < 0 or max(tokens) >= V:
            raise ValueError(f"token ids must lie in [0, {V}); got {min(tokens)} to {max(tokens)}")
        check_length(self.model.config, end)
        ids = torch.tensor(tokens)
        logits = torch.empty(-(-V // 16) * 16 if wanted else 0)
        work = _Work(self._program, self._program.counters(), ids, position, logits)
        for helper, own in self._helpers:
            helper.submit(work.take_part, own)
        work.take_part(self._own)
        self.cache.advance([len(tokens)], len(tokens))
        self._held += tokens
        return logits[:V].unsqueeze(0)


@dataclass(frozen=True)
class _Work:
    """One pass, which any number of threads can take part in."""

    program: Program
    counters: Tensor
    tokens: Tensor
    position: int
    logits: Tensor

    def take_part(self, own: Tensor) -> None:
        p = self.program
        addresses = (self.tokens.data_ptr(), len(self.tokens), self.position, self.logits.data_ptr(), own.data_ptr())
        run(p.stages, p.shape, p.bounds, self.counters.data_ptr(), *addresses)
