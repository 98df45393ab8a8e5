"""`fusedlm models`: the models that have a name, and which of them are on this disk."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

if TYPE_CHECKING:
    from fusedlm.checkpoint.sources import NamedModel


def models(
    cache_dir: Annotated[
        Path | None, typer.Option("--cache-dir", help="Where models that are not on the Hugging Face Hub are kept.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")] = False,
) -> None:
    """List the models that can be asked for by name, and where those on this disk are."""
    from fusedlm.checkpoint.sources import NAMED

    rows = [_row(name, model, cache_dir) for name, model in NAMED.items()]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        _print(rows)


def _row(name: str, model: "NamedModel", cache_dir: Path | None) -> dict[str, Any]:
    from fusedlm.checkpoint.sources import DEFAULT_MODEL, on_disk
    from fusedlm.checkpoint.wheel import WheelFile

    size, is_exact = model.download_size()
    source = model.source
    path = on_disk(model, cache_dir=cache_dir)
    return {
        "name": name,
        "default": name == DEFAULT_MODEL,
        "parameters": model.count_parameters(),
        "download_bytes": size,
        "download_bytes_exact": is_exact,
        "licence": model.licence,
        "gated": model.gated,
        "source": f"{source.requirement} (PyPI)" if isinstance(source, WheelFile) else source.name,
        "path": None if path is None else str(path),
    }


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("name", no_wrap=True)
    table.add_column("params", justify="right", no_wrap=True)
    table.add_column("download", justify="right", no_wrap=True)
    table.add_column("licence")
    table.add_column("source", overflow="fold")
    for row in rows:
        table.add_row(
            "*" if row["path"] else "",
            row["name"],
            _count(row["parameters"]),
            ("" if row["download_bytes_exact"] else "~") + decimal(row["download_bytes"]),
            row["licence"] + (" (gated)" if row["gated"] else ""),
            row["source"],
        )
    from fusedlm.checkpoint.sources import DEFAULT_MODEL

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
    console.print(table)
    # Below the table, where a path is not cut to a column's width and can be copied.
    on_disk = [f"  {row['name']}: {row['path']}" for row in rows if row["path"]]
    for line in (
        "",
        *(["* on this disk:", *on_disk] if on_disk else ["None of them is on this disk yet."]),
        "~ about: the size of the weights by arithmetic.",
        "gated: accept the licence at https://huggingface.co/<source>, then log in with `hf auth login`.",
        f"{DEFAULT_MODEL} is the default. Any other owner/name of the Hugging Face Hub can be asked for, too.",
    ):
        console.print(line, soft_wrap=True)


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.0f} M"
