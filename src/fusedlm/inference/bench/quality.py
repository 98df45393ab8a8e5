"""What 8 bits cost: the divergence of the next token's distribution from float32's, and the perplexity of a text."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedlm.inference.bench import peers
from fusedlm.inference.bench.decode import bench_model, in_precision
from fusedlm.inference.language_model import load

WINDOW = 512  # tokens read at once, each window alone


def measure_quality(name: str, text: str, tokens: int, threads: int, folder: Path) -> list[dict[str, Any]]:
    """Rows {"runner", "perplexity", "mean_kl"} over the first `tokens` tokens of a text; KL in nats, from float32.

    Ours in 8 bits is the torch path, whose numbers the compiled step's equal within 1e-5.
    Raises ValueError where the text is too short.
    """
    tokenizer = load(name, device="cpu").tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode(text)[:tokens]
    if len(ids) < tokens:
        raise ValueError(f"the text has {len(ids)} tokens; expected at least {tokens}")
    model, source = bench_model(name)
    small = in_precision(model, "int8")
    ways: dict[str, Callable[[Sequence[int]], Tensor]] = {
        "fusedlm float32": lambda window: model(torch.tensor([list(window)]))[0],
        "fusedlm int8": lambda window: small(torch.tensor([list(window)]))[0],
    }
    if peers.llama_cpp() is not None:
        folder = folder / name.replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        ways["llama.cpp Q8_0"] = peers.LlamaCpp(
            "Q8_0", peers.llama_file(folder, model, source, "Q8_0"), threads, WINDOW
        ).all_logits
    size = min(WINDOW, model.config.context_length)
    loss, divergence = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0)
    predicted = 0
    for start in range(0, len(ids) - 1, size):
        window = ids[start : start + size]
        truth = None
        for way, logits_of in ways.items():
            with torch.inference_mode():
                logs = logits_of(window).double().log_softmax(-1)  # (T, V)
                truth = logs if truth is None else truth
                divergence[way] += float((truth.exp() * (truth - logs)).sum())
                loss[way] -= float(logs[:-1].gather(1, torch.tensor(window[1:]).unsqueeze(1)).sum())
        predicted += len(window) - 1
    return [
        {
            "model": name,
            "runner": way,
            "tokens": len(ids),
            "perplexity": math.exp(loss[way] / predicted),
            "mean_kl": divergence[way] / len(ids),
        }
        for way in ways
    ]
