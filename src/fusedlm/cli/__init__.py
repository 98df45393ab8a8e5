"""The command line. One file a command; each is thin and imports torch only once its arguments are known to be good."""

import atexit
import os
import signal
import sys
from types import FrameType

import typer

from fusedlm.cli.bench import bench
from fusedlm.cli.chat import chat
from fusedlm.cli.data import data
from fusedlm.cli.evaluate import evaluate
from fusedlm.cli.export import export
from fusedlm.cli.generate import generate
from fusedlm.cli.models import models
from fusedlm.cli.output import fail, show_version
from fusedlm.cli.plan import plan
from fusedlm.cli.train import train

app = typer.Typer(
    name="fusedlm",
    help="Train and run GPT-2 and Llama models on fused kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate)
app.command()(chat)
app.command()(models)
app.command()(plan)
app.command()(train)
app.command()(evaluate)
app.command()(export)
app.add_typer(bench, name="bench")
app.add_typer(data, name="data")


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=show_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def interrupt(number: int, frame: FrameType | None) -> None:
    """For SIGINT: KeyboardInterrupt, but while a command imports what it needs, with nothing to lose, the end at once.

    An exception that passes through an extension module's C++ while that is set up ends the process by another signal.
    """
    importing = False
    while frame is not None:
        file = frame.f_code.co_filename
        if importing and os.path.dirname(file) == os.path.dirname(__file__):
            os.write(2, b"\n")
            os._exit(130)
        importing = file == "<frozen importlib._bootstrap>"
        frame = frame.f_back
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line. Errors a user can mend are one line on stderr and exit code 1; Ctrl-C is 130."""
    # Before torch is imported, which brings GNU's OpenMP: its threads wait for each other in a loop of 300,000 turns.
    # With another program on one of the cores that made training fourteen times slower, a short one two to three times.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as in the background
        signal.signal(signal.SIGINT, interrupt)
    # What is left then, taking torch apart, takes a while, and a Ctrl-C would turn it into a death by signal.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    try:
        app()
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone (`| head`)
        sys.stderr.close()
        sys.exit(141)
    except (ValueError, OSError, NotImplementedError, MemoryError) as error:
        fail(error)
