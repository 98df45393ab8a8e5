"""How the next token is chosen: the settings people give, and the random streams that make a seed repeat."""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedlm.kernels import sample
from fusedlm.kernels.sample import check_sampling


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Settings of `kernels.sample`, and a seed. temperature 0 is greedy. Raises ValueError for values that make no
    sense. seed None draws one; `Generation.seed` says which, and giving it back repeats the text exactly."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        if self.seed is not None and not (isinstance(self.seed, int) and 0 <= self.seed < 2**64):
            raise ValueError(f"seed is {self.seed!r}; expected a whole number from 0 to 2^64 - 1")


class Sampler:
    """Chooses tokens for B sequences, each from a random stream of its own.

    streams: one number a sequence. The same seed and stream give the same text, whatever else is in the batch.
    """

    def __init__(self, params: SamplingParams, streams: Sequence[int], vocab_size: int, device: torch.device) -> None:
        self.params = params
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self._device = device
        self._generators = [torch.Generator().manual_seed(_mix(self.seed, stream)) for stream in streams]
        penalised = params.repetition_penalty != 1
        shape = (len(streams), vocab_size)
        self._seen = torch.zeros(shape, dtype=torch.bool, device=device) if penalised else None

    def observe(self, sequence: int, tokens: Sequence[int]) -> None:
        """Tell of tokens that are there already, for the repetition penalty."""
        if self._seen is not None:
            self._seen[sequence, torch.tensor(tokens, device=self._device)] = True

    def __call__(self, logits: Tensor) -> Tensor:
        """logits: (B, V). Returns (B,) int64 on the logits' device."""
        p = self.params
        uniform = None
        if p.temperature > 0:
            uniform = torch.cat([torch.rand(1, generator=g) for g in self._generators]).to(self._device)
        tokens = sample(
            logits,
            uniform,
            temperature=p.temperature,
            top_k=p.top_k,
            top_p=p.top_p,
            min_p=p.min_p,
            repetition_penalty=p.repetition_penalty,
            seen=self._seen,
        )
        if self._seen is not None:
            self._seen.scatter_(1, tokens.unsqueeze(1), True)
        return tokens


def _mix(seed: int, stream: int) -> int:
    """A generator's seed for one stream, unrelated to those of nearby seeds and streams."""
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
