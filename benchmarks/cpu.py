"""Tables and sentences in Markdown from what `fusedlm bench` measured: the blocks of figures on generation on a CPU."""

from collections.abc import Callable, Mapping
from typing import Any

Results = Mapping[str, Any]

MODELS = {"gpt2-shape": "GPT-2 124M", "smollm2-135m-instruct": "SmolLM2-135M"}
_PACKAGES = ("torch", "numba", "llama-cpp-python", "transformers")


def sentence(results: Results) -> str:
    """8 bits beside llama.cpp's: tokens a second, and how many times as fast we are."""
    rows = [row for row in results["decode"] if row["precision"] == "int8"]
    found = {(row["model"], row["runner"]): row["token_seconds"] for row in rows}
    said = []
    for model in dict.fromkeys(model for model, _ in found):
        ours = found[model, "fusedlm"]
        peers = [
            f"{name} {1 / seconds:.0f}, {seconds / ours:.2f}x"
            for (of, name), seconds in found.items()
            if of == model and name != "fusedlm"
        ]
        said.append(f"{model} {1 / ours:.0f} tokens a second ({'; '.join(peers)})")
    return f"Without a GPU, `--quantize int8`, {results['machine']['cores']} cores: {', '.join(said)}."


def machine(results: Results) -> str:
    """What was measured on."""
    about = results["machine"]
    packages = ", ".join(f"{name} {about[name]}" for name in _PACKAGES if about.get(name))
    return f"{about['cpu']}, {about['cores']} cores, {about['bytes_per_second'] / 1e9:.1f} GB/s; {packages}"


def _table(head: list[str], rows: list[list[str]], aligned: str) -> str:
    """aligned: a letter a column, l or r."""
    lines = ["| " + " | ".join(head) + " |", "|" + "".join({"l": "---|", "r": "---:|"}[a] for a in aligned)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def decode_table(results: Results) -> str:
    """Of every model and precision ours, and under it the peers and how many times as fast as they we are."""
    rows, ours = [], {}
    for row in results["decode"]:
        key = (row["model"], row["precision"])
        token, prompt = row["token_seconds"], row["prompt_tokens_per_second"]
        cells = [MODELS.get(row["model"], row["model"])]
        if row["runner"] == "fusedlm":
            ours[key] = row
            cells += [f"**{row['precision']}**", f"**{token * 1e3:.2f}**", "", f"**{prompt:.0f}**", ""]
        else:
            faster = token / ours[key]["token_seconds"], ours[key]["prompt_tokens_per_second"] / prompt
            cells += [row["runner"], f"{token * 1e3:.2f}", f"{faster[0]:.2f}x", f"{prompt:.0f}", f"{faster[1]:.2f}x"]
        rows.append(cells)
    head = ["", "", "ms a token", "we are faster by", "prompt tokens a second", "we are faster by"]
    settings = dict.fromkeys(_told(row["setting"]) for row in results["decode"])
    return f"{_table(head, rows, 'llrrrr')}\n\n{machine(results)}; {'; '.join(settings)}."


def _told(setting: Results) -> str:
    return (
        f"{setting['prompt']} prompt and {setting['new_tokens']} new tokens, prompts of {setting['long_prompt']}, "
        f"{setting['threads']} threads, medians of {setting['rounds']} rounds"
    )


def quality_table(results: Results) -> str:
    """Divergence from float32, and perplexity and what it changed by."""
    rows = results["quality"]
    wide = {row["model"]: row["perplexity"] for row in rows if row["runner"] == "fusedlm float32"}
    cells = []
    for row in rows:
        truth = wide[row["model"]]
        own = row["runner"] == "fusedlm float32"
        change = "" if own else f" ({row['perplexity'] / truth - 1:+.2%})"
        cells.append([row["runner"], "" if own else f"{row['mean_kl']:.4f}", f"{row['perplexity']:.2f}{change}"])
    return _table(["", "mean KL, nats", "perplexity"], cells, "lrr")


def ablation_table(results: Results) -> str:
    """What each step is worth."""
    steps = [row for row in results["ablation"] if "step" in row]
    cells = [[row["step"], f"{row['token_seconds'] * 1e3:.2f}"] for row in steps]
    return _table([MODELS["gpt2-shape"], "ms a token"], cells, "lr")


def gelu_table(results: Results) -> str:
    """GELU of a token alone."""
    ways = [row for row in results["ablation"] if "gelu" in row]
    cells = [[row["gelu"], f"{row['token_seconds'] * 1e3:.3f}"] for row in ways]
    return _table(["GELU", "ms a token"], cells, "lr")


def _middle_and_range(row: Results) -> str:
    low, high = min(row["token_rounds"]), max(row["token_rounds"])
    return f"{row['token_seconds'] * 1e3:.1f} ({low * 1e3:.1f} to {high * 1e3:.1f})"


def busy_table(results: Results) -> str:
    """A token's time by the number of processes that keep the cores busy."""
    found = {(row["runner"], row["busy"]): row for row in results["busy"]}
    runners, counts = list(dict.fromkeys(r for r, _ in found)), sorted({c for _, c in found})
    cells = [[r, *(_middle_and_range(found[r, c]) for c in counts)] for r in runners]
    settings = dict.fromkeys(
        f"{s['new_tokens']} tokens, {s['threads']} threads, medians of {s['rounds']} rounds and their range"
        for s in (row["setting"] for row in results["busy"])
    )
    table = _table(["busy processes", *map(str, counts)], cells, "l" + "r" * len(counts))
    return f"{table}\n\n{'; '.join(settings)}."


# What may stand behind `figures:`, the kind of results that it is made of, and how.
BLOCKS: dict[str, tuple[str, Callable[[Results], str]]] = {
    "decode": ("decode", sentence),
    "cpu decode": ("decode", decode_table),
    "cpu quality": ("quality", quality_table),
    "cpu ablation": ("ablation", ablation_table),
    "cpu gelu": ("ablation", gelu_table),
    "cpu busy": ("busy", busy_table),
}
