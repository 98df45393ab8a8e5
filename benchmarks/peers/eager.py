"""torch's own fused operators, where it has them, and the code people write where it has none.

EAGER is what runs in eager mode, COMPILED what torch.compile gets where that is something else (None: nothing), MORE
what else torch offers.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.attention import CUDNN, FLASH, FLEX
from benchmarks.peers.peer import Peer


def _rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, dropout_p: float = 0.0, **_: Any
) -> tuple[Tensor, Tensor]:
    total = (F.dropout(x, dropout_p, training=True) if dropout_p else x) + residual
    return F.layer_norm(total, x.shape[-1:], weight, bias, eps), total


def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, dropout_p: float = 0.0, **_: Any
) -> tuple[Tensor, Tensor]:
    total = (F.dropout(x, dropout_p, training=True) if dropout_p else x) + residual
    return _rms_norm(total, weight, eps), total


def _dropout(x: Tensor, p: float, **_: Any) -> Tensor:
    return F.dropout(x, p, training=True)


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers has it: tables of the whole width in x's dtype, halves exchanged."""
    cos, sin = torch.cat((cos, cos), -1).to(x.dtype), torch.cat((sin, sin), -1).to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


def _rope_wide(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In fp32 inside: the compiler fuses it, so that the exact thing is also the fastest."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def _embedding(
    ids: Tensor,
    weight: Tensor,
    position_weight: Tensor | None = None,
    positions: Tensor | int = 0,
    dropout_p: float = 0.0,
    **_: Any,
) -> Tensor:
    x = F.embedding(ids, weight)
    if isinstance(positions, Tensor) and position_weight is not None:
        x = x + F.embedding(positions, position_weight)
    elif position_weight is not None:
        x = x + position_weight[positions : positions + ids.shape[1]]
    return F.dropout(x, dropout_p, training=True) if dropout_p else x


def _cross_entropy(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(input, target, **options)


def _cross_entropy_wide(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    """In fp32 inside, which costs the compiler nothing."""
    return F.cross_entropy(input.float(), target, **options)


def _linear_cross_entropy(input: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(F.linear(input, weight), target, **options)


def _linear_cross_entropy_wide(input: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(F.linear(input, weight).float(), target, **options)


def _cublaslt(x: Tensor, weight: Tensor, bias: Tensor, **_: Any) -> Tensor:
    """The product with a GELU of its own, which is the tanh form and leaves nothing for a backward pass."""
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


def _adamw(step: Tensor, max_norm: float | None, **tensors: Any) -> None:
    """What clip_grad_norm_ and AdamW(fused=True) launch, without the host's part."""
    names = ("param", "grad", "exp_avg", "exp_avg_sq")
    count = sum(name.startswith("param") for name in tensors)
    params, grads, exp_avgs, exp_avg_sqs = ([tensors[f"{name}{i}"] for i in range(count)] for name in names)
    if max_norm is not None:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    steps = list((step + 1).expand(count).contiguous().unbind())
    hyper: Any = {"lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    torch._fused_adamw_(params, grads, exp_avgs, exp_avg_sqs, [], steps, **hyper, amsgrad=False, maximize=False)


def _sum_parts(x: Tensor, scale: float) -> Tensor:
    """A mean in one kernel, where a sum and a product are two; it too adds in fp32 and rounds once."""
    assert scale == 1 / x.shape[0], "no case has another"
    return x.mean(0)


def _by_sorting(x: Tensor, top_k: int, top_p: float) -> Tensor:
    """What generation loops do, as transformers' logits processors: each filter masks logits, top-p by sorting."""
    if 0 < top_k < x.shape[-1]:
        x = x.masked_fill(x < x.topk(top_k).values[..., -1, None], -torch.inf)
    if top_p < 1:
        ordered, order = x.sort(descending=False)
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[..., -1:] = False
        x = x.masked_fill(drop.scatter(1, order, drop), -torch.inf)
    return torch.multinomial(x.softmax(-1), 1).squeeze(-1)


def _by_topk(x: Tensor, top_k: int, top_p: float) -> Tensor:
    """A quicker way in torch: top-p among the k that topk has sorted already, and a draw by exponential noise, which
    unlike torch.multinomial does not wait for the GPU."""
    x, order = x.topk(top_k) if top_k else x.sort(descending=True)
    p = x.softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
    drawn = (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True)
    return order.gather(-1, drawn).squeeze(-1)


def _sample(draw: Callable[[Tensor, int, float], Tensor], *, waits: bool = False) -> Peer:
    """A peer by how it filters and draws: draw(logits over the temperature, top_k, top_p)."""

    def sample(
        logits: Tensor,
        uniform: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        **_: Any,
    ) -> Tensor:
        assert min_p == 0, "no case has it"
        x = logits.float()
        return x.argmax(-1) if temperature == 0 or uniform is None else draw(x / temperature, top_k, top_p)

    return Peer(sample, source=draw, random=True, waits=waits)


EAGER: dict[str, Peer] = {
    "rms_norm": Peer(_rms_norm),
    "add_layer_norm": Peer(_add_layer_norm),
    "add_rms_norm": Peer(_add_rms_norm),
    "dropout": Peer(_dropout, random=True),
    "rope": Peer(_rope, takes=lambda shape: "heads" not in shape),
    "embedding": Peer(_embedding, random=True),
    "cross_entropy": Peer(_cross_entropy),
    "linear_cross_entropy": Peer(_linear_cross_entropy),
    "attention": FLASH,
    "adamw": Peer(_adamw, writes_inputs=True, random=True),
    "sample": _sample(_by_sorting, waits=True),
    "sum_parts": Peer(_sum_parts),
}

COMPILED: dict[str, Peer | None] = {
    "rope": Peer(_rope_wide, takes=lambda shape: "heads" not in shape),
    "cross_entropy": Peer(_cross_entropy_wide),
    "linear_cross_entropy": Peer(_linear_cross_entropy_wide),
    "adamw": None,
    "attention": None,
    "sample": None,  # torch 2.11 refuses: "NYI TritonSplitDimKernel reductions"
}

# Other ways to do it in torch, by op and name.
MORE: dict[str, dict[str, Peer]] = {
    "sample": {"torch-topk": _sample(_by_topk)},
    "attention": {"cudnn": CUDNN, "flex": FLEX},
    "linear_gelu": {"cublaslt": Peer(_cublaslt, takes=lambda shape: shape["activation"] == "gelu_tanh", trains=False)},
}
