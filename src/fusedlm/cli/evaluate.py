"""`fusedlm evaluate`: how well a model predicts a text."""

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from fusedlm.cli import options


def evaluate(
    data: Annotated[list[str], typer.Argument(help="Files, folders, named sets, or a prepared dataset.")],
    model: options.Model = "smollm2-135m-instruct",
    split: Annotated[
        str | None, typer.Option(help="Of a prepared dataset.", show_default="val where there is one")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens a row.", show_default="the model's, at most 1024")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at a time.")] = 8,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    offline: options.Offline = False,
    cache_dir: options.CacheDir = None,
) -> None:
    """Print a model's loss on a text: nats a token, perplexity, and bits per byte, which compares across tokenizers."""
    from fusedlm import load
    from fusedlm.training.config import DataConfig
    from fusedlm.training.datasets import open_dataset
    from fusedlm.training.saved import text_loss

    loaded = load(model, device=device, dtype=dtype, offline=offline, cache_dir=cache_dir)
    if loaded.tokenizer is None:
        raise ValueError(f"{model} has no tokenizer; expected one, to read the text with")
    with tempfile.TemporaryDirectory() as folder:
        described = DataConfig(sources=tuple(data), val_fraction=0.0)
        dataset = open_dataset(
            described, Path(folder), tokenizer=loaded.tokenizer, offline=offline, cache_dir=cache_dir
        )
        dataset.check_tokenizer(loaded.tokenizer, f"the tokenizer of {model}")
        chosen = split or ("val" if "val" in dataset.splits else "train")
        found = text_loss(loaded.model, dataset, chosen, context=context, batch_size=batch_size)
    evaluated = found.evaluated
    if as_json:
        values = {"loss": evaluated.loss, "perplexity": evaluated.perplexity, "bits_per_byte": found.bits_per_byte}
        typer.echo(json.dumps({"model": model, "split": chosen, "tokens": evaluated.tokens, **values}, indent=2))
        return
    typer.echo(
        f"loss {evaluated.loss:.4f} nats a token, perplexity {evaluated.perplexity:,.2f}, {found.bits_per_byte:.4f} "
        f"bits per byte, over {evaluated.tokens:,} tokens"
    )
