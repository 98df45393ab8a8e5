"""A model with its tokenizer: text in, text out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fusedlm.checkpoint.load import load_checkpoint, new_directory, save_checkpoint
from fusedlm.inference.decoder import Decoder, make_decoder
from fusedlm.inference.engine import FinishReason, TokenSequence
from fusedlm.inference.generation import Batch, Generation, TextStream
from fusedlm.inference.sampling import Sampler, SamplingParams
from fusedlm.models import DecoderModel
from fusedlm.tokenizer.interface import Tokenizer

Prompt = str | Sequence[int]


class LanguageModel:
    """A model, its tokenizer and how it likes to be sampled.

    `model(ids)` gives logits, `model.generate(prompt)` text. Made by `fusedlm.load`.
    """

    def __init__(
        self,
        model: DecoderModel,
        tokenizer: Tokenizer | None = None,
        *,
        generation_config: Mapping[str, Any] | None = None,
        name: str = "",
        threads: int | None = None,
    ) -> None:
        """generation_config: as in Hugging Face's generation_config.json; its sampling values are the defaults.
        threads: of steps on a CPU, see `make_decoder`.

        Raises ValueError where the tokenizer has more tokens than the embedding has rows.
        """
        if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model's embedding {model.config.vocab_size} "
                "rows; expected at least as many rows"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.generation_config = dict(generation_config or {})
        self.name = name
        self.threads = threads

    @property
    def device(self) -> torch.device:
        return self.model.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embedding.weight.dtype

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together."""
        return self.model.config.context_length

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a text."""
        given = self.generation_config.get("eos_token_id")
        ids = {given} if isinstance(given, int) else set(given or ())
        return frozenset(ids) | (self.tokenizer.eos_ids if self.tokenizer is not None else frozenset())

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits of every position. ids: (B, T) int64 on any device. Returns (B, T, V) on the model's.

        Raises ValueError for another shape or dtype, ids outside [0, V), or more tokens than the context holds.
        """
        if ids.ndim != 2 or ids.dtype != torch.int64 or ids.numel() == 0:
            raise ValueError(
                f"ids have shape {tuple(ids.shape)} and dtype {ids.dtype}; expected (B, T) int64, not empty"
            )
        self._check_ids(int(ids.min()), int(ids.max()))
        return self.model(ids.to(self.device))

    def _check_ids(self, low: int, high: int) -> None:
        V = self.model.config.vocab_size
        if low < 0 or high >= V:
            raise ValueError(f"token ids must lie in [0, {V}); got {low if low < 0 else high}")

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: text, or ids that are only checked. Raises ValueError for an empty or bad one."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"{self.name or 'this model'} has no tokenizer; expected the prompt as token ids")
            if not prompt:
                raise ValueError("the prompt is empty; expected some text")
            ids = self.tokenizer.encode(prompt)
        else:
            ids = [int(i) for i in prompt]
        if not ids:
            raise ValueError("the prompt has no tokens; expected at least one")
        self._check_ids(min(ids), max(ids))
        return ids

    @overload
    def generate(self, prompt: Prompt, *, stream: Literal[True], **options: Any) -> TextStream: ...
    @overload
    def generate(self, prompt: str, *, stream: Literal[False] = ..., **options: Any) -> Generation: ...
    @overload
    def generate(
        self, prompt: Prompt | Sequence[Prompt], *, stream: Literal[False] = ..., **options: Any
    ) -> Generation | list[Generation]: ...

    def generate(  # type: ignore[misc]  # the overloads are for callers: what comes back depends on stream and prompt
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int | None = 128,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        num_samples: int = 1,
        stream: bool = False,
        decoder: Decoder | None = None,
    ) -> Generation | list[Generation] | TextStream:
        """Continue a prompt, or each of several.

        prompt: text, token ids, or a list of either; each of several prompts gets what it would get alone.
        max_new_tokens: at most so many; None for as many as the context holds.
        temperature, top_k, top_p, min_p, repetition_penalty: see `kernels.sample`. Those not given come from the
        model's generation_config where that asks for sampling, else the temperature is 0, which is greedy.
        seed: repeats a text exactly; drawn at random where not given, see `Generation.seed`.
        stop: strings that end the text; they are not part of it.
        logprobs: record the log-probability of each token and of this many likeliest ones.
        num_samples: so many continuations of a prompt, each from a random stream of its own.
        stream: return a `TextStream` that yields text as it comes; for one prompt and one sample.
        decoder: one that was used before, for a prompt that begins with tokens it has read already.

        Returns a Generation for one prompt and one sample, else a list of them, the samples of a prompt side by side.
        Raises ValueError for whatever makes no sense, and for a prompt that leaves no room in the context.
        """
        single = isinstance(prompt, str) or not any(isinstance(p, str | Sequence) for p in prompt)
        prompts = [self.encode(p) for p in ([prompt] if single else prompt)]  # type: ignore[arg-type]
        if not prompts:
            raise ValueError("there are no prompts; expected at least one")
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; expected 1 or more")
        if stream and not (single and num_samples == 1):
            raise ValueError("stream=True takes one prompt and one sample")
        if logprobs is not None and not 0 <= logprobs <= self.model.config.vocab_size:
            raise ValueError(f"logprobs is {logprobs}; expected 0 to {self.model.config.vocab_size}")
        stops = [stop] if isinstance(stop, str) else list(stop)
        if stops and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this model has none")
        params = self._sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        context = self.context_length if decoder is None else min(decoder.capacity, self.context_length)
        sequences = [_sequence(ids, max_new_tokens, context) for ids in prompts for _ in range(num_samples)]
        if decoder is None:
            capacity = max(len(s.prompt) + s.limit for s in sequences)
            decoder = make_decoder(self.model, len(sequences), capacity, threads=self.threads)
        streams = list(range(num_samples)) * len(prompts)
        sampler = Sampler(params, streams, self.model.config.vocab_size, self.device)
        batch = Batch(
            self.model,
            self.tokenizer,
            sequences,
            decoder,
            sampler,
            eos_ids=self.eos_ids,
            stops=stops,
            logprobs=logprobs,
        )
        if stream:
            return TextStream(batch.run(), batch)
        for _ in batch.run():
            pass
        results = batch.results()
        return results[0] if single and num_samples == 1 else results

    def _sampling(self, **given: Any) -> SamplingParams:
        """Explicit values over the model's own; a value given where sampling was not asked for turns it on."""
        defaults: dict[str, Any] = {}
        if self.generation_config.get("do_sample"):
            names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
            defaults = {k: self.generation_config[k] for k in names if self.generation_config.get(k) is not None}
            defaults.setdefault("temperature", 1.0)
        return SamplingParams(**{**defaults, **{k: v for k, v in given.items() if v is not None}})

    def save(self, directory: str | Path) -> None:
        """Write a Hugging Face directory, whole or not at all. Raises ValueError where it is there already."""
        with new_directory(Path(directory)) as folder:
            save_checkpoint(self.model, folder, tokenizer=self.tokenizer, generation_config=self.generation_config)


def _sequence(ids: list[int], max_new_tokens: int | None, context: int) -> TokenSequence:
    """context: tokens of prompt and answer together."""
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected 1 or more")
    room = context - len(ids)
    if room < 1:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, and the context is {context}; expected at most {context - 1}"
        )
    if max_new_tokens is None or max_new_tokens > room:
        return TokenSequence(ids, room, FinishReason.CONTEXT_LIMIT)
    return TokenSequence(ids, max_new_tokens, FinishReason.MAX_NEW_TOKENS)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load(
    name: str | Path = "smollm2-135m-instruct",
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    threads: int | None = None,
    offline: bool = False,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> LanguageModel:
    """A model by name or path, ready to generate.

    name: a Hugging Face directory, a .gguf file, a name that `fusedlm models` lists, or owner/name on the Hub.
    device: "auto" is the GPU where there is one, else the CPU. dtype: "auto" is bfloat16 on a GPU (float16 on one
    older than Ampere) and float32 on a CPU; else float32, bfloat16, float16 or float64.
    quantize: "int8" keeps matrices in 8 bits and all else in float32, on a CPU (see `models.quantized`); None, the
    weights in dtype.
    threads: of steps on a CPU; by default as many as there are cores that this process may use.
    offline: never use the network. cache_dir: where downloads go. progress: show them.
    Raises ValueError for a name, device, dtype or quantization that does not exist and for a checkpoint that is
    damaged or not supported; nothing of such a file is used.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; expected 1 or more")
    where = resolve_device(device)
    as_dtype = resolve_dtype(dtype, where)
    check_quantization(quantize, where, as_dtype)
    checkpoint = load_checkpoint(
        name,
        dtype=as_dtype if quantize is None else torch.int8,
        device=where,
        offline=offline,
        cache_dir=None if cache_dir is None else Path(cache_dir),
        progress=progress,
    )
    return LanguageModel(
        checkpoint.model,
        checkpoint.tokenizer,
        generation_config=checkpoint.generation_config,
        name=str(name),
        threads=threads,
    )


def check_quantization(quantize: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError for a quantization that does not exist, or does not on this device or beside this dtype."""
    if quantize not in (None, "int8"):
        raise ValueError(f"unknown quantization {quantize!r}; expected None or 'int8'")
    if quantize is not None and device.type != "cpu":
        raise ValueError(f"quantize={quantize!r} is for a CPU, and the device is {device}; expected device='cpu'")
    if quantize is not None and dtype != torch.float32:
        raise ValueError(f"quantize={quantize!r} computes in float32, and the dtype is {dtype}; expected 'auto'")


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of a name, "auto" included. Raises ValueError for one that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used here; expected auto, cpu or cuda ({error})") from error
    if resolved.type == "meta":
        raise ValueError("device 'meta' holds no data; expected auto, cpu or cuda")
    return resolved


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of a name, "auto" included. Raises ValueError for another."""
    if dtype == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    resolved = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in DTYPES.values():
        raise ValueError(f"unknown dtype {dtype!r}; expected auto, {', '.join(DTYPES)}")
    return resolved
