"""`fusedlm train`: from text to a model, in a folder that holds all of the run."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusedlm.cli import options

if TYPE_CHECKING:
    from fusedlm.models import DecoderModel
    from fusedlm.tokenizer.interface import Tokenizer
    from fusedlm.training.config import RunConfig


def train(
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="A file, a folder, a prepared dataset or a named set; may be given several times."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="shakespeare-char, gpt2, llama-3.2-1b ...", show_default="python-char"),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file with settings.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="A setting, as training.lr=3e-4; may be given several times.")
    ] = None,
    init: Annotated[str | None, typer.Option(help="Begin with a model's weights: a name or a path.")] = None,
    lora: Annotated[int | None, typer.Option(help="Train low-rank additions of this rank, and nothing else.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", "-t", help="characters, a folder, or a model's name.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="As --set training.steps.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The run's folder.", show_default="runs/PRESET-N")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    device: options.Device = "auto",
    profile: Annotated[Path | None, typer.Option(help="Write a trace and a table of kernels of a few steps.")] = None,
    offline: options.Offline = False,
    cache_dir: options.CacheDir = None,
) -> None:
    """Train a model. With nothing else: a small Llama on Python's own library, character by character, in a minute."""
    given = (
        *(("--data", data), ("--preset", preset), ("--config", config), ("--init", init), ("--out", out)),
        *(("--lora", lora), ("--tokenizer", tokenizer)),
    )
    if resume is not None and any(value for _, value in given):
        wrong = ", ".join(name for name, value in given if value)
        raise ValueError(f"{wrong} is given with --resume; a run goes on with its own settings, changed by --set alone")
    from fusedlm.training.config import make_config, override_config
    from fusedlm.training.presets import DEFAULT
    from fusedlm.training.progress import TerminalProgress
    from fusedlm.training.run import read_run
    from fusedlm.training.run import train as run

    overrides = [*(sets or []), *([f"training.steps={steps}"] if steps is not None else [])]
    if resume is not None:
        folder = resume
        chosen = override_config(read_run(folder), overrides)
    else:
        name = preset or (None if config is not None else _default_preset(init, lora))
        sections: dict[str, dict[str, Any]] = {
            "data": _given(sources=data, tokenizer=tokenizer),
            "model": _given(init=init),
            "lora": _given(rank=lora),
        }
        if data and name == DEFAULT and preset is None:  # whose own text is Python's
            sections["evaluation"] = {"prompt": "\n"}
        chosen = make_config(name, config, overrides, **sections)
        if chosen.lora.rank and chosen.model.init is None:
            raise ValueError(f"lora.rank is {chosen.lora.rank}, and there is no --init; expected a model to add to")
        folder = out or _new_folder(chosen)
    result = run(
        chosen,
        folder,
        resume=resume is not None,
        device=device,
        observers=[TerminalProgress()],
        sample=_sampler(chosen),
        offline=offline,
        cache_dir=cache_dir,
        profile=profile,
    )
    if not result.first:  # one of torchrun's other processes
        return
    _draw(folder)
    if result.interrupted:
        typer.echo(f"stopped at step {result.steps:,}; go on with: fusedlm train --resume {folder}", err=True)
        sys.exit(128 + result.interrupted)
    best = "" if result.best_val_loss is None else f", best validation loss {result.best_val_loss:.4f}"
    typer.echo(f"{folder}: {result.steps:,} steps{best}")
    typer.echo(f"try it: fusedlm generate {_quoted(chosen.evaluation.prompt)} --model {folder}")


def _default_preset(init: str | None, lora: int | None) -> str:
    from fusedlm.training.presets import DEFAULT

    return DEFAULT if init is None else "finetune-lora" if lora else "finetune"


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _new_folder(config: "RunConfig") -> Path:
    """runs/NAME-1, or the first number that is free."""
    name = config.preset or "run"
    numbers = range(1, 1_000_000)
    return next(path for path in (Path("runs") / f"{name}-{i}" for i in numbers) if not path.exists())


def _sampler(config: "RunConfig") -> Any:
    def sample(model: "DecoderModel", tokenizer: "Tokenizer", tokens: int) -> str:
        from fusedlm.inference.decoder import EagerDecoder
        from fusedlm.inference.language_model import LanguageModel

        prompt = config.evaluation.prompt
        try:
            writer = LanguageModel(model, tokenizer)
            read = len(writer.encode(prompt))
            n = max(min(tokens, model.config.context_length - read), 1)
            decoder = EagerDecoder(model, 1, read + n)  # the model as it trains: nothing is compiled for it
            options: dict[str, Any] = {"temperature": config.evaluation.temperature, "seed": 1, "decoder": decoder}
            text = writer.generate(prompt, max_new_tokens=n, **options)
        except ValueError as error:  # a prompt that the tokenizer cannot spell is no reason to stop
            return f"(no sample: {error})"
        return prompt + text.text

    return sample


def _draw(folder: Path) -> None:
    from fusedlm.training.curve import save_curve
    from fusedlm.training.metrics import METRICS_FILE, read_metrics

    try:
        save_curve(read_metrics(folder / METRICS_FILE), folder / "loss.png", str(folder))
    except ValueError as error:
        typer.echo(str(error), err=True)


def _quoted(text: str) -> str:
    return "'" + text.replace("\n", " ").strip().replace("'", "'\\''") + "'" if text.strip() else "'The '"
