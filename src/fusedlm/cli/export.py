"""`fusedlm export`: a run's model as a Hugging Face directory."""

from pathlib import Path
from typing import Annotated

import typer

from fusedlm.cli import options


def export(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    output: Annotated[Path, typer.Argument(help="The folder to make.")],
    step: Annotated[
        int | None, typer.Option(help="Of which checkpoint.", show_default="the last one that is good")
    ] = None,
    masters: Annotated[
        bool, typer.Option("--masters", help="In float32: the optimizer's masters, where the run has them.")
    ] = False,
    offline: options.Offline = False,
    cache_dir: options.CacheDir = None,
) -> None:
    """Write the model of a run's checkpoint in Hugging Face's format, which transformers loads. LoRA is merged."""
    from fusedlm.checkpoint.config import GROUPED_GPT2, config_to_huggingface
    from fusedlm.checkpoint.load import new_directory, save_checkpoint
    from fusedlm.training.saved import saved_model

    def warn(text: str) -> None:
        typer.echo(f"{text}; an earlier checkpoint is tried", err=True)

    found = saved_model(run, step=step, masters=masters, warn=warn, offline=offline, cache_dir=cache_dir)
    with new_directory(output) as folder:
        save_checkpoint(found.model, folder, tokenizer=found.tokenizer)
    dtype = str(found.model.embedding.weight.dtype).removeprefix("torch.")
    if config_to_huggingface(found.model.config, found.model.embedding.weight.dtype)["model_type"] == GROUPED_GPT2:
        typer.echo("transformers has no GPT-2 with heads of such numbers or widths; fusedlm alone loads it", err=True)
    typer.echo(f"{output}: the model of step {found.step:,}, in {dtype}")
