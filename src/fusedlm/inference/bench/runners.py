"""What is measured: anything that reads a prompt and takes greedy steps."""

from collections.abc import Sequence
from typing import Protocol

import torch

from fusedlm.inference.decoder import Decoder


class Runner(Protocol):
    """One way to run one model. A token is the likeliest one after what was read so far."""

    name: str

    def read(self, prompt: Sequence[int]) -> int:
        """Forget what was before and read a prompt. Returns the next token."""
        ...

    def step(self, token: int) -> int:
        """Append a token. Returns the next one."""
        ...


class DecoderRunner:
    """A decoder of ours. It reads no more of a prompt than differs from the last, so prompts must differ."""

    def __init__(self, name: str, decoder: Decoder) -> None:
        self.name, self.decoder = name, decoder

    def read(self, prompt: Sequence[int]) -> int:
        return int(self.decoder.prefill([prompt])[0].argmax())

    def step(self, token: int) -> int:
        return int(self.decoder.step([token], [True])[0].argmax())


def random_prompt(n: int, vocab_size: int, seed: int = 0) -> list[int]:
    return torch.randint(0, vocab_size, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
