"""The generation loop, in token ids: prefill, then sample and step until every sequence has ended."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from fusedlm.inference.decoder import Decoder
from fusedlm.inference.sampling import Sampler
from fusedlm.kernels import raise_index_errors


class FinishReason(StrEnum):
    """Why a sequence ended."""

    END_OF_TEXT = "end_of_text"
    STOP_STRING = "stop_string"
    MAX_NEW_TOKENS = "max_new_tokens"
    CONTEXT_LIMIT = "context_limit"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithm of a token's probability under the model itself, before temperature, filters and penalties."""

    token: int
    logprob: float
    top: list[tuple[int, float]]  # the likeliest tokens, likeliest first


@dataclass
class TokenSequence:
    """One sequence being generated: what it may still grow to, and what has come of it."""

    prompt: list[int]
    limit: int  # new tokens at most
    limit_reason: FinishReason
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None


def run(
    decoder: Decoder,
    sequences: Sequence[TokenSequence],
    sampler: Sampler,
    *,
    eos_ids: frozenset[int],
    logprobs: int | None = None,
) -> Iterator[float]:
    """Generate for all sequences, in place. Yields after every token the seconds since the start.

    Whoever iterates may set a sequence's finish_reason (a stop string was found); stopping to iterate stops the work.
    Raises ValueError for a token id that the model's embedding does not have.
    """
    start = time.perf_counter()
    logits = decoder.prefill([s.prompt for s in sequences])
    for b, s in enumerate(sequences):
        sampler.observe(b, s.prompt)
    while True:
        chosen = sampler(logits).tolist()  # waits for the device
        raise_index_errors()
        details = _logprobs(logits, chosen, logprobs) if logprobs is not None else None
        for b, s in enumerate(sequences):
            if s.finish_reason is not None:
                continue
            if chosen[b] in eos_ids:
                s.finish_reason = FinishReason.END_OF_TEXT
                continue
            s.tokens.append(chosen[b])
            if details is not None:
                s.logprobs.append(details[b])
            if len(s.tokens) >= s.limit:
                s.finish_reason = s.limit_reason
        yield time.perf_counter() - start
        active = [s.finish_reason is None for s in sequences]
        if not any(active):
            return
        logits = decoder.step(chosen, active)


def _logprobs(logits: Tensor, chosen: list[int], n: int) -> list[TokenLogprob]:
    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)  # (B, V)
    top = logs.topk(n, dim=-1)
    return [
        TokenLogprob(
            token, logs[b, token].item(), list(zip(top.indices[b].tolist(), top.values[b].tolist(), strict=True))
        )
        for b, token in enumerate(chosen)
    ]
