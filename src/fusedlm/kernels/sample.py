"""Choose the next token from logits: repetition penalty, temperature, top-k, top-p, min-p, then one inverse-CDF draw.

Filters act in the order above, each on what the one before it left (the order of Hugging Face's processors). The draw
takes one uniform number a row from the caller, so that a row's token depends on nothing but its own logits and number.
Traffic: B*V logits read, B tokens written.
"""

import torch
from torch import Tensor

from fusedlm.kernels._backend import torch_only


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
    if temperature == 0 or uniform is None:
        return x.argmax(-1)
    x = x / temperature
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
    return torch.searchsorted(cdf, target, right=True).squeeze(-1).clamp(max=x.shape[-1] - 1)


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
    that are True in seen, (B, V) bool. Returns (B,) int64. Raises ValueError for values outside these ranges.
    """
    check_sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    if temperature > 0 and (uniform is None or uniform.shape != logits.shape[:1]):
        given = "none" if uniform is None else tuple(uniform.shape)
        raise ValueError(f"sampling takes one uniform number a row, shape {tuple(logits.shape[:1])}; got {given}")
    torch_only("sample")
    return sample_ref(logits, uniform, temperature, top_k, top_p, min_p, repetition_penalty, seen)


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
