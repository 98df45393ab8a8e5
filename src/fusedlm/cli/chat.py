"""`fusedlm chat`: talk with a model. Ctrl-C stops the answer and not the program."""

import contextlib
from typing import Annotated, Any

import typer

from fusedlm.cli import options
from fusedlm.cli.output import say_what_takes_long, speed_line

HELP = """/help          this text
/reset         forget the conversation
/save FILE     write the conversation to a JSON file
/quit          leave (so does Ctrl-D)
Ctrl-C         stop the answer"""


def chat(
    model: options.Model = "smollm2-135m-instruct",
    system: Annotated[str | None, typer.Option(help="A system message.", show_default="the model's own")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", help="At most so many tokens an answer.")
    ] = None,
    context_length: Annotated[
        int, typer.Option(help="Tokens the conversation may take, at most what the model can.")
    ] = 8192,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    threads: options.Threads = None,
    kernels: options.Kernels = "auto",
    offline: options.Offline = False,
    cache_dir: options.CacheDir = None,
) -> None:
    """Talk with a model. /help lists the commands; Ctrl-C stops the answer, Ctrl-D leaves."""
    from fusedlm import ChatSession, load
    from fusedlm.hardware import measure_bandwidth
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
    session = ChatSession(language_model, system=system, context_length=context_length)
    bandwidth = measure_bandwidth(language_model.device)
    typer.echo(f"{language_model.name}: type a message, or /help", err=True)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() line editing and history, where the system has it
    with backend(kernels):
        say_what_takes_long(language_model)
        while True:
            try:
                line = _ask()
                if line is None:
                    return
                if line.startswith("/"):
                    if not _command(line, session):
                        return
                elif line.strip():
                    _answer(session, line, settings, bandwidth)
            except (ValueError, OSError) as error:  # what the user can mend; the conversation goes on
                typer.echo(f"error: {error}", err=True)


def _ask() -> str | None:
    """A line of input; None at its end. Ctrl-C clears the line."""
    while True:
        try:
            return input("> ")
        except EOFError:
            return None
        except KeyboardInterrupt:
            typer.echo("\n(Ctrl-D or /quit leaves)", err=True)


def _command(line: str, session: Any) -> bool:
    """Carry out a command. Returns whether the conversation goes on."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name in ("/quit", "/exit"):
        return False
    if name == "/help":
        typer.echo(HELP)
    elif name == "/reset":
        session.reset()
        typer.echo("the conversation is forgotten", err=True)
    elif name == "/save":
        if not argument:
            raise ValueError("/save is given without a name; expected /save FILE")
        session.save(argument)
        typer.echo(f"saved to {argument}", err=True)
    else:
        raise ValueError(f"unknown command {name}; expected /help, /reset, /save FILE or /quit")
    return True


def _answer(session: Any, text: str, settings: dict[str, Any], bandwidth: float) -> None:
    stream = session.send(text, **settings)
    try:
        for piece in stream:
            typer.echo(piece, nl=False)
        result = stream.result
        typer.echo()
    except KeyboardInterrupt:
        result = stream.stop()
        typer.echo(" [stopped]")
    typer.echo(f"[{speed_line(result.stats, bandwidth)}]", err=True)
