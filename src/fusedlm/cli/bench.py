"""`fusedlm bench`: how fast generation on this machine's CPU is, beside llama.cpp and transformers, and how good."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

bench = typer.Typer(help="Measure generation on a CPU, beside what else is installed.", no_args_is_help=True)

Json = Annotated[Path | None, typer.Option("--json", help="Put the results into this file, beside what is there.")]
Threads = Annotated[int | None, typer.Option(help="Of everybody.", show_default="the cores there are")]
Peers = Annotated[
    Path | None, typer.Option(help="Where llama.cpp's files are made and kept.", show_default="the user's cache")
]


@bench.command()
def decode(
    model: Annotated[list[str] | None, typer.Option("--model", "-m", help="May be given several times.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="int8, bfloat16 or float32; several times.")] = None,
    device: Annotated[str, typer.Option(help="cpu.")] = "cpu",
    rounds: Annotated[int, typer.Option(help="Everybody has a turn in each; medians count.")] = 5,
    prompt_tokens: Annotated[int, typer.Option(help="Read before the tokens that are timed.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Timed, one by one.")] = 128,
    long_prompt: Annotated[int, typer.Option(help="Tokens of a prompt whose reading is timed.")] = 512,
    threads: Threads = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="What each step from the plainest way on is worth.")] = False,
    as_json: Json = None,
    plot: Annotated[Path | None, typer.Option(help="Draw all results of the JSON file into this PNG.")] = None,
    peers_dir: Peers = None,
) -> None:
    """Milliseconds a token and prompt tokens a second: ours, llama.cpp's and transformers', interleaved."""
    if device != "cpu":
        raise ValueError(f"device is {device!r}; expected cpu")
    from fusedlm.inference.bench.decode import GPT2_SHAPE, PRECISIONS, Setting, bench_decode

    setting = Setting(rounds, prompt_tokens, new_tokens, long_prompt, threads or _cores())
    if unknown := set(precision or ()) - set(PRECISIONS):
        raise ValueError(f"unknown precision {unknown.pop()!r}; expected one of {', '.join(PRECISIONS)}")
    if ablate:
        from fusedlm.inference.bench.ablation import ablate as run

        steps = run(setting)
        for step in steps:
            typer.echo(f"{step.get('step') or 'GELU: ' + step['gelu']:<32}{step['token_seconds'] * 1e3:9.3f} ms/token")
        _save(as_json, {"ablation": steps})
        return
    results: list[dict[str, Any]] = []
    names = model or [GPT2_SHAPE, "smollm2-135m-instruct"]
    for row in bench_decode(names, precision or PRECISIONS, setting, _folder(peers_dir)):
        results.append(row.as_dict())
        typer.echo(
            f"{row.model:<24}{row.precision:<10}{row.runner:<24}{row.token_seconds * 1e3:8.2f} ms/token"
            f"{row.prompt_tokens_per_second:9.0f} prompt tokens/s"
        )
    everything = _save(as_json, {"decode": results})
    if plot is not None:
        from fusedlm.inference.bench.chart import draw

        draw(everything["decode"], plot)


@bench.command()
def busy(
    model: Annotated[str, typer.Option("--model", "-m")] = "smollm2-135m-instruct",
    processes: Annotated[list[int] | None, typer.Option(help="That compute meanwhile; several times.")] = None,
    rounds: Annotated[int, typer.Option(help="Everybody has a turn in each; the median counts.")] = 5,
    prompt_tokens: Annotated[int, typer.Option(help="Read before the tokens that are timed.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Timed together.")] = 32,
    threads: Threads = None,
    as_json: Json = None,
    peers_dir: Peers = None,
) -> None:
    """Milliseconds a token in 8 bits while other processes keep the cores busy: by default 0, 1, 2 and 4 of them."""
    from fusedlm.inference.bench.busy import measure_busy
    from fusedlm.inference.bench.decode import Setting

    setting = Setting(rounds, prompt_tokens, new_tokens, prompt_tokens, threads or _cores())
    rows = measure_busy(model, processes or [0, 1, 2, 4], setting, _folder(peers_dir))
    for row in rows:
        typer.echo(f"{row['runner']:<24}{row['busy']:>3} busy processes{row['token_seconds'] * 1e3:9.2f} ms/token")
    _save(as_json, {"busy": rows})


@bench.command()
def quality(
    text: Annotated[Path, typer.Argument(help="A text file, UTF-8.")],
    model: Annotated[str, typer.Option("--model", "-m")] = "smollm2-135m-instruct",
    tokens: Annotated[int, typer.Option(help="So many of the text's first.")] = 20_000,
    threads: Threads = None,
    as_json: Json = None,
    peers_dir: Peers = None,
) -> None:
    """What 8 bits cost: perplexity of a text, and the mean divergence from float32."""
    from fusedlm.inference.bench.quality import measure_quality

    rows = measure_quality(model, text.read_text(encoding="utf-8"), tokens, threads or _cores(), _folder(peers_dir))
    for row in rows:
        typer.echo(f"{row['runner']:<20} perplexity {row['perplexity']:8.3f}   mean KL {row['mean_kl']:.5f} nats")
    _save(as_json, {"quality": rows})


def _cores() -> int:
    from fusedlm.hardware import available_cores

    return available_cores()


def _folder(given: Path | None) -> Path:
    import platformdirs

    return given or Path(platformdirs.user_cache_dir("fusedlm")) / "peers"


def _save(path: Path | None, results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Put results into a file; a row of the same model, precision and runner is replaced. Returns all there is."""
    from fusedlm.inference.bench.machine import describe

    there: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}
    there["machine"] = describe()
    for kind, rows in results.items():
        new = {_key(row): row for row in rows}
        there[kind] = [new.pop(_key(row), row) for row in there.get(kind, [])] + list(new.values())
    if path is not None:
        path.write_text(json.dumps(there, indent=1) + "\n", encoding="utf-8")
    return there


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("model", "precision", "runner", "step", "gelu", "busy"))
