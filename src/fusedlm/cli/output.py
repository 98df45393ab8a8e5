"""What commands print besides their results: errors, the version, and how fast a generation was."""

import sys
from typing import TYPE_CHECKING, NoReturn

import typer

from fusedlm import __version__

if TYPE_CHECKING:
    from fusedlm.inference.generation import Stats
    from fusedlm.inference.language_model import LanguageModel


def fail(error: BaseException) -> NoReturn:
    """One line for an error that the user can mend."""
    message = str(error) or type(error).__name__
    if isinstance(error, MemoryError):
        message = f"not enough memory: {message}"
    sys.stderr.write(f"fusedlm: error: {message}\n")
    sys.exit(1)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fusedlm {__version__}")
        raise typer.Exit


def say_what_takes_long(model: "LanguageModel") -> None:
    """On a terminal: that the first token waits for the compiler, where it does."""
    from fusedlm.inference.decoder import first_step_compiles

    if sys.stderr.isatty() and first_step_compiles(model.model):
        typer.echo("compiling the step for this CPU, once (about 6 s)", err=True)


def speed_line(stats: "Stats", bandwidth: float) -> str:
    """Prompt tokens, time to the first token, median time a token, tokens a second, share of the memory bandwidth.

    bandwidth: of the machine, measured, in bytes a second.
    """
    parts = [
        f"{stats.prompt_tokens} prompt tokens",
        f"first token {stats.time_to_first_token * 1e3:.0f} ms",
        f"{stats.new_tokens} new tokens",
    ]
    median, rate = stats.median_token_seconds, stats.tokens_per_second
    if median is not None and rate is not None:
        share = stats.bandwidth_share(bandwidth)
        parts.append(f"median {median * 1e3:.2f} ms/token")
        parts.append(f"{rate:.1f} tokens/s")
        parts.append(f"{share:.0%} of {bandwidth / 1e9:.0f} GB/s memory bandwidth")
    return ", ".join(parts)
