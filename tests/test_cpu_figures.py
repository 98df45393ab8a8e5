"""The blocks of figures on generation on a CPU, from results written down here."""

from typing import Any

import pytest

pytest.importorskip("triton", reason="the benchmarks need Triton")

from benchmarks.cpu import BLOCKS

SETTING = {"rounds": 5, "prompt": 64, "new_tokens": 128, "long_prompt": 512, "threads": 2}
MACHINE = {"cpu": "A CPU", "cores": 2, "bytes_per_second": 25.76e9, "python": "3.12", "torch": "2.13", "numba": None}


def decode(runner: str, token_seconds: float, prompt_speed: float, precision: str = "int8") -> dict[str, Any]:
    row = {"model": "gpt2-shape", "precision": precision, "runner": runner, "setting": SETTING}
    return {**row, "token_seconds": token_seconds, "prompt_tokens_per_second": prompt_speed}


RESULTS: dict[str, Any] = {
    "machine": MACHINE,
    "decode": [
        decode("fusedlm", 0.004, 1000.0),
        decode("llama.cpp Q8_0", 0.01, 800.0),
        decode("fusedlm", 0.02, 900.0, "float32"),
        decode("transformers, compiled", 0.025, 1200.0, "float32"),
    ],
    "quality": [
        {"model": "m", "runner": "fusedlm float32", "perplexity": 50.0, "mean_kl": 0.0},
        {"model": "m", "runner": "fusedlm int8", "perplexity": 49.99, "mean_kl": 0.00184},
        {"model": "m", "runner": "llama.cpp Q8_0", "perplexity": 50.25, "mean_kl": 0.0045},
    ],
    "ablation": [{"step": "no cache", "token_seconds": 0.0793}, {"gelu": "torch", "token_seconds": 9.94e-5}],
    "busy": [
        {"runner": runner, "busy": busy, "token_seconds": s, "token_rounds": [s, 1.2 * s, s / 2], "setting": SETTING}
        for runner, times in (("fusedlm", (0.006, 0.012)), ("llama.cpp Q8_0", (0.01, 0.05)))
        for busy, s in zip((0, 2), times, strict=True)
    ],
}

EXPECTED = {
    "decode": """\
Without a GPU, `--quantize int8`, 2 cores: gpt2-shape 250 tokens a second (llama.cpp Q8_0 100, 2.50x).""",
    "cpu decode": """\
|  |  | ms a token | we are faster by | prompt tokens a second | we are faster by |
|---|---|---:|---:|---:|---:|
| GPT-2 124M | **int8** | **4.00** |  | **1000** |  |
| GPT-2 124M | llama.cpp Q8_0 | 10.00 | 2.50x | 800 | 1.25x |
| GPT-2 124M | **float32** | **20.00** |  | **900** |  |
| GPT-2 124M | transformers, compiled | 25.00 | 1.25x | 1200 | 0.75x |

A CPU, 2 cores, 25.8 GB/s; torch 2.13; 64 prompt and 128 new tokens, prompts of 512, 2 threads, medians of 5 rounds.""",
    "cpu quality": """\
|  | mean KL, nats | perplexity |
|---|---:|---:|
| fusedlm float32 |  | 50.00 |
| fusedlm int8 | 0.0018 | 49.99 (-0.02%) |
| llama.cpp Q8_0 | 0.0045 | 50.25 (+0.50%) |""",
    "cpu ablation": """\
| GPT-2 124M | ms a token |
|---|---:|
| no cache | 79.30 |""",
    "cpu gelu": """\
| GELU | ms a token |
|---|---:|
| torch | 0.099 |""",
    "cpu busy": """\
| busy processes | 0 | 2 |
|---|---:|---:|
| fusedlm | 6.0 (3.0 to 7.2) | 12.0 (6.0 to 14.4) |
| llama.cpp Q8_0 | 10.0 (5.0 to 12.0) | 50.0 (25.0 to 60.0) |

128 tokens, 2 threads, medians of 5 rounds and their range.""",
}


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_of_figures(block: str) -> None:
    kind, make = BLOCKS[block]
    only = {"machine": MACHINE, kind: RESULTS[kind]}  # a block is made of its kind of results alone
    assert make(only) == EXPECTED[block]


def test_rows_of_several_settings_say_so() -> None:
    slow = {**decode("transformers", 0.03, 700.0), "setting": {**SETTING, "rounds": 2}}
    said = BLOCKS["cpu decode"][1]({"machine": MACHINE, "decode": [*RESULTS["decode"], slow]}).split("\n")[-1]
    tokens = "64 prompt and 128 new tokens, prompts of 512, 2 threads"
    assert said.endswith(f"; {tokens}, medians of 5 rounds; {tokens}, medians of 2 rounds.")
