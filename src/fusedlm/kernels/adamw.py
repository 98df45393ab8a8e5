"""AdamW (Loshchilov and Hutter 2019, algorithm 2) over all tensors at once, with clipping by the global norm.

    c = min(1, max_norm / (|g| + 1e-6)),  |g| over all gradients;     t = t + 1
    m = b1 m + (1 - b1) c g,  v = b2 v + (1 - b2) (c g)^2
    w = (1 - lr wd) w - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
Numerics: loads are widened to fp32, bias corrections are fp64, one rounding at each store. Norms are fp32 sums in a
fixed order. Traffic, in elements: 7 per parameter (w, m, v read and written, g read), 8 with clipping (g read twice).
A table on the device tells kernels where each tensor is, so that one launch does them all; it is uploaded anew only
when addresses have changed. Nothing waits for the GPU.
"""

import functools
import math
import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fusedlm.kernels._backend import interpreting, use_triton
from fusedlm.kernels._launch import launch
from fusedlm.kernels._triton import tl, triton

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def adamw_ref(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor | None] | None = None,
    *,
    step: Tensor | Sequence[Tensor],
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    clip: float | Tensor = 1.0,
) -> None:
    steps = [step] * len(params) if isinstance(step, Tensor) else step
    for s in {id(s): s for s in steps}.values():
        s += 1
    for p, g, m, v, w, s in zip(params, grads, exp_avgs, exp_avg_sqs, masters or params, steps, strict=True):
        wide, t = torch.promote_types(p.dtype, torch.float32), s.double().reshape(())
        g, x = clip * g.to(wide), (p if w is None else w).to(wide)
        m.copy_(new_m := betas[0] * m.to(wide) + (1 - betas[0]) * g)
        v.copy_(new_v := betas[1] * v.to(wide) + (1 - betas[1]) * g * g)
        root = new_v.sqrt() / (1 - betas[1] ** t).sqrt() + eps
        x = x * (1 - lr * weight_decay) - lr / (1 - betas[0] ** t) * (new_m / root)
        for out in (p,) if w is None else (p, w):
            out.copy_(x)


def global_norm_ref(tensors: Sequence[Tensor]) -> Tensor:
    squares = [t.to(torch.promote_types(t.dtype, torch.float32)).square().sum() for t in tensors]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())


@triton.jit
def _at(address, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer to element `start` of the tensor at an address; start is a multiple of a block."""
    if DTYPE == "fp32":
        pointer = address.to(tl.pointer_type(tl.float32)) + start
    elif DTYPE == "bf16":
        pointer = address.to(tl.pointer_type(tl.bfloat16)) + start
    else:
        pointer = address.to(tl.pointer_type(tl.float16)) + start
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _squares_kernel(
    addresses_ptr,
    chunks_ptr,
    partial_ptr,
    first,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # The sum of squares of one chunk: (number of the tensor, number of the chunk in it, elements, unused).
    pid = tl.program_id(0)
    i = tl.load(chunks_ptr + pid * 4)
    start = tl.load(chunks_ptr + pid * 4 + 1).to(tl.int64) * BLOCK_N
    left = tl.load(chunks_ptr + pid * 4 + 2)
    if ALIGNED:
        left = tl.multiple_of(left, 16)  # or else the mask would keep the compiler from wide loads
    at = tl.arange(0, BLOCK_N)
    g_ptr = _at(tl.load(addresses_ptr + i), start, GRAD, ALIGNED)
    g = tl.load(g_ptr + at, mask=at < left, other=0.0).to(tl.float32)
    tl.store(partial_ptr + first + pid, tl.sum(g * g, 0))


@triton.jit
def _sum_kernel(partial_ptr, bounds_ptr, out_ptr, SQRT: tl.constexpr, BLOCK_P: tl.constexpr):
    # Program j adds up the partial sums from bounds[j] to bounds[j + 1], always in the same order.
    pid = tl.program_id(0)
    start, end = tl.load(bounds_ptr + pid), tl.load(bounds_ptr + pid + 1)
    total = tl.zeros((BLOCK_P,), tl.float32)
    for block in range(start, end, BLOCK_P):
        at = block + tl.arange(0, BLOCK_P)
        total += tl.load(partial_ptr + at, mask=at < end, other=0.0)
    result = tl.sum(total, 0)
    if SQRT:
        result = tl.sqrt(result)
    tl.store(out_ptr + pid, result)


@triton.jit
def _double(pointer, mask):
    return tl.load(pointer, mask=mask, other=0).to(tl.float64, bitcast=True)  # the table is one of int64


@triton.jit
def _prepare_kernel(
    table_ptr, addresses_ptr, hyper_ptr, norm_ptr, skipped_ptr, out_ptr, T, max_norm, BLOCK_T: tl.constexpr
):
    # One program: from steps, hyperparameters and norm to the eight numbers that the update of each tensor needs.
    clip = 1.0
    run = 1
    if norm_ptr is not None:
        norm = tl.load(norm_ptr)
        clip = max_norm / (norm + 1e-6)
        clip = tl.where(clip > 1.0, 1.0, clip)  # stays NaN where the norm is, as in torch
        if skipped_ptr is not None:
            run = (tl.abs(norm) < float("inf")).to(tl.int32)
            tl.store(skipped_ptr, tl.load(skipped_ptr) + 1 - run)
    for start in range(0, T, BLOCK_T):
        i = start + tl.arange(0, BLOCK_T)
        mask = i < T
        step_ptr = tl.load(table_ptr + i * 8 + 4, mask=mask, other=0).to(tl.pointer_type(tl.float32))
        t = tl.load(step_ptr, mask=mask, other=0.0).to(tl.float64) + 1.0
        group = tl.load(table_ptr + i * 8 + 5, mask=mask, other=0)
        h_ptr = hyper_ptr + group * 8
        lr_address = tl.load(addresses_ptr + T + group, mask=mask, other=0)  # 0 where lr is a number of the host's
        lr_ptr = lr_address.to(tl.pointer_type(tl.float32))
        lr = tl.load(lr_ptr, mask=lr_address != 0, other=0.0).to(tl.float64) + _double(h_ptr, mask)
        correction1 = 1.0 - tl.exp(t * _double(h_ptr + 1, mask))
        root2 = tl.sqrt(1.0 - tl.exp(t * _double(h_ptr + 2, mask)))
        eps = _double(h_ptr + 5, mask)
        decay = 1.0 - lr * _double(h_ptr + 6, mask)
        sign = _double(h_ptr + 7, mask).to(tl.float32)
        out = out_ptr + i * 8
        tl.store(out, clip * sign, mask=mask)
        tl.store(out + 1, decay.to(tl.float32), mask=mask)
        tl.store(out + 2, _double(h_ptr + 3, mask).to(tl.float32), mask=mask)
        tl.store(out + 3, _double(h_ptr + 4, mask).to(tl.float32), mask=mask)
        # lr / correction1 * m / (sqrt(v) / root2 + eps), with one root and one division an element
        tl.store(out + 4, (lr * root2 / correction1).to(tl.float32), mask=mask)
        tl.store(out + 5, (eps * root2).to(tl.float32), mask=mask)
        tl.store(out + 6, 1.0 * run, mask=mask)
    tl.debug_barrier()  # every step is read before any is advanced, for tensors may share one
    for start in range(0, T, BLOCK_T):
        i = start + tl.arange(0, BLOCK_T)
        step_ptr = tl.load(table_ptr + i * 8 + 4, mask=i < T, other=0).to(tl.pointer_type(tl.float32))
        first = tl.load(table_ptr + i * 8 + 6, mask=i < T, other=0) != 0  # of those that share it
        tl.store(step_ptr, tl.load(step_ptr, mask=first, other=0.0) + run, mask=first)


@triton.jit
def _update_kernel(
    table_ptr,
    addresses_ptr,
    chunks_ptr,
    coefficients_ptr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    i = tl.load(chunks_ptr + pid * 4)
    start = tl.load(chunks_ptr + pid * 4 + 1).to(tl.int64) * BLOCK_N
    left = tl.load(chunks_ptr + pid * 4 + 2)
    c_ptr = coefficients_ptr + i * 8
    left = tl.where(tl.load(c_ptr + 6) != 0.0, left, 0)  # a skipped step
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    at = tl.arange(0, BLOCK_N)
    mask = at < left
    p_ptr = _at(tl.load(table_ptr + i * 8), start, PARAM, ALIGNED) + at
    m_ptr = _at(tl.load(table_ptr + i * 8 + 1), start, EXP_AVG, ALIGNED) + at
    v_ptr = _at(tl.load(table_ptr + i * 8 + 2), start, EXP_AVG_SQ, ALIGNED) + at
    g_ptr = _at(tl.load(addresses_ptr + i), start, GRAD, ALIGNED) + at
    w_ptr = _at(tl.load(table_ptr + i * 8 + 3), start, "fp32", ALIGNED) + at if HAS_MASTER else p_ptr
    g = tl.load(g_ptr, mask=mask, other=0.0).to(tl.float32) * tl.load(c_ptr)
    w = tl.load(w_ptr, mask=mask, other=0.0).to(tl.float32) * tl.load(c_ptr + 1)
    m = tl.load(m_ptr, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr, mask=mask, other=0.0).to(tl.float32)
    m += tl.load(c_ptr + 2) * (g - m)
    v += tl.load(c_ptr + 3) * (g * g - v)
    w -= tl.load(c_ptr + 4) * m / (tl.sqrt(v) + tl.load(c_ptr + 5))
    tl.store(m_ptr, m.to(m_ptr.dtype.element_ty), mask=mask)
    tl.store(v_ptr, v.to(v_ptr.dtype.element_ty), mask=mask)
    tl.store(p_ptr, w.to(p_ptr.dtype.element_ty), mask=mask)
    if HAS_MASTER:
        tl.store(w_ptr, w, mask=mask)


@functools.cache
def _config(name: str) -> dict[str, int]:
    """Constants of a kernel: 8 elements a thread where every one is read and written, 64 where it is only read."""
    if interpreting():
        return {"BLOCK_N": 128, "num_warps": 4}
    return {"BLOCK_N": 1024, "num_warps": 4} if name == "update" else {"BLOCK_N": 16384, "num_warps": 8}


@dataclass(frozen=True)
class _Tensors:
    """What a step works on, local tensors only. groups: of each tensor, the number of its set of hyperparameters."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    masters: list[Tensor | None]
    steps: list[Tensor]
    groups: list[int]

    def written(self) -> Iterable[tuple[str, Sequence[Tensor | None]]]:
        yield from (("params", self.params), ("exp_avgs", self.exp_avgs))
        yield from (("exp_avg_sqs", self.exp_avg_sqs), ("masters", self.masters))

    def check(self) -> None:
        """Raise ValueError where lengths, shapes, dtypes or devices do not fit."""
        T = len(self.params)
        for name, listed in (*self.written(), ("grads", self.grads), ("step", self.steps)):
            if len(listed) != T:
                raise ValueError(f"{name} has {len(listed)} tensors; expected one for each of the {T} params")
            for i, (t, p) in enumerate(zip(listed, self.params, strict=True)):
                if t is None:
                    continue
                if t.device != self.params[0].device:
                    raise ValueError(f"{name}[{i}] is on {t.device}; expected {self.params[0].device}, as params[0] is")
                if name == "step":
                    if t.numel() != 1 or t.dtype != torch.float32:
                        raise ValueError(f"step is {tuple(t.shape)} {t.dtype}; expected one element of torch.float32")
                elif t.shape != p.shape:
                    raise ValueError(
                        f"{name}[{i}] has shape {tuple(t.shape)}; expected {tuple(p.shape)}, params[{i}]'s"
                    )
                elif t.layout != torch.strided or not t.is_floating_point():
                    raise ValueError(f"{name}[{i}] is {t.layout} {t.dtype}; expected a dense tensor of real numbers")
                elif name == "masters" and t.dtype not in (torch.float32, torch.float64):
                    raise ValueError(f"masters[{i}] is {t.dtype}; expected torch.float32")

    def check_kernel(self) -> None:
        """Raise ValueError for what the kernels, which go through memory from end to end, cannot do."""
        for name, listed in (*self.written(), ("grads", self.grads)):
            for i, (t, p) in enumerate(zip(listed, self.params, strict=True)):
                if t is None:
                    continue
                if t.dtype not in _DTYPES or (name == "masters" and t.dtype != torch.float32):
                    raise ValueError(f"{name}[{i}] is {t.dtype}; the kernels take {', '.join(map(str, _DTYPES))}")
                if not _dense(t) or not _same_order(t, p):
                    raise ValueError(
                        f"{name}[{i}] has shape {tuple(t.shape)} and strides {t.stride()}; expected a tensor without "
                        f"gaps, and one order of dimensions in params, exp_avgs, exp_avg_sqs and masters"
                    )


def _pointers(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _contiguous(tensors: Sequence[Tensor]) -> bool:
    return all(map(Tensor.is_contiguous, tensors))


def _dense(t: Tensor) -> bool:
    """Whether t fills its piece of memory, in some order of dimensions."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _same_order(t: Tensor, p: Tensor) -> bool:
    return (t.is_contiguous() and p.is_contiguous()) or t.stride() == p.stride()


@dataclass(frozen=True)
class _Launch:
    """A launch over some chunks: a row of four numbers each. first: of its chunks among those of its kernel."""

    chunks: Tensor
    constants: dict[str, Any]
    first: int


@dataclass(frozen=True)
class _Plan:
    """What is to be launched, and the tables of it on the device, for tensors that stay where they are.

    Only the gradients may move. table: (T, 8): the addresses of param, exp_avg, exp_avg_sq, master and step, the group,
    whether this is the first tensor with its step, unused. bounds: between the partial sums of squares of each slot.
    """

    key: Any
    table: Tensor
    bounds: Tensor
    squares: list[_Launch]
    updates: list[_Launch]
    partials: int


class Workspace:
    """The tables that `adamw` and `global_norm` keep on the device from call to call. Give each set of tensors its own.

    A CUDA graph reads the tables it was captured with: the workspace (an `AdamW` has one) must live as long as it.
    """

    def __init__(self) -> None:
        self._plan: _Plan | None = None
        self._uploaded: tuple[Any, Tensor, Tensor] | None = None
        self._kept: list[Any] = []  # what captured graphs read
        self._spare: Tensor | None = None  # pinned memory for a capture, in which allocating it may be forbidden

    def plan(self, t: _Tensors, slots: list[int]) -> _Plan:
        """The plan for these tensors: that of the last call where it fits."""
        written = [_pointers(t.params), _pointers(t.exp_avgs), _pointers(t.exp_avg_sqs)]
        written.append([0 if w is None else w.data_ptr() for w in t.masters])
        steps, sizes = _pointers(t.steps), list(map(Tensor.numel, t.grads))
        aligned = [not a & 15 for a in _pointers(t.grads)]
        key = (written, steps, t.groups, slots, aligned, sizes, [g.dtype for g in t.grads])
        capturing = _capturing(t.grads[0].device)
        if self._plan is None or self._plan.key != key:
            if t.params:
                t.check()
                t.check_kernel()
            plan = self._build(key, t, slots)
            if capturing:  # its tables are not there before the graph runs, so it is of no use outside of it
                self._kept.append(plan)
                return plan
            self._plan = plan
        if capturing:
            self._kept.append(self._plan)
        return self._plan

    def _build(self, key: Any, t: _Tensors, slots: list[int]) -> _Plan:
        device = t.grads[0].device
        written, steps, _, _, grads_aligned, sizes = key[:6]
        updates: dict[Any, list[int]] = {}
        squares: dict[Any, list[int]] = {}
        for i, g in enumerate(t.grads):
            if not g.numel():
                continue
            whole = g.numel() % 16 == 0 and grads_aligned[i]
            squares.setdefault((slots[i], _DTYPES[g.dtype], whole), []).append(i)
            if t.params:
                p, m, v, w = t.params[i], t.exp_avgs[i], t.exp_avg_sqs[i], t.masters[i]
                names = tuple([_DTYPES[x.dtype] for x in (p, g, m, v)])
                aligned = whole and not any(column[i] % 16 for column in written)
                updates.setdefault((*names, w is not None, aligned), []).append(i)
        launches: list[_Launch] = []
        bounds, total = [0], 0
        for slot in range(max(slots) + 1):
            for (at, name, aligned), members in squares.items():
                if at == slot:
                    constants = {"GRAD": name, "ALIGNED": aligned, **_config("squares")}
                    chunks = _chunks(members, sizes, constants["BLOCK_N"])
                    launches.append(_Launch(self._upload(chunks, device), constants, total))
                    total += len(chunks)
            bounds.append(total)
        planned = []
        names_of = ("PARAM", "GRAD", "EXP_AVG", "EXP_AVG_SQ", "HAS_MASTER", "ALIGNED")
        for combination, members in updates.items():
            constants = {**dict(zip(names_of, combination, strict=True)), **_config("update")}
            chunks = _chunks(members, sizes, constants["BLOCK_N"])
            planned.append(_Launch(self._upload(chunks, device), constants, 0))
        seen: set[int] = set()
        first = [not (s in seen or seen.add(s)) for s in steps]  # type: ignore[func-returns-value]
        rows = list(zip(*written, steps, t.groups, first, [0] * len(steps), strict=True))
        table = torch.tensor(rows, dtype=torch.int64, device="cpu")
        host_bounds = torch.tensor(bounds, dtype=torch.int64, device="cpu")
        return _Plan(key, self._upload(table, device), self._upload(host_bounds, device), launches, planned, total)

    def addresses(self, numbers: Sequence[int], hyper: Sequence[float], device: torch.device) -> tuple[Tensor, Tensor]:
        """Both on the device; uploaded where they are not what the last call had."""
        capturing = _capturing(device)
        key = (numbers, hyper)
        if self._uploaded is None or self._uploaded[0] != key:
            whole = bytearray(array("q", numbers))
            whole += bytes(-len(whole) % 16) + array("d", hyper).tobytes()
            sent = self._upload(torch.frombuffer(whole, dtype=torch.int64), device)
            uploaded = (key, sent, sent[len(sent) - len(hyper) :])
            if capturing:
                return uploaded[1:]
            self._uploaded = uploaded
        if capturing:
            self._kept.append(self._uploaded)
        return self._uploaded[1:]

    def _upload(self, host: Tensor, device: torch.device) -> Tensor:
        """host on the device, in memory of its own, without waiting.

        torch does not hand out pinned memory again before the copies from it are done, so every upload takes its own. A
        captured copy reads it at each replay, so there it is kept.
        """
        if device.type != "cuda":
            return host.to(device)
        if not _capturing(device):
            if self._spare is None:
                self._spare = torch.empty(2**16, dtype=torch.int64, device="cpu", pin_memory=True)
            return host.pin_memory().to(device, non_blocking=True)
        staged, spare = None, self._spare
        if spare is not None and spare.numel() * 8 >= host.nbytes + 16:
            staged = spare[: host.nbytes // 8].view(host.dtype).view(host.shape).copy_(host)
            self._spare = spare[-(-host.nbytes // 16) * 2 :]
        else:
            staged = host.pin_memory()
        self._kept.append(staged)
        return staged.to(device, non_blocking=True)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _chunks(members: list[int], sizes: list[int], block: int) -> Tensor:
    """(C, 4): for each chunk the number of its tensor, its own number in it, its elements, unused."""
    counts = torch.tensor([-(-sizes[i] // block) for i in members], device="cpu")
    tensor = torch.tensor(members, device="cpu").repeat_interleave(counts)
    number = torch.arange(len(tensor), device="cpu") - (counts.cumsum(0) - counts).repeat_interleave(counts)
    left = torch.tensor([sizes[i] for i in members], device="cpu").repeat_interleave(counts) - number * block
    return torch.stack((tensor, number, left.clamp(max=block), 0 * left), 1).to(torch.int32)


def _dtensor(tensors: Sequence[Any]) -> Any:
    """DTensor's type where there is one among the tensors, or None. Importing it takes long, so nothing here does."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind if kind is not None and any(issubclass(t, kind) for t in set(map(type, tensors))) else None


def _local(tensors: Sequence[Any]) -> list[Any]:
    """This process's shard of each DTensor, anything else as it is."""
    kind = _dtensor(tensors)
    if kind is None:
        return list(tensors)
    return [t.to_local() if isinstance(t, kind) else t for t in tensors]


def _slots(tensors: Sequence[Any]) -> tuple[list[int], list[tuple[Any, ...]]]:
    """For each tensor, the number of the sum its squares belong to; for each sum, over which groups it is added up.

    Shards add up over their mesh dimension; replicas and plain tensors are whole.
    """
    kind = _dtensor(tensors)
    if kind is None:
        return [0] * len(tensors), [()]
    numbers: dict[Any, int] = {}
    slots = []
    for t in tensors:
        layout = (t.device_mesh, t.placements) if isinstance(t, kind) else None
        slots.append(numbers.setdefault(layout, len(numbers)))
    groups: list[tuple[Any, ...]] = []
    for layout in numbers:
        if layout is None:
            groups.append(())
            continue
        mesh, placements = layout
        if any(p.is_partial() for p in placements):
            raise ValueError(f"a gradient has placements {placements}; expected it to be reduced: Shard or Replicate")
        groups.append(tuple(mesh.get_group(d) for d, p in enumerate(placements) if not p.is_replicate()))
    return slots, groups


def _norm(
    tensors: list[Tensor], slots: list[int], groups: list[tuple[Any, ...]], tables: tuple[_Plan, Tensor] | None
) -> Tensor:
    """The norm over all processes; of kernels where there are tables, else of torch."""
    alone = not any(groups)
    if tables is None:
        if alone:
            return global_norm_ref(tensors).to(tensors[0].device)
        members = [[t for t, at in zip(tensors, slots, strict=True) if at == slot] for slot in range(len(groups))]
        sums = torch.stack([global_norm_ref(m).square() for m in members])
    else:
        plan, addresses = tables
        partial = torch.empty(max(plan.partials, 1), dtype=torch.float32, device=addresses.device)
        for part in plan.squares:
            grid = (len(part.chunks), 1, 1)
            launch(_squares_kernel, grid, None, (addresses, part.chunks, partial), (part.first,), part.constants)
        sums = torch.empty(len(groups), dtype=torch.float32, device=addresses.device)
        constants = {"SQRT": alone, "BLOCK_P": 4096, "num_warps": 8}
        launch(_sum_kernel, (len(groups), 1, 1), None, (partial, plan.bounds, sums), (), constants)
        if alone:
            return sums[0]
    for slot, over in enumerate(groups):
        for group in over:
            torch.distributed.all_reduce(sums[slot : slot + 1], group=group)
    return sums.sum().sqrt()


@torch.no_grad()
def global_norm(tensors: Iterable[Tensor], *, workspace: Workspace | None = None) -> Tensor:
    """The 2-norm of all elements of all tensors, as `torch.nn.utils.get_total_norm`. Nothing waits for the GPU.

    tensors: any shapes, strides and dtypes, on one device; DTensors are summed over their mesh, once for each kind of
    placement. workspace: see `adamw`. Returns a scalar in float32 (float64 of float64) on their device, the same bits
    at each call. Like every sum of squares in fp32 it is infinite from 1.8e19 on. Raises ValueError where devices or
    dtypes do not fit, and for DTensors that are partial sums.
    """
    given = list(tensors)
    slots, groups = _slots(given)
    local = _local(given)
    if not local:
        return torch.zeros(())
    for i, t in enumerate(local):
        if t.device != local[0].device:
            raise ValueError(f"tensors[{i}] is on {t.device}; expected {local[0].device}, as tensors[0] is")
    if not use_triton(local[0]):
        return _norm(local, slots, groups, None)
    for i, t in enumerate(local):
        if t.dtype not in _DTYPES:
            raise ValueError(f"tensors[{i}] is {t.dtype}; the kernels take {', '.join(map(str, _DTYPES))}")
    dense = [t if _dense(t) else t.contiguous() for t in local]
    workspace = _workspace(workspace, dense[0].device)
    plan = workspace.plan(_Tensors([], dense, [], [], [], [], []), slots)
    addresses, _ = workspace.addresses(_pointers(dense), (), dense[0].device)
    return _norm(dense, slots, groups, (plan, addresses))


def _workspace(given: Workspace | None, device: torch.device) -> Workspace:
    if given is None and _capturing(device):
        raise ValueError("no workspace is given while a CUDA graph is captured; expected one that outlives the graph")
    return given or Workspace()


@dataclass(frozen=True)
class _Hyper:
    """The hyperparameters of some tensors."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    maximize: bool = False

    def check(self) -> None:
        if isinstance(self.lr, Tensor) and self.lr.numel() != 1:
            raise ValueError(f"lr has shape {tuple(self.lr.shape)}; expected one element")
        for name, value in (("lr", self.lr), ("eps", self.eps), ("weight_decay", self.weight_decay)):
            if not isinstance(value, Tensor) and not value >= 0:
                raise ValueError(f"{name} is {value}; expected 0 or more")
        for i, beta in enumerate(self.betas):
            if not 0 <= beta < 1:
                raise ValueError(f"betas[{i}] is {beta}; expected 0 <= beta < 1")

    def numbers(self) -> list[float]:
        """A row of the table: what must not be rounded to fp32 before it is subtracted from 1, computed here."""
        lr = 0.0 if isinstance(self.lr, Tensor) else self.lr
        b1, b2 = self.betas
        log1, log2 = (math.log(b) if b else -math.inf for b in (b1, b2))
        return [lr, log1, log2, 1 - b1, 1 - b2, self.eps, self.weight_decay, -1.0 if self.maximize else 1.0]

    def on(self, device: torch.device) -> "_Hyper":
        """With lr a float, or float32 on the device."""
        if not isinstance(self.lr, Tensor):
            return self
        lr = float(self.lr) if self.lr.device.type == "cpu" != device.type else self.lr.to(device, torch.float32)
        return replace(self, lr=lr)


@dataclass(frozen=True)
class _Clip:
    """max_norm None: do not clip. norm: where it is known. out: where to write it. skipped: counts what was skipped."""

    max_norm: float | None
    norm: Tensor | None
    out: Tensor | None
    skip_nonfinite: bool
    skipped: Tensor | None


def _step(
    t: _Tensors, hypers: list[_Hyper], clip: _Clip, slots: list[int], over: list[Any], workspace: Workspace | None
) -> Tensor | None:
    """One step over at least one tensor, by kernels or by torch. Returns the norm where it was needed."""
    device = t.params[0].device
    kernels = use_triton(t.params[0])
    for name, x in (("total_norm", clip.norm), ("skipped", clip.skipped)):
        if x is not None and (x.device != device or x.numel() != 1):
            raise ValueError(f"{name} is {tuple(x.shape)} on {x.device}; expected one element on {device}")
    norm = clip.norm
    wanted = clip.max_norm is not None or clip.skip_nonfinite
    if not kernels:
        t.check()
        if wanted and norm is None:
            norm = _norm(t.grads, slots, over, None)
            norm = norm if clip.out is None else clip.out.copy_(norm)
        _step_by_torch(t, hypers, clip, norm)
        return norm
    if not (_contiguous(t.grads) and _contiguous(t.params)):
        grads = [g if _same_order(g, p) else _reordered(g, p) for g, p in zip(t.grads, t.params, strict=True)]
        t = replace(t, grads=grads)
    workspace = _workspace(workspace, device)
    plan = workspace.plan(t, slots)
    here = [h.on(device) for h in hypers]
    numbers = _pointers(t.grads)
    numbers += [h.lr.data_ptr() if isinstance(h.lr, Tensor) else 0 for h in here]
    addresses, hyper = workspace.addresses(numbers, [x for h in here for x in h.numbers()], device)
    if wanted and norm is None:
        norm = _norm(t.grads, slots, over, (plan, addresses))
        norm = norm if clip.out is None else clip.out.copy_(norm)
    used = norm.to(torch.float32) if norm is not None and wanted else None
    skipped = clip.skipped if clip.skip_nonfinite else None
    coefficients = torch.empty((len(t.grads), 8), dtype=torch.float32, device=device)
    tensors = (plan.table, addresses, hyper, used, skipped, coefficients)
    max_norm = math.inf if clip.max_norm is None else float(clip.max_norm)
    constants = {"BLOCK_T": 128, "num_warps": 4}
    launch(_prepare_kernel, (1, 1, 1), (used is None, skipped is None), tensors, (len(t.grads), max_norm), constants)
    for part in plan.updates:
        grid = (len(part.chunks), 1, 1)
        launch(_update_kernel, grid, None, (plan.table, addresses, part.chunks, coefficients), (), part.constants)
    if device.type == "cuda":
        torch.autograd.graph.increment_version(t.params)  # as an operator of torch's that writes them would
    return norm


def _reordered(g: Tensor, p: Tensor) -> Tensor:
    """A copy of the gradient with its parameter's order of dimensions; itself where it does not fit."""
    return torch.empty_like(p, dtype=g.dtype).copy_(g) if g.shape == p.shape and g.device == p.device else g


def _step_by_torch(t: _Tensors, hypers: list[_Hyper], clip: _Clip, norm: Tensor | None) -> None:
    scale: float | Tensor = 1.0
    if norm is not None and clip.skip_nonfinite and not norm.isfinite():
        assert clip.skipped is not None
        clip.skipped.add_(1)
        return
    if norm is not None and clip.max_norm is not None:
        scale = (clip.max_norm / (norm + 1e-6)).clamp(max=1.0)
    lists = (t.params, t.grads, t.exp_avgs, t.exp_avg_sqs, t.masters)
    for number, h in enumerate(hypers):
        chosen = [i for i, group in enumerate(t.groups) if group == number]
        adamw_ref(
            *[[listed[i] for i in chosen] for listed in lists],  # type: ignore[arg-type]
            step=[t.steps[i] for i in chosen],
            lr=h.lr.reshape(()) if isinstance(h.lr, Tensor) else h.lr,
            betas=h.betas,
            eps=h.eps,
            weight_decay=h.weight_decay,
            clip=-scale if h.maximize else scale,
        )


@torch.no_grad()
def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor | None] | None = None,
    *,
    step: Tensor | Sequence[Tensor],
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    max_norm: float | None = None,
    total_norm: Tensor | None = None,
    skip_nonfinite: bool = False,
    skipped: Tensor | None = None,
    workspace: Workspace | None = None,
) -> Tensor | None:
    """One step of AdamW (Loshchilov and Hutter 2019, algorithm 2), in place, over all tensors in few launches.

    params, exp_avgs, exp_avg_sqs: float32, bfloat16 or float16 (on a CPU float64 too), without gaps in memory; grads:
    the same dtypes, any strides; masters: None, or for each parameter its float32 copy, which is then what is updated
    and rounded to the parameter, or None. All of one device; of DTensors, this process's shards.
    step: steps done so far, one element of float32, one for all or one for each; advanced on the device. lr: a number,
    or one element on the device or the CPU. maximize: go up instead of down.
    max_norm: scale gradients as `torch.nn.utils.clip_grad_norm_` does; they are not written to. total_norm: their norm
    where it is known, else it is computed (see `global_norm`). skip_nonfinite: where the norm is infinite or NaN change
    nothing but skipped, one element of int64, which counts up.
    workspace: keeps tables from call to call, which saves host time; needed while a CUDA graph is captured.

    Returns the norm, a scalar on the device; None where neither max_norm nor skip_nonfinite asks for one. Raises
    ValueError where lengths, shapes, dtypes, devices or memory layouts do not fit.
    """
    if torch.compiler.is_compiling():
        return _compiled_adamw(
            params, grads, exp_avgs, exp_avg_sqs, masters, step, lr, betas, eps, weight_decay, maximize, max_norm,
            total_norm, skip_nonfinite, skipped,
        )  # fmt: skip
    hyper = _Hyper(lr, betas, eps, weight_decay, maximize)
    hyper.check()
    _check_clip(max_norm, skip_nonfinite, skipped)
    T = len(params)
    slots, over = _slots(grads)
    t = _Tensors(
        _local(params),
        _local(grads),
        _local(exp_avgs),
        _local(exp_avg_sqs),
        _local([None] * T if masters is None else masters),
        [step] * T if isinstance(step, Tensor) else list(step),
        [0] * T,
    )
    if not T:
        return None
    if len(t.grads) != T:
        raise ValueError(f"grads has {len(t.grads)} tensors; expected one for each of the {T} params")
    return _step(t, [hyper], _Clip(max_norm, total_norm, None, skip_nonfinite, skipped), slots, over, workspace)


def _check_clip(max_norm: float | None, skip_nonfinite: bool, skipped: Tensor | None) -> None:
    if max_norm is not None and not max_norm >= 0:
        raise ValueError(f"max_norm is {max_norm}; expected 0 or more, or None")
    if skip_nonfinite and (skipped is None or skipped.numel() != 1 or skipped.dtype != torch.int64):
        what = "None" if skipped is None else f"{tuple(skipped.shape)} {skipped.dtype}"
        raise ValueError(f"skipped is {what}; expected one element of torch.int64 where skip_nonfinite is asked for")


# Under torch.compile a step is one opaque operator. It has no room for a None in a list or for a workspace.
@torch.library.custom_op(
    "fusedlm::adamw_", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "masters", "steps", "skipped")
)
def _adamw_op(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    steps: list[Tensor],
    skipped: list[Tensor],
    lr_tensor: Tensor | None,
    total_norm: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    max_norm: float | None,
    skip_nonfinite: bool,
) -> Tensor:
    """masters: empty where there are none, and an empty one for a parameter that has none. Returns the norm, or 0."""
    norm = adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [w if w.numel() == p.numel() else None for w, p in zip(masters, params, strict=True)] if masters else None,
        step=steps if len(steps) == len(params) else steps[0],
        lr=lr if lr_tensor is None else lr_tensor,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
        max_norm=max_norm,
        total_norm=total_norm,
        skip_nonfinite=skip_nonfinite,
        skipped=skipped[0] if skipped else None,
    )
    return torch.zeros((), device=params[0].device) if norm is None or norm is total_norm else norm


@_adamw_op.register_fake
def _(params: Any, grads: Any, *_: Any) -> Tensor:
    return params[0].new_empty((), dtype=torch.promote_types(grads[0].dtype, torch.float32))


def _compiled_adamw(
    params: Any, grads: Any, exp_avgs: Any, exp_avg_sqs: Any, masters: Any, step: Any, lr: Any, betas: Any, eps: float,
    weight_decay: float, maximize: bool, max_norm: float | None, total_norm: Any, skip_nonfinite: bool, skipped: Any,
) -> Tensor | None:  # fmt: skip
    lists = [list(listed) for listed in (params, grads, exp_avgs, exp_avg_sqs)]
    if not lists[0]:
        return None
    none = [p.new_empty(0) if w is None else w for w, p in zip(masters or (), params, strict=masters is not None)]
    steps = [step] if isinstance(step, Tensor) else list(step)
    device_lr = lr if isinstance(lr, Tensor) else None
    found = torch.ops.fusedlm.adamw_(
        *lists, none, steps, [] if skipped is None else [skipped], device_lr, total_norm,
        0.0 if device_lr is not None else lr, *betas, eps, weight_decay, maximize, max_norm, skip_nonfinite,
    )  # fmt: skip
    if max_norm is None and not skip_nonfinite:
        return total_norm
    return found if total_norm is None else total_norm


class AdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW` on the kernels of `adamw`: the same arguments, groups, schedulers and state.

    params, lr, betas, eps, weight_decay, maximize: as in torch; lr may be a tensor of one element, which a scheduler
    then writes to and a CUDA graph reads anew at each replay. foreach, capturable, fused: accepted and without effect,
    for there is one implementation, and it can be captured. amsgrad, differentiable: must be False.
    max_norm: clip gradients by their global norm over all groups, without writing to them; `total_norm` is then that
    of the last step, a scalar on the device. skip_nonfinite: where the norm is infinite or NaN, change nothing and
    count the step in `skipped`, on the device.
    master_weights: a parameter narrower than float32 gets a float32 copy, state "master", that is updated in its place
    and rounded to it. state_dtype: of exp_avg and exp_avg_sq.

    The state is torch's (exp_avg, exp_avg_sq, step), so state dicts go both ways. DTensors keep DTensors as their
    state. To capture a step in a CUDA graph, take one before; the optimizer must live as long as the graph.
    Raises ValueError for arguments out of range, and in `step` as `adamw` does.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        master_weights: bool = True,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        if differentiable:
            raise ValueError("differentiable is True; expected False: steps are not differentiated through")
        if max_norm is not None and not max_norm >= 0:
            raise ValueError(f"max_norm is {max_norm}; expected 0 or more, or None")
        if not state_dtype.is_floating_point:
            raise ValueError(f"state_dtype is {state_dtype}; expected a floating-point one")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,
        }
        self.max_norm = max_norm
        self.skip_nonfinite = skip_nonfinite
        self.master_weights = master_weights
        self.state_dtype = state_dtype
        self.total_norm: Tensor | None = None
        self.skipped: Tensor | None = None
        self._workspace = Workspace()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check_group(group)

    def __getstate__(self) -> dict[str, Any]:
        names = ("max_norm", "skip_nonfinite", "master_weights", "state_dtype", "total_norm", "skipped")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_workspace", Workspace())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of an AdamW, this one or torch's. Raises ValueError where it does not fit."""
        for group in state_dict["param_groups"]:
            _check_group(group)
        super().load_state_dict(state_dict)
        # torch casts states to the dtype of their parameter, and leaves steps on the CPU; here they have their own.
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, p in zip(saved, (p for group in self.param_groups for p in group["params"]), strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if name in ("exp_avg", "exp_avg_sq"):
                    self.state[p][name] = value.to(p.device, self.state_dtype)
                elif name == "master":
                    self.state[p][name] = value.to(p.device, torch.float32)
                elif name == "step":
                    self.state[p][name] = torch.as_tensor(value, dtype=torch.float32).to(p.device)

    def _init_state(self, p: Tensor, state: dict[str, Any]) -> None:
        if _capturing(p.device):
            raise ValueError("a parameter has no state while a CUDA graph is captured; expected a step before")
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(p, dtype=self.state_dtype, memory_format=torch.preserve_format)
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        if self.master_weights and "master" not in state and p.dtype in (torch.bfloat16, torch.float16):
            state["master"] = p.detach().to(torch.float32, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. closure: computes the loss anew; its result is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params, grads, states, groups, hypers = [], [], [], [], []
        narrow = (torch.bfloat16, torch.float16) if self.master_weights else ()
        for number, group in enumerate(self.param_groups):
            betas = group["betas"]
            hypers.append(_Hyper(group["lr"], betas, group["eps"], group["weight_decay"], group["maximize"]))
            for p in group["params"]:
                g = p.grad
                if g is None:
                    continue
                if g.layout is not torch.strided:
                    raise ValueError(f"a gradient is {g.layout}; expected {torch.strided}")
                params.append(p)
                grads.append(g)
                groups.append(number)
                state = self.state[p]
                if len(state) < 3 or (narrow and p.dtype in narrow and "master" not in state):
                    self._init_state(p, state)
                states.append(state)
        if not params:
            return loss
        slots, over = _slots(grads)
        masters = [s.get("master") for s in states] if self.master_weights else [None] * len(states)
        t = _Tensors(
            _local(params),
            _local(grads),
            _local([s["exp_avg"] for s in states]),
            _local([s["exp_avg_sq"] for s in states]),
            _local(masters),
            [s["step"] for s in states],
            groups,
        )
        device = t.params[0].device
        if self.total_norm is None and (self.max_norm is not None or self.skip_nonfinite):
            wide = torch.promote_types(t.grads[0].dtype, torch.float32)
            self.total_norm = torch.zeros((), dtype=wide, device=device)
        if self.skipped is None and self.skip_nonfinite:
            self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        clip = _Clip(self.max_norm, None, self.total_norm, self.skip_nonfinite, self.skipped)
        _step(t, hypers, clip, slots, over, self._workspace)
        return loss


def _check_group(group: dict[str, Any]) -> None:
    if group.get("amsgrad"):
        raise ValueError("amsgrad is True; expected False")
    _Hyper(group["lr"], group["betas"], group["eps"], group["weight_decay"]).check()
