"""`fusedlm plan`: what training a model on a GPU takes. Nothing runs on a GPU."""

import difflib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from fusedlm.planner import Plan


def plan(
    preset: Annotated[str, typer.Option(help="A model's sizes: gpt2, gpt2-xl, llama-3.2-1b ...")],
    gpu: Annotated[str, typer.Option(help="h100, a100, l4, rtx4090 ...; auto is the one that is here.")] = "auto",
    batch: Annotated[
        int | None, typer.Option(help="Sequences a GPU takes at once.", show_default="as many as fit")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of each.", show_default="the model's")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, tf32, bf16, fp16 or fp8.")] = "bf16",
    masters: Annotated[bool, typer.Option(help="Keep fp32 masters of 16-bit weights.")] = True,
    grad_dtype: Annotated[
        str, typer.Option(help="Of gradients: same (as the weights) or fp32; those of fp16 always are fp32.")
    ] = "same",
    state_dtype: Annotated[str, typer.Option(help="Of the optimizer's moments: fp32 or bf16.")] = "fp32",
    dropout: Annotated[bool, typer.Option("--dropout", help="There is dropout.")] = False,
    recompute: Annotated[
        str, typer.Option(help="What the backward pass computes anew: none, cheap (norms, GELU, SwiGLU) or blocks.")
    ] = "none",
    accumulate: Annotated[bool, typer.Option("--accumulate", help="Gradients of several batches are summed.")] = False,
    gpus: Annotated[int, typer.Option(help="Weights, gradients and states are divided among so many.")] = 1,
    reshard: Annotated[
        bool,
        typer.Option(help="They let go of weights between forward and backward pass (ZeRO stage 3)."),
    ] = True,
    direct: Annotated[
        bool, typer.Option(help="They are of one host and write to each other's memory (`parallel.direct`).")
    ] = True,
    mfu: Annotated[float, typer.Option(help="The share of the peak that is reached: an assumption.")] = 0.4,
    tokens: Annotated[float | None, typer.Option(help="To train on.", show_default="20 a parameter")] = None,
    price: Annotated[float | None, typer.Option(help="Of one GPU for an hour, in any currency.")] = None,
    headroom: Annotated[float, typer.Option(help="The share of the memory that is left free.")] = 0.1,
    plot: Annotated[Path | None, typer.Option(help="Draw memory over context length into a file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: bytes, operations, seconds.")] = False,
) -> None:
    """Say what training a model takes: parameters, operations, memory, time and cost."""
    from fusedlm.hardware import detect
    from fusedlm.models import PRESETS
    from fusedlm.planner import make_plan

    if preset not in PRESETS:
        like = difflib.get_close_matches(preset, PRESETS)
        expected = f"did you mean {' or '.join(like)}?" if like else f"expected one of {', '.join(PRESETS)}"
        raise ValueError(f"unknown preset {preset!r}; {expected}")
    found = detect() if gpu == "auto" else gpu
    if found is None:
        raise ValueError("there is no GPU here; expected --gpu with a name, h100 for example")
    options: dict[str, Any] = {
        "batch": batch,
        "context": context,
        "mfu": mfu,
        "tokens": tokens,
        "price": price,
        "headroom": headroom,
        "dtype": dtype,
        "masters": masters,
        "grad_dtype": grad_dtype,
        "state_dtype": state_dtype,
        "dropout": dropout,
        "recompute": recompute,
        "accumulate": accumulate,
        "gpus": gpus,
        "reshard": reshard,
        "direct": direct,
    }
    planned = make_plan(PRESETS[preset], gpu=found, **options)
    if plot is not None:
        from fusedlm.planner.plot import save_memory_figure

        save_memory_figure(planned, preset, plot)
    if as_json:
        typer.echo(json.dumps(_as_json(preset, planned), indent=2))
    else:
        _print(preset, planned)


def _as_json(preset: str, plan: "Plan") -> dict[str, Any]:
    return {
        "preset": preset,
        "gpu": {**asdict(plan.gpu), "peak_flops": plan.gpu.peak(plan.training.dtype)},
        "training": asdict(plan.training),
        "parameters": {**asdict(plan.parameters), "total": plan.parameters.total},
        "flops_per_token": {
            **asdict(plan.flops),
            "forward": plan.flops.forward,
            "backward": plan.flops.backward,
            "total": plan.flops.total,
        },
        "memory": {**plan.memory.parts, "total": plan.memory.total, "moment": plan.memory.moment},
        "activations": dict(plan.memory.activations),
        "memory_most": dict(plan.memory.most),
        "memory_limit": plan.limit,
        "fits": plan.fits,
        "largest_batch": plan.largest_batch,
        "mfu": plan.mfu,
        "tokens_per_second": plan.tokens_per_second,
        "optimal_tokens": plan.optimal_tokens,
        "fitted_tokens": plan.fitted_tokens,
        "tokens": plan.tokens,
        "seconds": plan.seconds,
        "cost": plan.cost,
    }


def _print(preset: str, plan: "Plan") -> None:
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
    training, memory, flops = plan.training, plan.memory, plan.flops
    many = f"{training.gpus} x " if training.gpus > 1 else ""
    console.print(
        f"{preset} on {many}{plan.gpu.name}, {training.dtype}: {training.batch} sequences of {training.context:,} "
        f"tokens a GPU, recompute {training.recompute}\n",
        soft_wrap=True,
    )
    counts = {name: f"{count:,}" for name, count in asdict(plan.parameters).items() if count}
    console.print(_table("parameters", {**counts, "total": f"{plan.parameters.total:,}"}))
    products = {name: _short(value) for name, value in asdict(flops).items()}
    sums = {"forward": _short(flops.forward), "backward": _short(flops.backward), "total": _short(flops.total)}
    console.print(_table("operations a token", products | sums))
    rows = {}
    for part, size in memory.parts.items():
        if memory.most[part]:
            rows[part] = (_gib(size), _gib(memory.most[part]))
        if part == "activations":
            rows |= {f"  {kind}": (_gib(size), "") for kind, size in memory.activations.items()}
    heads = {"": (f"at the peak ({memory.moment})", "at most, ever")}
    console.print(_table("memory a GPU, GiB", {**heads, **rows, "total": (_gib(memory.total), "")}))

    room = f"{plan.limit / 2**30:.1f} of {plan.gpu.memory / 2**30:.1f} GiB"
    largest = f"{plan.largest_batch:,} sequences fit a GPU" if plan.largest_batch else "not one sequence fits a GPU"
    lines = [
        f"{'fits' if plan.fits else 'DOES NOT FIT'} into {room}; at most {largest}",
        f"{plan.tokens_per_second:,.0f} tokens/s at {plan.mfu:.0%} of {_short(plan.gpu.peak(training.dtype))}FLOP/s"
        f"{f' x {training.gpus}' if training.gpus > 1 else ''}",
        f"compute-optimal: {_short(plan.optimal_tokens)} tokens (20 a parameter; {_short(plan.fitted_tokens)} by the "
        "fitted loss)",
        f"{_short(plan.tokens)} tokens: {_duration(plan.seconds)}"
        + ("" if plan.cost is None else f", costs {plan.cost:,.2f}"),
    ]
    for line in lines:
        console.print(line, soft_wrap=True)


def _table(title: str, rows: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=False)
    table.add_column(min_width=12)
    for _ in range(2):
        table.add_column(justify="right", min_width=12)
    for name, values in rows.items():
        table.add_row(f"  {name}", *((values,) if isinstance(values, str) else values))
    table.add_row("")
    return table


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _short(value: float) -> str:
    """2.49 B, 989 T."""
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g} "


def _duration(seconds: float) -> str:
    for unit, scale in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= scale:
            return f"{seconds / scale:.1f} {unit}"
    return f"{seconds:.1f} seconds"
