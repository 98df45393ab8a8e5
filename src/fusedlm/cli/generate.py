"""`fusedlm generate`: continue a prompt, streamed, and say how fast it was."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusedlm.cli import options
from fusedlm.cli.output import say_what_takes_long, speed_line

if TYPE_CHECKING:
    from fusedlm.inference.generation import Generation
    from fusedlm.inference.language_model import LanguageModel


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to continue.", show_default=False)] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Read the prompt from a file (- for standard input).")
    ] = None,
    model: options.Model = "smollm2-135m-instruct",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="At most so many tokens.")] = 128,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    num_samples: Annotated[int, typer.Option(help="So many continuations, each a different one.")] = 1,
    logprobs: Annotated[int | None, typer.Option(help="With --json: log-probabilities, and so many likeliest.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when done.")] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    threads: options.Threads = None,
    kernels: options.Kernels = "auto",
    offline: options.Offline = False,
    cache_dir: options.CacheDir = None,
) -> None:
    """Continue a prompt with text from a model, streamed, and say how fast it was."""
    text = _prompt(prompt, prompt_file)
    if logprobs is not None and not as_json:
        raise ValueError("--logprobs is given without --json; expected both")
    from fusedlm import load
    from fusedlm.kernels import backend

    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop or (),
    }
    precision: dict[str, Any] = {"dtype": dtype, "quantize": quantize}
    language_model = load(model, device=device, threads=threads, offline=offline, cache_dir=cache_dir, **precision)
    with backend(kernels):
        say_what_takes_long(language_model)
        if as_json:
            results = language_model.generate([text], num_samples=num_samples, logprobs=logprobs, **settings)
            assert isinstance(results, list)
            _print_json(text, language_model, results)
        elif num_samples != 1:
            results = language_model.generate([text], num_samples=num_samples, **settings)
            assert isinstance(results, list)
            for i, result in enumerate(results, 1):
                typer.echo(f"--- {i} of {num_samples} ({result.finish_reason})\n{text}{result.text}")
            _report(results[0], language_model)
        else:
            _stream(text, language_model, settings)


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        given = "neither" if prompt is None else "both"
        raise ValueError(f"{given} of PROMPT and --prompt-file given; expected one of them")
    if prompt_file is None:
        assert prompt is not None
        data = prompt.encode("utf-8", "surrogateescape")  # as the shell gave it
        source = "the prompt"
    else:
        data = sys.stdin.buffer.read() if str(prompt_file) == "-" else prompt_file.read_bytes()
        source = "standard input" if str(prompt_file) == "-" else str(prompt_file)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not valid UTF-8: byte {data[error.start]:#04x} at {error.start}") from None


def _stream(text: str, model: "LanguageModel", settings: dict[str, Any]) -> None:
    stream = model.generate(text, stream=True, **settings)
    shown = typer.style(text, bold=True)  # with the first piece: an error in reading the prompt stands alone
    try:
        for piece in stream:
            typer.echo(shown + piece, nl=False)
            shown = ""
    except KeyboardInterrupt:
        result = stream.stop()
        typer.echo()
        _report(result, model)
        raise
    typer.echo(shown)
    _report(stream.result, model)


def _report(result: "Generation", model: "LanguageModel") -> None:
    from fusedlm.hardware import measure_bandwidth

    speed = speed_line(result.stats, measure_bandwidth(model.device))
    reason = f"stop string {result.stop!r}" if result.stop is not None else str(result.finish_reason).replace("_", " ")
    sampled = "" if result.seed is None else f", seed {result.seed}"
    typer.echo(f"\n[ended by: {reason}{sampled}] {speed}", err=True)


def _print_json(text: str, model: "LanguageModel", results: list["Generation"]) -> None:
    samples = []
    for r in results:
        sample = dataclasses.asdict(r)
        stats = sample.pop("stats")
        stats["median_token_seconds"] = r.stats.median_token_seconds
        stats["tokens_per_second"] = r.stats.tokens_per_second
        samples.append({**sample, "stats": stats})
    typer.echo(
        json.dumps(
            {
                "model": model.name,
                "device": str(model.device),
                "dtype": str(model.dtype).removeprefix("torch."),
                "prompt": text,
                "samples": samples,
            },
            ensure_ascii=False,
        )
    )
