"""Scaled dot-product attention (Vaswani et al. 2017): softmax(q @ k^T * scale + mask) @ v, for each head.

Grouped and multi-query attention (Ainslie et al. 2023): H query heads share G key/value heads, H/G to each.
Causal: query i of sequence b stands at position offset[b] + i and sees the keys up to there. Packed: a query sees the
keys of its own sequence. In tiles, with a running maximum and sum, so that no weights are ever in memory (Dao 2023);
tiles that nobody sees are skipped. Numerics: scores and sums in fp32, weights rounded to the inputs' dtype for the
second product, one rounding at the store.
Traffic: q, k, v and the output, once each. Work: 4*H*T*S*D operations forward and 2.5 times that backward, half of it
where causal.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusedlm.kernels._autocast import autocast
from fusedlm.kernels._backend import forced, use_triton
from fusedlm.kernels._launch import capability
from fusedlm.kernels._operator import operator
from fusedlm.kernels._philox import drop_threshold, dropout_seed, dropped_ref, keep_mask_ref, keep_tile_ref
from fusedlm.kernels.attention.heads import heads_side_by_side, split_heads
from fusedlm.kernels.attention.launches import Setting, backward, forward, new_lse, tokens_outside

__all__ = ["attention", "attention_ref", "left_to_torch", "split_heads", "torch_attention"]

MAX_D = 256


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    offset: int | Tensor,
    scale: float,
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    B, H, T, D = q.shape
    G, S = k.shape[1], k.shape[2]
    square = False
    if causal and isinstance(offset, int) and offset == 0 and T == S:  # so, torch.compile decides and has no SymBool
        square = cu_seqlens is None
    mask = None
    if causal and not square and not (isinstance(offset, int) and offset + 1 >= S):  # else every query sees every key
        start = torch.as_tensor(offset, device=q.device).view(-1, 1, 1, 1)  # (B or 1, 1, 1, 1)
        position = start + torch.arange(T, device=q.device).view(-1, 1)
        mask = torch.arange(S, device=q.device) <= position  # (B or 1, 1, T, S)
    if cu_seqlens is not None:
        number = torch.searchsorted(cu_seqlens, torch.arange(T, device=q.device), right=True)
        same = number.view(-1, 1) == number
        mask = same if mask is None else mask & same
    threshold, factor = drop_threshold(dropout_p)
    keep = None
    if seed is not None:
        keep = keep_tile_ref(seed, stream, B * H, T, S, threshold)
    elif q.device.type == "cpu" and not torch.compiler.is_compiling():
        # Bits of ours, by rows, come four times as fast as torch's do on a CPU. Nobody asked for tiles'.
        drawn = dropout_seed(None, dropout_p, True, q.device)
        keep = None if drawn is None else keep_mask_ref(drawn, 0, B * H * T, S, threshold)
    if keep is not None:
        return _dropped_ref(q, k, v, mask, square, scale, keep.view(B, H, T, S), factor)
    if T == 1 and H != G:  # one query a head: the heads of a group are the rows of one small product
        grouped = q.reshape(B, G, H // G, D)
        return F.scaled_dot_product_attention(grouped, k, v, mask, dropout_p, scale=scale).reshape(B, H, 1, -1)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, square, scale=scale, enable_gqa=H != G)


def _dropped_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    square: bool,
    scale: float,
    keep: Tensor,
    factor: float,
) -> Tensor:
    """With a mask of ours on the weights, which torch's own attention cannot take. keep: (B, H, T, S)."""
    _, H, T, _ = q.shape
    k, v = (t.repeat_interleave(H // t.shape[1], dim=1) for t in (k, v)) if k.shape[1] != H else (k, v)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.mT * scale if q.dtype != wide else q * scale @ k.mT).to(wide)
    if square:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill_(~mask, -torch.inf)
    weights = scores.softmax(-1)
    if not square:  # a query may see no key
        weights = weights.nan_to_num(0.0)
    return (dropped_ref(weights, keep, factor).to(v.dtype) @ v).to(q.dtype)


def torch_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """`attention_ref` for any memory and any size: torch's kernels for GPUs fail at some, and do not look.

    They read 16 bytes at once: what is laid out otherwise, an incoming gradient too, ends with "misaligned address",
    after which the process can use no GPU; here it is copied. And of an empty batch cuDNN's makes no tensor at all.
    """
    if torch.compiler.is_compiling():  # the compiler aligns what it gives to torch's kernels
        return attention_ref(q, k, v, **options)
    if not q.numel() or not k.numel():
        with sdpa_kernel(SDPBackend.MATH):
            return attention_ref(q, k, v, **options)
    o = attention_ref(_aligned(q), _aligned(k), _aligned(v), **options)
    if o.requires_grad:
        o.register_hook(_aligned)
    return o


def _aligned(t: Tensor) -> Tensor:
    """t, or a copy where a row does not begin at a multiple of 16 bytes. (Rows of other lengths torch itself pads.)"""
    rows = [stride for n, stride in zip(t.shape[:3], t.stride()[:3], strict=True) if n > 1]
    length = t.shape[3] * t.itemsize
    if length % 16 or not (t.data_ptr() % 16 or any(stride * t.itemsize % 16 for stride in rows)):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _fake_attention(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return tokens_outside(q), new_lse(q)


@operator(fake=_fake_attention)
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offset: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    start: int,
    scale: float,
    p: float,
    stream: int,
) -> tuple[Tensor, Tensor]:
    """(output, log2 of the sums of exponentials: see `new_lse`)."""
    if not q.numel():
        return tokens_outside(q), new_lse(q)
    return forward(q, k, v, Setting(offset, cu_seqlens, seed, causal, start, scale, p, stream))


def _fake_attention_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tokens_outside(q), tokens_outside(k), tokens_outside(v)


@operator(fake=_fake_attention_backward)
def _attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    offset: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    start: int,
    scale: float,
    p: float,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)."""
    if not o.numel() or not k.numel():
        dq, dk, dv = (tokens_outside(t).zero_() for t in (q, k, v))
        return dq, dk, dv
    setting = Setting(offset, cu_seqlens, seed, causal, start, scale, p, stream)
    gradients = tokens_outside(q), tokens_outside(k), tokens_outside(v)  # an operator's results share no memory
    return backward(do, q, k, v, o, lse, setting, gradients)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
        offset, cu_seqlens, seed, *ctx.numbers = options
        o, lse = _attention(q, k, v, *options)
        ctx.save_for_backward(q, k, v, o, lse, offset, cu_seqlens, seed)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> Any:
        q, k, v, o, lse, offset, cu_seqlens, seed = ctx.saved_tensors
        if torch.compiler.is_compiling() or q.shape[2] != k.shape[2] or not o.numel():
            gradients = _attention_backward(do, *ctx.saved_tensors, *ctx.numbers)
        else:
            setting = Setting(offset, cu_seqlens, seed, *ctx.numbers)
            gradients = backward(do, q, k, v, o, lse, setting, heads_side_by_side(q, k))
        return *gradients, *([None] * 8)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    offset: int | Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """Attention of T queries over S keys.

    q: (B, H, T, D), any strides. k, v: (B, G, S, D), H a multiple of G, D at most 256 on a GPU. offset: the position of
    the first query among the keys, an int or one a sequence, (B,) int64; by default S - T, so that the last query sees
    every key. A query that sees none gives 0. scale: 1/sqrt(D) by default.
    cu_seqlens: (n + 1,) int32 or int64, for n sequences packed one behind the other into T = S tokens: where each
    begins, from 0 to T; none sees another. dropout_p: of the weights, while training; with a seed the mask is a
    function of seed, stream, sequence, head, query and key, see `dropout`, without one it may come from torch's own
    generator.
    Returns (B, H, T, D) in q's dtype, (B, T, H, D) in memory. The backward pass gives the same bits at each call, but
    for the gradient of q on a Hopper GPU with a D up to 64, in 16 bits, without packed sequences and dropout: there
    only under torch.use_deterministic_algorithms, which takes other kernels.
    Raises ValueError for what does not fit.
    """
    q, k, v = autocast(q, k, v)
    _check(q, k, v)
    T, S = q.shape[2], k.shape[2]
    if cu_seqlens is not None and (T != S or offset not in (None, 0) or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2):
        raise ValueError(
            f"cu_seqlens is {tuple(cu_seqlens.shape)}, T {T}, S {S}, offset {offset}; expected (n + 1,), and packed "
            "sequences to be their own keys"
        )
    if not training or not drop_threshold(dropout_p)[0]:
        dropout_p, seed = 0.0, None
    if offset is None:
        offset = S - T
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    if scale <= 0:  # in the kernels the largest score is the scale times the largest product
        q, scale = q * scale, 1.0
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if not use_triton(q) or left_to_torch(q, k, seed, cu_seqlens, trains):
        theirs = torch_attention if q.is_cuda else attention_ref
        return theirs(
            q, k, v, causal=causal, offset=offset, scale=scale, cu_seqlens=cu_seqlens, dropout_p=dropout_p, seed=seed,
            stream=stream,
        )  # fmt: skip
    seed = dropout_seed(seed, dropout_p, training, q.device)
    start, given = (offset, None) if isinstance(offset, int) else (0, offset)
    arguments = (q, k, v, given, cu_seqlens, seed, causal, start, scale, dropout_p, stream)
    if trains:
        return _Attention.apply(*arguments)
    return _attention(*arguments)[0]


def left_to_torch(q: Tensor, k: Tensor, seed: Tensor | None, cu_seqlens: Tensor | None, trains: bool) -> bool:
    """Whether torch's own attention serves: where it can at all and was measured faster, or nothing was measured.

    On Hopper ours is ahead forward and backward up to a D of 64, and up to one of 128 around 4,096 keys, forward alone
    also behind; see docs/kernels/attention.md.
    """
    if forced() != "auto" or seed is not None or cu_seqlens is not None:
        return False
    if torch.compiler.is_compiling():  # a graph is for all lengths, and torch knows its own attention
        return True
    if capability(q.device) != 90 or q.itemsize != 2 or not 32 < q.shape[3] <= 128 or q.shape[2] < 256:
        return True
    if q.shape[3] <= 64:
        return not trains if q.shape[2] >= 512 else trains
    return k.shape[2] < 4096 or (trains and k.shape[2] >= 8192)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; expected (B, H, T, D) and "
            "twice (B, G, S, D)"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key/value heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; expected one dtype")
