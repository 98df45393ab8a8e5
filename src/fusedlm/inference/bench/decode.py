"""Milliseconds a token and prompt tokens a second, ours and the peers', interleaved."""

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusedlm.checkpoint.sources import resolve
from fusedlm.inference.bench import peers
from fusedlm.inference.bench.runners import DecoderRunner, Runner, random_prompt
from fusedlm.inference.decoder import make_decoder
from fusedlm.inference.language_model import load
from fusedlm.models import PRESETS, DecoderModel, build_model
from fusedlm.models.quantized import Int8Weight

PRECISIONS = ("int8", "bfloat16", "float32")
GPT2_SHAPE = "gpt2-shape"  # GPT-2 124M with random weights: its speed needs no download
_PEER_TYPES = {"int8": ["Q8_0"], "bfloat16": ["BF16"], "float32": ["F32"]}


@dataclass(frozen=True)
class Setting:
    """prompt: tokens read before the steps that are timed. long_prompt: of the prompt whose reading is timed."""

    rounds: int = 5
    prompt: int = 64
    new_tokens: int = 128
    long_prompt: int = 512
    threads: int = 2


@dataclass(frozen=True)
class Row:
    """Times of one runner, medians over the rounds. token_rounds: the median of each."""

    setting: Setting

    model: str
    precision: str
    runner: str
    token_seconds: float
    prompt_tokens_per_second: float
    token_rounds: list[float] = field(repr=False)
    prompt_rounds: list[float] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench_model(name: str) -> tuple[DecoderModel, Path | None]:
    """The model of a name, in float32, and the GGUF file it came from."""
    if name == GPT2_SHAPE:
        model = build_model(PRESETS["gpt2"])
        model.init_weights(torch.Generator().manual_seed(0))
        return model.eval(), None
    path = resolve(name)
    return load(path, device="cpu").model, path if path.suffix == ".gguf" else None


def in_precision(model: DecoderModel, precision: str) -> DecoderModel:
    """The same model in another precision. Shares what need not change."""
    converted = build_model(model.config, device="meta").eval()
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if precision == "bfloat16":
            value = value.bfloat16()
        elif precision == "int8" and value.ndim == 2 and name != "positions.weight":
            value = Int8Weight.quantize(value)
        owner, _, leaf = name.rpartition(".")
        setattr(converted.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    return converted


def runners(
    name: str, model: DecoderModel, source: Path | None, precision: str, setting: Setting, folder: Path
) -> list[Runner]:
    """Ours and, where they are installed, the peers of one precision. folder: where their files are kept."""
    capacity = max(setting.prompt + setting.new_tokens, setting.long_prompt) + 1
    converted = in_precision(model, precision)
    found: list[Runner] = [DecoderRunner("fusedlm", make_decoder(converted, 1, capacity, threads=setting.threads))]
    if peers.llama_cpp() is not None:
        folder = folder / name.replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        files = {kind: peers.llama_file(folder, model, source, kind) for kind in _PEER_TYPES[precision]}
        if precision == "int8" and source is not None:
            files["own"] = source
        for kind, path in files.items():
            label = source.stem.rpartition(".")[2] if kind == "own" and source is not None else kind
            found.append(peers.LlamaCpp(f"llama.cpp {label}", path, setting.threads))
    if precision == "float32" and peers.installed("transformers"):
        found.append(peers.Transformers(model))
        if peers.can_compile():
            found.append(peers.Transformers(model, capacity, compiled=True))
    return found


def measure(found: Sequence[Runner], vocab_size: int, setting: Setting) -> dict[str, tuple[list[float], list[float]]]:
    """For each runner: the median seconds of a token in each round, and the seconds of reading the long prompt."""
    times: dict[str, tuple[list[float], list[float]]] = {r.name: ([], []) for r in found}
    for r in found:  # compiles, allocates, and brings files into memory
        r.step(r.read(random_prompt(setting.long_prompt, vocab_size)))
    for i in range(setting.rounds):
        prompt = random_prompt(setting.prompt, vocab_size, 2 * i + 1)
        long_prompt = random_prompt(setting.long_prompt, vocab_size, 2 * i + 2)
        for r in found:
            steps, reads = times[r.name]
            start = time.perf_counter()
            r.read(long_prompt)
            reads.append(time.perf_counter() - start)
            token = r.read(prompt)
            each = []
            for _ in range(setting.new_tokens):
                start = time.perf_counter()
                token = r.step(token)
                each.append(time.perf_counter() - start)
            steps.append(statistics.median(each))
    return times


def bench_decode(names: Iterable[str], precisions: Iterable[str], setting: Setting, folder: Path) -> Iterable[Row]:
    """Rows as they come: of every model, in every precision, ours and the peers'."""
    for name in names:
        model, source = bench_model(name)
        for precision in precisions:
            found = runners(name, model, source, precision, setting, folder)
            times = measure(found, model.config.vocab_size, setting)
            for runner in found:
                steps, reads = times[runner.name]
                yield Row(
                    setting=setting,
                    model=name,
                    precision=precision,
                    runner=runner.name,
                    token_seconds=statistics.median(steps),
                    prompt_tokens_per_second=setting.long_prompt / statistics.median(reads),
                    token_rounds=steps,
                    prompt_rounds=reads,
                )
                if isinstance(runner, peers.LlamaCpp):
                    runner.close()
