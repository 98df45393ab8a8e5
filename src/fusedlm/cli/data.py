"""`fusedlm data`: make datasets of tokens, see what is in one, check that it is whole."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from fusedlm.cli import options

if TYPE_CHECKING:
    from fusedlm.data.documents import Source
    from fusedlm.data.format import Manifest
    from fusedlm.data.prepare import Progress

data = typer.Typer(no_args_is_help=True, help="Make datasets of tokens, look into them, check them.")

_HUB = "hf:"

Folder = Annotated[Path, typer.Argument(help="A dataset's folder.", show_default=False)]


@data.command()
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files and folders (text, JSONL, parquet; .gz), hf:owner/name for a dataset of the Hub, or one of "
            "python, python-packages, tinyshakespeare, tinystories, openwebtext, fineweb-edu.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The dataset's folder.", show_default="data/<name>")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            "-t",
            help="A folder, a .gguf file, a model's name, owner/name on the Hub, or characters.",
            show_default="gpt2; characters for python and tinyshakespeare",
        ),
    ] = None,
    val: Annotated[list[Path] | None, typer.Option(help="Files and folders for the split val.")] = None,
    val_fraction: Annotated[
        float | None,
        typer.Option(help="How much goes to the split val.", show_default="0.1 of a single text, 0.01 of documents"),
    ] = None,
    split: Annotated[
        Literal["auto", "end", "documents"],
        typer.Option(help="Take val from the end of a single text, or take whole documents."),
    ] = "auto",
    share: Annotated[float, typer.Option(help="How many of the documents to take, chosen by a hash.")] = 1.0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Documents are chats, lists of messages; answers alone are trained on.")
    ] = False,
    key: Annotated[
        str | None, typer.Option(help="Of a row, where the document is.", show_default="text; messages with --chat")
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help="Between documents in a text file; \\n is a line end.", show_default="none")
    ] = None,
    glob: Annotated[str | None, typer.Option(help="Which files of a folder to take, as '*.py'.")] = None,
    hub_config: Annotated[str | None, typer.Option(help="Of a dataset of the Hub: its configuration.")] = None,
    hub_split: Annotated[str, typer.Option(help="Of a dataset of the Hub: its split.")] = "train",
    revision: Annotated[str | None, typer.Option(help="Of a dataset of the Hub: a commit, branch or tag.")] = None,
    file: Annotated[Path | None, typer.Option(help="A local copy of what tinyshakespeare would download.")] = None,
    shard_tokens: Annotated[int, typer.Option(help="Tokens of a shard.")] = 100_000_000,
    workers: Annotated[int | None, typer.Option(help="Processes.", show_default="the cores there are")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the dataset that is there first.")] = False,
    offline: options.Offline = False,
    cache_dir: options.CacheDir = None,
) -> None:
    """Make a dataset of tokens. Stopped, it goes on where it was when the same command is given again."""
    from fusedlm.data.documents import find_sources, unescaped
    from fusedlm.data.prepare import prepare as make
    from fusedlm.data.recipe import CHARACTERS
    from fusedlm.data.sets import NAMED_SETS
    from fusedlm.data.tokenizers import find_tokenizer

    key = key or ("messages" if chat else "text")
    if separator is not None:
        separator = unescaped(separator)
    only = sources[0] if len(sources) == 1 else None
    named = NAMED_SETS.get(only) if only is not None and not Path(only).exists() else None
    if output is None:
        if only is None:
            raise ValueError(f"there are {len(sources)} sources and no --output; expected the dataset's folder")
        output = Path("data") / Path(only.removeprefix(_HUB)).name.split(".")[0]
    if named is not None:
        tokenizer = tokenizer or (CHARACTERS if named.characters else "gpt2")
        val_fraction = named.val_fraction if val_fraction is None else val_fraction
    found: list[Source] = []
    for source in sources:
        found += _sources(source, key, separator, glob, (hub_config, hub_split, revision), file, cache_dir, offline)
    found += find_sources(val or [], key=key, separator=separator, glob=glob, split="val")
    tokenizer = tokenizer or "gpt2"
    chosen = CHARACTERS if tokenizer == CHARACTERS else find_tokenizer(tokenizer, offline=offline, cache_dir=cache_dir)
    with _bar(f"preparing {output}") as show:
        manifest = make(
            found,
            output,
            chosen,
            kind="chat" if chat else "text",
            val_fraction=val_fraction,
            split=split,
            share=share,
            shard_tokens=shard_tokens,
            workers=workers,
            overwrite=overwrite,
            progress=lambda progress: show(progress.done, progress.total, _counts(progress)),
        )
    _print(output, manifest)


@data.command()
def info(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, all that is known of it.")] = False,
) -> None:
    """Show what is in a dataset. Sizes are checked; `verify` reads everything."""
    from dataclasses import asdict

    from fusedlm.data.dataset import Dataset

    dataset = Dataset(folder)
    if as_json:
        typer.echo(json.dumps(asdict(dataset.manifest) | {"fingerprint": dataset.fingerprint}, indent=2))
    else:
        _print(folder, dataset.manifest)


@data.command()
def verify(folder: Folder) -> None:
    """Read a whole dataset and compare it with the checksums it was written with."""
    from fusedlm.data.dataset import Dataset

    dataset = Dataset(folder)
    with _bar(f"verifying {folder}") as show:
        dataset.verify(lambda done, total: show(done, total, ""))
    typer.echo(f"{folder} is whole: fingerprint {dataset.fingerprint}")


def _sources(
    source: str,
    key: str,
    separator: str | None,
    glob: str | None,
    hub: tuple[str | None, str, str | None],
    file: Path | None,
    cache_dir: Path | None,
    offline: bool,
) -> "list[Source]":
    from fusedlm.data.documents import find_sources
    from fusedlm.data.hub import HubDataset, pinned
    from fusedlm.data.sets import sources_of

    path = Path(source).expanduser()
    if path.exists():
        return find_sources([path], key=key, separator=separator, glob=glob)
    if source.startswith(_HUB):
        if offline:
            raise ValueError(f"{source} is streamed from the Hugging Face Hub, and --offline is set")
        config, hub_split, revision = hub
        return [pinned(HubDataset(source.removeprefix(_HUB), config, hub_split, key, revision))]
    return sources_of(source, file=file, cache_dir=cache_dir, offline=offline)


def _counts(progress: "Progress") -> str:
    return f"{progress.documents:,} documents, {progress.tokens:,} tokens"


def _print(folder: Path, manifest: "Manifest") -> None:
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
    table = Table(box=None, pad_edge=False)
    table.add_column("split")
    for name in ("tokens", "documents", "shards", "MB"):
        table.add_column(name, justify="right")
    for name, shards in manifest.splits.items():
        size = sum(facts.bytes for shard in shards for facts in shard.files.values())
        counts = (sum(shard.tokens for shard in shards), sum(shard.documents for shard in shards), len(shards))
        table.add_row(name, *(f"{count:,}" for count in counts), f"{size / 1e6:.1f}")
    console.print(table)
    lines = [
        f"{folder}: {manifest.kind}, {manifest.vocab_size:,} ids as {manifest.dtype}",
        f"fingerprint {manifest.fingerprint}",
    ]
    if "train" not in manifest.splits:
        lines.append("There is no split train: --val-fraction 0, or more documents, would make one.")
    if "val" not in manifest.splits:
        lines.append("There is no split val: a larger --val-fraction or --val makes one.")
    if manifest.left_out:
        chats = manifest.kind == "chat"
        what = "chats without an answer" if chats else "documents, or a split's part of one, without text"
        lines.append(f"{manifest.left_out:,} {what} were left out.")
    for line in lines:
        console.print(line, soft_wrap=True)


@contextmanager
def _bar(what: str) -> "Iterator[Callable[[int, int | None, str], None]]":
    """A progress bar on a terminal, one line elsewhere; what it gives takes bytes done, bytes in all, and a remark."""
    if sys.stderr is None or not sys.stderr.isatty():
        typer.echo(what, err=True)
        yield lambda done, total, remark: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TextColumn("{task.fields[remark]}"))
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, remark="")
        yield lambda done, total, remark: bar.update(task, completed=done, total=total, remark=remark)
