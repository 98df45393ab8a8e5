"""What a generation gives: text as it comes, the whole of it, why it ended and how fast it was."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from fusedlm.inference.decoder import Decoder
from fusedlm.inference.engine import FinishReason, TokenLogprob, TokenSequence, run
from fusedlm.inference.sampling import Sampler
from fusedlm.inference.stop import StopMatcher
from fusedlm.models import DecoderModel
from fusedlm.planner import decode_bytes
from fusedlm.tokenizer.interface import Tokenizer
from fusedlm.tokenizer.stream import IncrementalDecoder


@dataclass(frozen=True)
class Stats:
    """How fast a generation was. Times are in seconds; the prompt's own tokens are not output."""

    prompt_tokens: int
    new_tokens: int
    time_to_first_token: float
    token_seconds: list[float] = field(repr=False)  # between one output token and the next
    bytes_per_token: float  # weights and cache that a step reads, see planner.decode_bytes

    @property
    def median_token_seconds(self) -> float | None:
        """Median time of an output token after the first; None where there is no second one."""
        return statistics.median(self.token_seconds) if self.token_seconds else None

    @property
    def tokens_per_second(self) -> float | None:
        """Output tokens a second after the first; None where there is no second one."""
        return len(self.token_seconds) / sum(self.token_seconds) if self.token_seconds else None

    def bandwidth_share(self, bandwidth: float) -> float | None:
        """Part of a memory bandwidth, in bytes a second, that reading weights and cache at this pace takes."""
        median = self.median_token_seconds
        return None if median is None else self.bytes_per_token / median / bandwidth


@dataclass(frozen=True)
class Generation:
    """What came of one prompt. text and token_ids are without the prompt; a stop string is cut from text."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop: str | None  # the stop string that was found
    seed: int | None  # None where it was greedy
    logprobs: list[TokenLogprob] | None
    stats: Stats

    def __str__(self) -> str:
        return self.text


class TextStream(Iterator[str]):
    """Pieces of text as they are generated, always whole characters. `result` has the rest once it has ended."""

    def __init__(self, pieces: Iterator[list[str]], batch: "Batch") -> None:
        self._pieces = pieces
        self._batch = batch

    def __next__(self) -> str:
        while True:
            if piece := next(self._pieces)[0]:
                return piece

    def stop(self) -> Generation:
        """End it here (as Ctrl-C does in a chat) and return what there is."""
        self._pieces = iter(())
        return self._batch.results(interrupted=True)[0]

    @property
    def result(self) -> Generation:
        """The whole generation. Raises RuntimeError while it is still running."""
        return self._batch.results()[0]


class _TextOutput:
    """From one sequence's tokens to its text."""

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._decoder = IncrementalDecoder(tokenizer) if tokenizer is not None else None
        self._matcher = StopMatcher(stops)
        self._taken = 0
        self._closed = False
        self.text = ""

    @property
    def matched(self) -> str | None:
        return self._matcher.matched

    def update(self, sequence: TokenSequence) -> str:
        """Decode tokens that came since; ends the sequence at a stop string. Returns the new text."""
        if self._tokenizer is None or self._decoder is None or self._closed:
            return ""
        piece = ""
        for token in sequence.tokens[self._taken :]:
            if token < self._tokenizer.vocab_size:  # rows that pad the embedding stand for no text
                piece += self._matcher.push(self._decoder.push(token))
        self._taken = len(sequence.tokens)
        if sequence.finish_reason is not None:
            piece += self._matcher.push(self._decoder.finish())
        if self.matched is not None:
            sequence.finish_reason = FinishReason.STOP_STRING
        elif sequence.finish_reason is not None:
            piece += self._matcher.finish()
        self._closed = sequence.finish_reason is not None
        self.text += piece
        return piece


class Batch:
    """A generation under way: its sequences, their text, and the clock."""

    def __init__(
        self,
        model: DecoderModel,
        tokenizer: Tokenizer | None,
        sequences: list[TokenSequence],
        decoder: Decoder,
        sampler: Sampler,
        *,
        eos_ids: frozenset[int],
        stops: Sequence[str],
        logprobs: int | None,
    ) -> None:
        self.model, self.sequences, self.decoder, self.sampler = model, sequences, decoder, sampler
        self.eos_ids, self.logprobs = eos_ids, logprobs
        self.outputs = [_TextOutput(tokenizer, stops) for _ in sequences]
        self.times: list[float] = []

    def run(self) -> Iterator[list[str]]:
        """Yields, after every step, the new text of each sequence."""
        steps = run(self.decoder, self.sequences, self.sampler, eos_ids=self.eos_ids, logprobs=self.logprobs)
        for seconds in steps:
            self.times.append(seconds)
            yield [output.update(s) for output, s in zip(self.outputs, self.sequences, strict=True)]

    def results(self, *, interrupted: bool = False) -> list[Generation]:
        if interrupted:
            for s, output in zip(self.sequences, self.outputs, strict=True):
                s.finish_reason = s.finish_reason or FinishReason.INTERRUPTED
                output.update(s)
        return [self._result(s, output) for s, output in zip(self.sequences, self.outputs, strict=True)]

    def _result(self, s: TokenSequence, output: _TextOutput) -> Generation:
        if s.finish_reason is None:
            raise RuntimeError("the generation is still running; iterate to its end, or stop() it")
        n = len(s.tokens)
        times = self.times[: max(n, 1)]
        weight = self.model.embedding.weight
        stats = Stats(
            prompt_tokens=len(s.prompt),
            new_tokens=n,
            time_to_first_token=times[0] if times else float("nan"),
            token_seconds=[b - a for a, b in pairwise(times)],
            bytes_per_token=decode_bytes(
                self.model.config,
                bytes_per_element=weight.nbytes / weight.numel(),
                context=len(s.prompt) + n / 2,
                batch=len(self.sequences),
            ),
        )
        return Generation(
            text=output.text,
            token_ids=list(s.tokens),
            finish_reason=s.finish_reason,
            stop=output.matched,
            seed=self.sampler.seed if self.sampler.params.temperature > 0 else None,
            logprobs=s.logprobs if self.logprobs is not None else None,
            stats=stats,
        )
