"""Token embedding, with learned positions and dropout in the same pass: y[b, t] = drop(w[ids[b, t]] + pos[p[b, t]]).

Backward: dw[v] = sum of drop(dy[b, t]) over all b, t with ids[b, t] = v, and so for pos; see backward.py.
Numerics: sums are fp32, one rounding at the store. Traffic: forward 2 elements of y (a row read, a row written; rows of
positions are read again from the cache), backward 1 of dy per table and each table's gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedlm.kernels._backend import use_triton
from fusedlm.kernels._index_errors import check_indices, flag_index, index_flag, raise_index_errors
from fusedlm.kernels._launch import launch, rows
from fusedlm.kernels._operator import operator
from fusedlm.kernels._philox import drop_threshold, dropout_seed, dropped_ref, keep_mask, keep_mask_ref
from fusedlm.kernels._tied import TiedGradient
from fusedlm.kernels._triton import tl, triton
from fusedlm.kernels.embedding.backward import embedding_backward, positions_backward, sum_rows


def embedding_ref(
    ids: Tensor,
    weight: Tensor,
    position_weight: Tensor | None = None,
    positions: Tensor | int = 0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    x = F.embedding(ids, weight)
    if position_weight is not None:
        if isinstance(positions, int):
            x = x + position_weight[positions : positions + ids.shape[-1]]
        else:
            x = x + F.embedding(positions, position_weight)
    if seed is not None:
        threshold, scale = drop_threshold(dropout_p)
        keep = keep_mask_ref(seed, stream, ids.numel(), x.shape[-1], threshold).view(x.shape)
        x = dropped_ref(x, keep, scale)
    return x


@triton.jit(do_not_specialize=["offset", "stream", "threshold"])
def _fwd_kernel(
    ids_ptr,
    w_ptr,
    pos_w_ptr,
    pos_ptr,
    seed_ptr,
    y_ptr,
    flag_ptr,
    w_stride,
    pos_w_stride,
    pos_stride_b,
    T,
    V,
    S,
    offset,
    stream,
    threshold,
    scale,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    token = tl.cast(tl.program_id(0), tl.int64)
    cols = tl.arange(0, BLOCK_C)
    mask = cols < C
    v = tl.load(ids_ptr + token)
    bad = (v < 0) | (v >= V)
    flag_index(flag_ptr, bad, v, V)
    y = tl.load(w_ptr + tl.where(bad, 0, v) * w_stride + cols, mask=mask, other=0.0).to(tl.float32)
    if pos_w_ptr is not None:
        t = token % T
        p = t + offset if pos_ptr is None else tl.load(pos_ptr + token // T * pos_stride_b + t)
        lost = (p < 0) | (p >= S)
        flag_index(flag_ptr, lost, p, S)
        # Every sequence reads them, and they must not leave the cache for tokens' rows, or for what is written.
        at = tl.where(lost, 0, p) * pos_w_stride + cols
        y += tl.load(pos_w_ptr + at, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        bad |= lost
    if seed_ptr is not None:
        keep = keep_mask(tl.load(seed_ptr), stream, token, 0, threshold, BLOCK_C)
        y = tl.where(keep, y * scale, 0.0)
    y = tl.where(bad, float("nan"), y)
    tl.store(y_ptr + token * C + cols, y.to(y_ptr.dtype.element_ty), mask=mask, cache_modifier=".cs")


@operator(fake=lambda ids, weight, *_: weight.new_empty((*ids.shape, weight.shape[1])))
def _embedding(
    ids: Tensor,
    weight: Tensor,
    position_weight: Tensor | None,
    positions: Tensor | None,
    offset: int,
    p: float,
    seed: Tensor | None,
    stream: int,
) -> Tensor:
    V, C = weight.shape
    T = ids.shape[-1] if ids.ndim else 1
    y = torch.empty((*ids.shape, C), dtype=weight.dtype, device=weight.device)
    raise_index_errors()
    if y.numel():
        weight = rows(weight)
        position_weight = None if position_weight is None else rows(position_weight)
        positions = None if positions is None else positions.contiguous()
        S, pos_w_stride = (1, 0) if position_weight is None else (position_weight.shape[0], position_weight.stride(0))
        pos_stride = T if positions is not None and positions.ndim > 1 else 0
        tensors = (ids.contiguous(), weight, position_weight, positions, seed, y, index_flag(y.device))
        scalars = (weight.stride(0), pos_w_stride, pos_stride, T, V, S, offset, stream, *drop_threshold(p))
        block = max(triton.next_power_of_2(C), 8)
        constants = {"C": C, "BLOCK_C": block, "num_warps": min(max(block // 512, 1), 16)}
        key = (y.dtype, position_weight is None, positions is None, seed is None)
        launch(_fwd_kernel, (ids.numel(), 1, 1), key, tensors, scalars, constants)
    return y


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        weight: Tensor,
        position_weight: Tensor | None,
        positions: Tensor | None,
        offset: int,
        p: float,
        seed: Tensor | None,
        stream: int,
        tied: TiedGradient | None,
    ) -> Tensor:
        ctx.save_for_backward(ids, positions, seed)
        ctx.tied = tied
        ctx.sizes = (weight.shape[0], 0 if position_weight is None else position_weight.shape[0])
        ctx.offset, ctx.p, ctx.stream = offset, p, stream
        return _embedding(ids, weight, position_weight, positions, offset, p, seed, stream)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        ids, positions, seed = ctx.saved_tensors
        V, S = ctx.sizes
        mask = (ctx.p, seed, ctx.stream)
        dw = dpos = None
        counted = ctx.needs_input_grad[2] and positions is None
        if ctx.needs_input_grad[1]:
            dw = None if ctx.tied is None else ctx.tied.take()
            if dw is None:
                dw, sums = embedding_backward(dy, ids, V, S if counted else 0, ctx.offset, *mask)
                dpos = sums if counted else None
            else:
                dpos = dy.new_empty((S, dy.shape[-1])) if counted else None
                sum_rows(dw, dy, ids, *mask, add=True, dpos=dpos, offset=ctx.offset)
        elif counted:
            dpos = positions_backward(dy, S, ctx.offset, *mask)
        if ctx.needs_input_grad[2] and positions is not None:
            dpos, _ = embedding_backward(dy, positions.expand(dy.shape[:-1]), S, 0, 0, *mask)
        return None, dw, dpos, None, None, None, None, None, None


def embedding(
    ids: Tensor,
    weight: Tensor,
    position_weight: Tensor | None = None,
    positions: Tensor | int = 0,
    dropout_p: float = 0.0,
    training: bool = True,
    *,
    seed: Tensor | None = None,
    stream: int = 0,
    tied: TiedGradient | None = None,
) -> Tensor:
    """Rows of `weight`, plus rows of `position_weight` where one is given, with dropout.

    ids: (B, T) int64 in [0, V). weight: (V, C). position_weight: (S, C), of weight's dtype. positions: (T,) or (B, T)
    int64 in [0, S), or the position of the first token, from which on the others count. dropout_p, training, seed,
    stream: as for `dropout`. tied: see there; given to `linear_cross_entropy` too. Returns (B, T, C) in weight's dtype.

    Raises ValueError for shapes that do not fit and for ids or positions out of range: on a CPU at once; on a GPU their
    rows are NaN and a later call raises (`raise_index_errors`), for looking at once would wait for the device.
    """
    if ids.ndim != 2 or weight.ndim != 2:
        raise ValueError(f"ids have shape {tuple(ids.shape)}, weight {tuple(weight.shape)}; expected (B, T) and (V, C)")
    check_indices("token ids", ids, weight.shape[0])
    if position_weight is not None:
        _check_positions(ids, weight, position_weight, positions)
    seed = dropout_seed(seed, dropout_p, training, weight.device)
    if not use_triton(weight):
        return embedding_ref(ids, weight, position_weight, positions, dropout_p, seed, stream)
    offset, given = (positions, None) if isinstance(positions, int) else (0, positions)
    arguments = (ids, weight, position_weight, given, offset, dropout_p, seed, stream)
    tables = (weight, position_weight)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tables):
        return _Embedding.apply(*arguments, None if torch.compiler.is_compiling() else tied)
    return _embedding(*arguments)


def _check_positions(ids: Tensor, weight: Tensor, position_weight: Tensor, positions: Tensor | int) -> None:
    (S, C), T = position_weight.shape, ids.shape[1]
    if weight.shape[1] != C or position_weight.dtype != weight.dtype:
        raise ValueError(
            f"position_weight is {tuple(position_weight.shape)} {position_weight.dtype}; expected rows of "
            f"{weight.shape[1]} {weight.dtype}"
        )
    if isinstance(positions, int):
        if not 0 <= positions <= S - T:
            raise ValueError(f"{T} positions from {positions} on do not fit the {S} of position_weight")
    elif positions.shape not in (ids.shape, ids.shape[1:]):
        raise ValueError(f"positions have shape {tuple(positions.shape)}; expected {(T,)} or {tuple(ids.shape)}")
    else:
        check_indices("positions", positions, S)
