"""Choose the next token from logits: repetition penalty, temperature, top-k, top-p, min-p, then one inverse-CDF draw.

Filters act in the order above, each on what the one before it left (the order of Hugging Face's processors). The draw
takes one uniform number a row from the caller, so that a row's token depends on nothing but its own logits and number.
Nothing is sorted: a filter is a threshold, and a threshold is found by counting and adding up what lies above pivots.
Numerics: logits in fp32; sums are integers of 2^-40 times a token's weight exp(x - g), 0 <= g - max(x) < 1, so no order
of summation changes them. A weight below 2^-41 counts as zero.
Traffic: B*V logits read (three passes, from cache after the first), B tokens written, and what lies between two pivots.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from fusedlm.kernels._backend import interpreting, use_triton
from fusedlm.kernels._launch import launch, rows
from fusedlm.kernels._operator import operator
from fusedlm.kernels._triton import triton
from fusedlm.kernels.sample.passes import draw_kernel, gather_kernel, scan_kernel

MAX_V = 2**20  # a chunk, a 128th of a row, is one program's


def sample_ref(
    logits: Tensor,
    uniform: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seen: Tensor | None,
) -> Tensor:
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if seen is not None and repetition_penalty != 1:
        x = torch.where(seen, torch.where(x > 0, x / repetition_penalty, x * repetition_penalty), x)
    greedy = x.argmax(-1)
    if temperature == 0 or uniform is None:
        return greedy
    x = x / temperature
    undefined = ~x.amax(-1).isfinite()  # a NaN, an infinity, or nothing but -infinity
    if 0 < top_k < x.shape[-1]:
        x = x.masked_fill(x < x.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered = x.sort(dim=-1, descending=True).values
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of everything likelier
        last = (before < top_p).sum(-1, keepdim=True).clamp(min=1) - 1
        x = x.masked_fill(x < ordered.gather(-1, last), -torch.inf)
    if min_p > 0:
        p = x.softmax(-1)
        x = x.masked_fill(p < min_p * p.amax(-1, keepdim=True), -torch.inf)
    cdf = x.double().softmax(-1).cumsum(-1)  # fp64: in fp32 the sum over a large vocabulary need not reach 1
    target = uniform.double().view(-1, 1) * cdf[:, -1:]
    drawn = torch.searchsorted(cdf, target, right=True).squeeze(-1).clamp(max=x.shape[-1] - 1)
    return torch.where(undefined, greedy, drawn)


@functools.cache
def _config(B: int, V: int) -> dict[str, int]:
    """CHUNK tokens a program, in at most 128 chunks a row; T pivots, STEPS a nat; P pivots a turn of the last kernel's
    search. One row is spread over as many programs as there are; of many rows, a program should not read longer about
    the other chunks than in its own."""
    if interpreting():
        chunk, tile, pivots, steps, search = 64, 64, 8, 1, 32
    else:
        chunk, tile, pivots, steps, search = (1024, 512, 32, 2, 16) if B <= 4 else (4096, 512, 16, 1, 16)
    chunk = max(chunk, triton.next_power_of_2(triton.cdiv(V, 128)))
    count = triton.next_power_of_2(triton.cdiv(V, chunk))
    width = 16 if interpreting() else max(1024 // count, 1)
    return {"CHUNK": chunk, "TILE": tile, "T": pivots, "STEPS": steps, "NCH": count, "W": width, "P": search}


def _constants(config: dict[str, int], names: str, warps: int) -> dict[str, Any]:
    return {name: config[name] for name in names.split()} | {"num_warps": warps}


def _fake_sample(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


@operator(fake=_fake_sample)
def _sample(
    logits: Tensor,
    uniform: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    seen: Tensor | None,
) -> Tensor:
    x = rows(logits)
    B, V = x.shape
    tokens = torch.empty(B, dtype=torch.int64, device=x.device)
    if not B:
        return tokens
    seen = rows(seen) if seen is not None and penalty != 1 else None
    seen_stride = 0 if seen is None else seen.stride(0)
    draws = temperature > 0 and uniform is not None
    by_count, by_mass = draws and 0 < top_k < V, draws and top_p < 1
    inverse = min(1 / temperature, 3e38) if draws else 1.0
    config = _config(B, V)
    chunk = config["CHUNK"]
    C = triton.cdiv(V, chunk)
    best = torch.empty((B, C), dtype=torch.int64, device=x.device)
    masses = torch.empty((B, C, config["T"]), dtype=torch.float32, device=x.device) if by_mass else None
    counts = torch.empty((B, C, config["T"]), dtype=torch.int32, device=x.device) if by_count else None
    sums = slots = None
    key: tuple[Any, ...] = (x.dtype, seen is None, by_count, by_mass)
    scalars = (x.stride(0), seen_stride, V, C)
    constants = _constants(config, "CHUNK TILE T STEPS", 8)
    launch(scan_kernel, (B * C, 1, 1), key, (x, seen, best, masses, counts), (*scalars, inverse, penalty), constants)
    filters = (min(top_k, V), inverse, penalty, top_p, min_p)
    if draws:
        assert uniform is not None
        uniform = uniform.contiguous()
        sums = torch.empty((B, 7, C), dtype=torch.int64, device=x.device)  # see gather_kernel
        slots = torch.empty((B, C * chunk) if by_count or by_mass else 1, dtype=torch.float32, device=x.device)
        tensors = (x, seen, best, masses, counts, sums, slots)
        constants = _constants(config, "CHUNK NCH T STEPS", 8)
        launch(gather_kernel, (B * C, 1, 1), key, tensors, (*scalars, *filters), constants)
    key = (x.dtype, seen is None, None if uniform is None else uniform.dtype, draws)
    constants = {"TOP_K": by_count, "TOP_P": by_mass} | _constants(config, "CHUNK NCH W P STEPS", 16)
    constants["maxnreg"] = 128  # left alone, ptxas spills a few bytes to get by with less
    outputs = (x, seen, uniform if draws else None, best, sums, slots, tokens)
    launch(draw_kernel, (B, 1, 1), key, outputs, (*scalars, *filters), constants)
    return tokens


def sample(
    logits: Tensor,
    uniform: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seen: Tensor | None = None,
) -> Tensor:
    """One token a row.

    logits: (B, V). uniform: (B,) in [0, 1), one number a row; not needed where temperature is 0, which is greedy.
    top_k keeps the k most likely tokens (0: all; ties at the k-th stay), top_p (Holtzman et al. 2020) the fewest likely
    ones whose probabilities reach top_p, min_p (Nguyen et al. 2024) those of at least min_p times the highest
    probability. repetition_penalty (Keskar et al. 2019) divides positive and multiplies negative logits of the tokens
    that are True in seen, (B, V) bool. Returns (B,) int64: for a row that has no distribution, because it holds a NaN
    or infinity or nothing but -infinity, what greedy gives (the first NaN, else the first of the highest).
    Raises ValueError for values outside these ranges.
    """
    check_sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    if temperature > 0 and (uniform is None or uniform.shape != logits.shape[:1]):
        given = "none" if uniform is None else tuple(uniform.shape)
        raise ValueError(f"sampling takes one uniform number a row, shape {tuple(logits.shape[:1])}; got {given}")
    if not use_triton(logits) or logits.shape[-1] > MAX_V:
        return sample_ref(logits, uniform, temperature, top_k, top_p, min_p, repetition_penalty, seen)
    return _sample(logits, uniform, temperature, int(top_k), top_p, min_p, repetition_penalty, seen)


def check_sampling(temperature: float, top_k: int, top_p: float, min_p: float, repetition_penalty: float) -> None:
    """Raises ValueError where a sampling value makes no sense (NaN never does)."""
    infinite = float("inf")
    for name, value, ok, expected in (
        ("temperature", temperature, 0 <= temperature < infinite, "0 (greedy) or more"),
        ("top_k", top_k, top_k >= 0 and top_k == int(top_k), "a whole number, 0 (all tokens) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("min_p", min_p, 0 <= min_p <= 1, "between 0 and 1"),
        ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < infinite, "above 0 (1: none)"),
    ):
        if not ok:
            raise ValueError(f"{name} is {value}; expected {expected}")
