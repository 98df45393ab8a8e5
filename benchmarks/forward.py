"""`python -m benchmarks forward`: GPT-2's forward pass, hidden states of 512 x 300 tokens, beside transformers'.

Contenders have the same weights and tokens and are called in turns, eagerly; a figure is the median of the rounds.
Before that each is held to our model in float64. tf32 is fp32 whose products may take tensor cores; fp32 keeps all
digits.
"""

import argparse
import copy
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import environment, head
from benchmarks.peers.causal import use_causal_attention
from fusedlm.checkpoint.huggingface import save_huggingface
from fusedlm.kernels import backend
from fusedlm.models import PRESETS, DecoderModel, build_model

Contender = Callable[[Tensor], Tensor]  # ids, (B, T), to hidden states, (B, T, C)

OURS, EAGER, COMPILED = "fusedlm", "transformers", "transformers, compiled"
CAUSAL = "transformers, compiled, causal"  # and told so, see peers/causal.py
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FURTHER = 2.0  # how much further from float64 than transformers ours may be


@contextmanager
def _products(dtype: str) -> Iterator[None]:
    """Inside, fp32 products take tensor cores where they are called tf32, and do not elsewhere."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def contenders(
    model: DecoderModel, dtype: torch.dtype, device: torch.device, *, compiled: bool
) -> dict[str, Contender]:
    """Ours and transformers', of one model's weights.

    compiled: transformers' by torch.compile too, as it is and, where flash attention takes the dtype, at its best.
    """
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        save_huggingface(model, Path(folder))
        theirs = transformers.GPT2Model.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    theirs.to(device).eval()
    ours = build_model(model.config, device=device, dtype=dtype).eval()
    ours.load_state_dict(model.state_dict())
    found: dict[str, Contender] = {
        OURS: ours.hidden_states,
        EAGER: lambda ids: theirs(ids, use_cache=False).last_hidden_state,
    }
    if compiled:
        found[COMPILED] = _compiled(theirs)
    if compiled and dtype.itemsize == 2:
        causal = copy.deepcopy(theirs)
        use_causal_attention(causal)
        found[CAUSAL] = _compiled(causal)
    return found


def _compiled(theirs: Any) -> Contender:
    function = torch.compile(theirs, dynamic=False)
    return lambda ids: function(ids, use_cache=False).last_hidden_state


def errors(found: Mapping[str, Contender], truth: Tensor, ids: Tensor) -> dict[str, float]:
    """Relative RMS of each contender's difference from truth, which is of the first rows of ids.

    Contenders are called with all rows: what is compiled is compiled for those, once, and is what will be timed.
    Raises ValueError where ours is far off.
    """
    scale = truth.square().mean().sqrt()
    far = {
        name: float((contender(ids)[: len(truth)].double() - truth).square().mean().sqrt() / scale)
        for name, contender in found.items()
    }
    if not far[OURS] <= FURTHER * far[EAGER] + 1e-6:
        raise ValueError(f"ours is {far[OURS]:.3g} from float64, and transformers' {far[EAGER]:.3g}")
    return far


def _seconds(call: Callable[[], object], calls: int, cuda: bool) -> float:
    if not cuda:
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - begin) / calls
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / calls


def measure(
    found: Mapping[str, Contender], ids: Tensor, *, rounds: int = 5, calls: int = 1
) -> dict[str, dict[str, float]]:
    """By contender: median seconds of a call, and the bytes that one needs beyond the weights."""
    cuda = ids.is_cuda
    peaks = {}
    for name, contender in found.items():
        contender(ids)
        contender(ids)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            contender(ids)
            torch.cuda.synchronize()
            peaks[name] = float(torch.cuda.max_memory_allocated() - before)
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, contender in found.items():
            times[name].append(_seconds(lambda contender=contender: contender(ids), calls, cuda))  # type: ignore[misc]
    return {name: {"seconds": statistics.median(t), "peak_bytes": peaks.get(name, 0.0)} for name, t in times.items()}


def largest_batch(fits: Callable[[int], bool], guess: int, *, step: int = 64) -> int:
    """The largest multiple of step that fits, 0 if none does. guess: about that; from there in strides that double."""
    at, stride = max(guess // step, 1), 1  # all in steps
    known, refused = 0, None
    while refused is None or refused - known > 1:
        if fits(at * step):
            known = at
        else:
            refused = at
        if refused is None:
            at, stride = known + stride, 2 * stride
        elif known == 0:
            at, stride = max(refused - stride, 1), 2 * stride
        else:
            at = (known + refused) // 2
    return known * step


def limit_of(contender: Contender, context: int, bytes_a_row: float) -> tuple[int, str]:
    """How many rows of context tokens a contender takes, and what it says of more. bytes_a_row: about what one needs.

    Where it is compiled, it is so once more, for any number of rows.
    """
    said = ""

    def fits(rows: int) -> bool:
        nonlocal said
        gc.collect()  # what an attempt that failed has left
        torch.cuda.empty_cache()
        ids = torch.zeros(rows, context, dtype=torch.int64, device="cuda")
        torch._dynamo.maybe_mark_dynamic(ids, 0)
        try:
            contender(ids)
            torch.cuda.synchronize()
        except (RuntimeError, OverflowError) as error:  # whatever it is, so many it cannot take
            said = str(error).strip().split("\n")[0]
            return False
        return True

    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return largest_batch(fits, int(free / bytes_a_row)), said


@torch.no_grad()
def random_model(preset: str) -> DecoderModel:
    """Of random weights; biases and norms' scales too, for zeros and ones would hide that one is left out."""
    model = build_model(PRESETS[preset])
    generator = torch.Generator().manual_seed(1)
    model.init_weights(generator)
    for p in model.parameters():
        if p.ndim == 1:
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return model


@torch.no_grad()
def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The results so far, after each dtype and at the end: rows, and in fp16 the largest batches."""
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    model = random_model(options.preset)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(model.config.vocab_size, (options.batch, options.context), generator=generator).to(device)
    exact = build_model(model.config, device=device, dtype=torch.float64).eval()
    exact.load_state_dict(model.state_dict())
    with backend("torch"):
        truth = exact.hidden_states(ids[:2])
    del exact
    size = {"preset": options.preset, "batch": options.batch, "context": options.context}
    rows: list[dict[str, Any]] = []
    results: dict[str, Any] = {
        "environment": environment(options.commit),
        **size,
        "rows": rows,
        "largest": {},
        "stopped": {},
    }
    for dtype in options.dtypes:
        with _products(dtype):
            found = contenders(model, DTYPES[dtype], device, compiled=cuda)
            far = errors(found, truth, ids)
            for name, measured in measure(found, ids).items():
                rate = ids.numel() / measured["seconds"]
                rows.append(
                    {"dtype": dtype, "variant": name, **measured, "tokens_per_second": rate, "error": far[name]}
                )
                print(f"{dtype}, {name}: {measured['seconds'] * 1e3:.1f} ms", flush=True)
        del found
        torch._dynamo.reset()
        if cuda:
            torch.cuda.empty_cache()
        yield results
    if cuda and options.largest:  # last, for what fails for want of memory may leave a GPU that does nothing more
        needs = {row["variant"]: row["peak_bytes"] / len(ids) for row in rows if row["dtype"] == "fp16"}
        found = contenders(model, torch.float16, device, compiled=True)
        for name in (OURS, EAGER, CAUSAL) if needs else ():
            batch, said = limit_of(found[name], options.context, needs[name])
            results["largest"][name] = batch
            if "memory" not in said:
                results["stopped"][name] = said
            print(f"largest batch, fp16, {name}: {batch:,}; of more it says: {said}", flush=True)
        yield results


def forward_table(results: Mapping[str, Any]) -> str:
    """In Markdown: milliseconds of each contender, and ours as a share of the fastest other."""
    names = list(dict.fromkeys(row["variant"] for row in results["rows"]))
    others = names[1:]
    lines = [
        f"| | {' | '.join(f'{name}, ms' for name in names)} | ours / fastest other | GiB: {' / '.join(names)} |",
        f"|---|{'---:|' * len(names)}---:|---:|",
    ]
    for dtype in dict.fromkeys(row["dtype"] for row in results["rows"]):
        at = {row["variant"]: row for row in results["rows"] if row["dtype"] == dtype}
        share = at[OURS]["seconds"] / min(at[name]["seconds"] for name in others if name in at)
        times = " | ".join(f"{at[name]['seconds'] * 1e3:.1f}" if name in at else "" for name in names)
        memory = " / ".join(f"{at[name]['peak_bytes'] / 2**30:.2f}" if name in at else "-" for name in names)
        lines.append(f"| {dtype} | {times} | {share:.2f} | {memory} |")
    text = "\n".join(lines)
    about = results["environment"]
    text += f"\n\n{results['preset']}, {results['batch']} x {results['context']} tokens, hidden states; "
    text += "tf32 is fp32 whose products may take tensor cores; "
    if CAUSAL in names:
        text += "causal: told that nothing is padded, without which torch cannot take flash attention; "
    if results["largest"]:
        stopped = results.get("stopped", {})  # by something else than memory
        batches = (
            f"{name} {batch:,}" + (f" (of more it says: {stopped[name]})" if name in stopped else "")
            for name, batch in results["largest"].items()
        )
        text += f"largest batch found in fp16: {', '.join(batches)}; "
    return text + f"{about.get('gpu', about.get('cpu'))}, torch {about['torch']}, {about['date']}."


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks forward", description=__doc__)
    parser.add_argument("--preset", default="gpt2", help="a size of GPT-2")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--context", type=int, default=300)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp16", "bf16", "tf32", "fp32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--largest", action=argparse.BooleanOptionalAction, default=True, help="find it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for forward.json")
    parser.add_argument("--commit", default=head(), help="of the code that runs, where it is not a git checkout")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        for results in run(options):
            (options.out / "forward.json").write_text(json.dumps(results, indent=1) + "\n")
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print(forward_table(results))
