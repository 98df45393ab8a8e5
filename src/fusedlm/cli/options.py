"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Model = Annotated[
    str, typer.Option("--model", "-m", help="A name from `fusedlm models`, a path, or owner/name on the Hub.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.")]
Quantize = Annotated[str | None, typer.Option(help="int8 keeps the weights in 8 bits, on a CPU.")]
Threads = Annotated[int | None, typer.Option(help="Of steps on a CPU.", show_default="the cores there are")]
Kernels = Annotated[Literal["auto", "triton", "torch"], typer.Option(help="Which kernels run.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never use the network.")]
CacheDir = Annotated[Path | None, typer.Option(help="Where downloads are kept.", show_default="the user's cache")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.", show_default="the model's own, else 0")]
TopK = Annotated[int | None, typer.Option(help="Keep the k likeliest tokens (0: all).")]
TopP = Annotated[float | None, typer.Option(help="Keep the fewest tokens whose probabilities reach this.")]
MinP = Annotated[float | None, typer.Option(help="Keep tokens of at least this share of the highest probability.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1 makes tokens that were there less likely.")]
Seed = Annotated[int | None, typer.Option(help="Repeats a text exactly.", show_default="random")]
Stop = Annotated[list[str] | None, typer.Option(help="A text that ends the generation; may be given several times.")]
