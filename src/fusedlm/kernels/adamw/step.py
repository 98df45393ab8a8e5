"""One step of AdamW over tensors that may have hyperparameters of their own, by the kernels or by torch."""

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedlm.kernels._backend import use_triton
from fusedlm.kernels._launch import launch
from fusedlm.kernels.adamw.kernels import DTYPES, MASTERS, config, prepare_kernel, update_kernel
from fusedlm.kernels.adamw.masters import join_master, set_master
from fusedlm.kernels.adamw.norm import norm_by_kernels, norm_by_torch
from fusedlm.kernels.adamw.shards import Sums
from fusedlm.kernels.adamw.workspace import Kinds, Launch, Workspace, chunk_table, dense, kinds, own_workspace, pointers


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
        low = w is not None and w.dtype == torch.int16
        g, x = clip * g.to(wide), join_master(p, w) if low else (p if w is None else w).to(wide)
        m.copy_(new_m := betas[0] * m.to(wide) + (1 - betas[0]) * g)
        v.copy_(new_v := betas[1] * v.to(wide) + (1 - betas[1]) * g * g)
        root = new_v.sqrt() / (1 - betas[1] ** t).sqrt() + eps
        x = x * (1 - lr * weight_decay) - lr / (1 - betas[0] ** t) * (new_m / root)
        if low:
            set_master(p, w, x)
        else:
            for out in (p,) if w is None else (p, w):
                out.copy_(x)


@dataclass(frozen=True)
class Hyper:
    """The hyperparameters of some tensors. Raises ValueError where they are out of range."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    maximize: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.lr, Tensor) and self.lr.numel() != 1:
            raise ValueError(f"lr has shape {tuple(self.lr.shape)}; expected one element")
        for name, value in (("lr", self.lr), ("eps", self.eps), ("weight_decay", self.weight_decay)):
            if not isinstance(value, Tensor) and not value >= 0:
                raise ValueError(f"{name} is {value}; expected 0 or more")
        for i, beta in enumerate(self.betas):
            if not 0 <= beta < 1:
                raise ValueError(f"betas[{i}] is {beta}; expected 0 <= beta < 1")

    def on(self, device: torch.device) -> "Hyper":
        """With lr a float, or float32 on the device."""
        if not isinstance(self.lr, Tensor):
            return self
        lr = float(self.lr) if self.lr.device.type == "cpu" != device.type else self.lr.to(device, torch.float32)
        return replace(self, lr=lr)

    def numbers(self) -> list[float]:
        """A row of the table: what must not be rounded to fp32 before it is subtracted from 1, computed here."""
        lr = 0.0 if isinstance(self.lr, Tensor) else self.lr
        b1, b2 = self.betas
        log1, log2 = (math.log(b) if b else -math.inf for b in (b1, b2))
        return [lr, log1, log2, 1 - b1, 1 - b2, self.eps, self.weight_decay, -1.0 if self.maximize else 1.0]


@dataclass(frozen=True)
class Clip:
    """max_norm None: do not clip. norm: where it is known. skipped: counts steps of another norm than a finite one,
    which change nothing else; None: there are no such steps."""

    max_norm: float | None
    norm: Tensor | None = None
    skipped: Tensor | None = None

    def __post_init__(self) -> None:
        if self.max_norm is not None and not self.max_norm >= 0:
            raise ValueError(f"max_norm is {self.max_norm}; expected 0 or more, or None")

    @property
    def wanted(self) -> bool:
        """Whether a step needs the norm."""
        return self.max_norm is not None or self.skipped is not None

    def check(self, device: torch.device) -> None:
        """Raise ValueError where the tensors are not what a step on the device can take."""
        for name, x in (("total_norm", self.norm), ("skipped", self.skipped)):
            if x is not None and (x.device != device or x.numel() != 1):
                raise ValueError(f"{name} is {tuple(x.shape)} on {x.device}; expected one element on {device}")
        if self.skipped is not None and self.skipped.dtype != torch.int64:
            raise ValueError(f"skipped is {self.skipped.dtype}; expected {torch.int64}")


@dataclass(frozen=True)
class Tensors:
    """What a step works on, local tensors only. groups: of each tensor, the number of its set of hyperparameters.

    Raises ValueError where lengths do not fit.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    masters: list[Tensor | None]
    steps: list[Tensor]
    groups: list[int]

    def __post_init__(self) -> None:
        T = len(self.params)
        for name, listed in (*self._named(), ("step", self.steps)):
            if len(listed) != T:
                raise ValueError(f"{name} has {len(listed)} tensors; expected one for each of the {T} params")

    def _named(self) -> Iterator[tuple[str, Sequence[Tensor | None]]]:
        yield from (("params", self.params), ("grads", self.grads), ("exp_avgs", self.exp_avgs))
        yield from (("exp_avg_sqs", self.exp_avg_sqs), ("masters", self.masters))

    def check(self, *, kernels: bool) -> None:
        """Raise ValueError where shapes, dtypes or devices do not fit, or memory, which kernels go through as one."""
        device = self.params[0].device
        for i, s in enumerate(self.steps):
            if (s.numel(), s.dtype, s.device) != (1, torch.float32, device):
                what = f"{tuple(s.shape)} {s.dtype} on {s.device}"
                raise ValueError(f"step {i} is {what}; expected one element of torch.float32 on {device}")
        for name, listed in self._named():
            for i, (t, p) in enumerate(zip(listed, self.params, strict=True)):
                allowed = [torch.float32] if name == "masters" else list(DTYPES)
                allowed += [torch.int16] if name == "masters" and p.dtype == torch.bfloat16 else []
                allowed += [] if kernels else [torch.float64]
                if t is None:
                    continue
                if t.shape != p.shape:
                    shapes = f"{tuple(t.shape)}; expected {tuple(p.shape)}"
                    raise ValueError(f"{name}[{i}] has shape {shapes}, params[{i}]'s")
                if t.device != device:
                    raise ValueError(f"{name}[{i}] is on {t.device}; expected {device}, as params[0] is")
                if t.layout != torch.strided or t.dtype not in allowed:
                    given = t.dtype if t.layout == torch.strided else t.layout
                    raise ValueError(f"{name}[{i}] is {given}; expected {' or '.join(map(str, allowed))}, dense")
                if kernels and not (dense(p) and _same_order(t, p)):
                    raise ValueError(
                        f"{name}[{i}] has shape {tuple(t.shape)} and strides {t.stride()}; expected a tensor without "
                        f"gaps, and one order of dimensions in params, exp_avgs, exp_avg_sqs and masters"
                    )

    def in_order(self) -> "Tensors":
        """With gradients that lie in memory as their parameters do; copies only where they must be."""
        if _contiguous(self.grads) and _contiguous(self.params):
            return self
        pairs = zip(self.grads, self.params, strict=True)
        return replace(self, grads=[g if _same_order(g, p) else _reordered(g, p) for g, p in pairs])


def _contiguous(tensors: Sequence[Tensor]) -> bool:
    return all(map(Tensor.is_contiguous, tensors))


def _same_order(t: Tensor, p: Tensor) -> bool:
    return (t.is_contiguous() and p.is_contiguous()) or t.stride() == p.stride()


def _reordered(g: Tensor, p: Tensor) -> Tensor:
    """A copy of the gradient with its parameter's order of dimensions; itself where it does not fit."""
    return torch.empty_like(p, dtype=g.dtype).copy_(g) if g.shape == p.shape and g.device == p.device else g


class _Plan(NamedTuple):
    """What is to be launched, for parameters and states that stay where they are; gradients may move.

    table: (T, 8): the addresses of param, exp_avg, exp_avg_sq, master and step, the group, whether this is the first
    tensor with its step, unused.
    """

    table: Tensor
    launches: list[Launch]


def _plan(t: Tensors, written: list[list[int]], steps: list[int], read: Kinds, workspace: Workspace) -> _Plan:
    """Raises ValueError where tensors do not fit."""
    t.check(kernels=True)
    device = t.params[0].device
    members: dict[tuple[Any, ...], list[int]] = {}
    for i, (size, grad, offset) in enumerate(zip(*read, strict=True)):
        if size:
            param, exp_avg, exp_avg_sq = (DTYPES[x[i].dtype] for x in (t.params, t.exp_avgs, t.exp_avg_sqs))
            aligned = not (size | offset) & 15 and not any(column[i] & 15 for column in written)
            master = "none" if (w := t.masters[i]) is None else MASTERS[w.dtype]
            combination = (param, DTYPES[grad], exp_avg, exp_avg_sq, master, aligned)
            members.setdefault(combination, []).append(i)
    names = ("PARAM", "GRAD", "EXP_AVG", "EXP_AVG_SQ", "MASTER", "ALIGNED")
    launches = []
    for combination, chosen in members.items():
        constants: dict[str, Any] = {**dict(zip(names, combination, strict=True)), **config("update")}
        chunks = chunk_table(chosen, read.sizes, constants["BLOCK_N"])
        launches.append(Launch(workspace.upload(chunks, device), constants))
    first = {step: i for i, step in reversed(list(enumerate(steps)))}
    rows = [[*row, first[row[4]] == i, 0] for i, row in enumerate(zip(*written, steps, t.groups, strict=True))]
    return _Plan(workspace.upload(torch.tensor(rows, dtype=torch.int64, device="cpu"), device), launches)


def _upload_numbers(
    addresses: list[int], hyper: list[float], workspace: Workspace, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Both on the device, the second the bits of fp64 numbers, at a multiple of 16 bytes."""
    whole = bytearray(array("q", addresses))
    whole += bytes(-len(whole) % 16) + array("d", hyper).tobytes()
    sent = workspace.upload(torch.frombuffer(whole, dtype=torch.int64), device)
    return sent, sent[len(sent) - len(hyper) :]


def take_step(t: Tensors, hypers: list[Hyper], clip: Clip, sums: Sums, workspace: Workspace | None) -> Tensor | None:
    """One step over at least one tensor. Returns the norm where clip wants it. Raises ValueError as `adamw` does."""
    clip.check(t.params[0].device)
    if use_triton(t.params[0]):
        try:
            return _step_by_kernels(t, hypers, clip, sums, workspace)
        except RuntimeError:  # what is sparse, say, has no address
            t.check(kernels=True)
            raise
    t.check(kernels=False)
    return _step_by_torch(t, hypers, clip, sums)


def _step_by_kernels(t: Tensors, hypers: list[Hyper], clip: Clip, sums: Sums, given: Workspace | None) -> Tensor | None:
    device, T = t.params[0].device, len(t.params)
    workspace, t = given or own_workspace(device), t.in_order()
    written = [pointers(t.params), pointers(t.exp_avgs), pointers(t.exp_avg_sqs)]
    written.append([0 if w is None else w.data_ptr() for w in t.masters])
    steps, addresses = pointers(t.steps), pointers(t.grads)
    read = kinds(t.grads, addresses)
    make_plan = partial(_plan, t, written, steps, read, workspace)
    table, launches = workspace.recall("plan", (written, steps, t.groups, read), make_plan, device)

    hypers = [h.on(device) for h in hypers]
    addresses += [h.lr.data_ptr() if isinstance(h.lr, Tensor) else 0 for h in hypers]
    numbers = [x for h in hypers for x in h.numbers()]
    make_numbers = partial(_upload_numbers, addresses, numbers, workspace, device)
    read_ptr, hyper = workspace.recall("numbers", (addresses, numbers), make_numbers, device)

    norm = None
    if clip.wanted:
        norm = norm_by_kernels(read_ptr, read, sums, workspace) if clip.norm is None else clip.norm
    used = None if norm is None else norm.to(torch.float32)
    coefficients = torch.empty((T, 8), dtype=torch.float32, device=device)
    tensors = (table, read_ptr, hyper, used, clip.skipped, coefficients)
    max_norm = math.inf if clip.max_norm is None else float(clip.max_norm)
    which = (used is None, clip.skipped is None)
    launch(prepare_kernel, (1, 1, 1), which, tensors, (T, max_norm), config("prepare"))
    for chunks, constants in launches:
        launch(update_kernel, (len(chunks), 1, 1), None, (table, read_ptr, chunks, coefficients), (), constants)
    if device.type == "cuda":
        torch.autograd.graph.increment_version(t.params)  # as an operator of torch's that writes them would
    return norm


def _step_by_torch(t: Tensors, hypers: list[Hyper], clip: Clip, sums: Sums) -> Tensor | None:
    norm: Tensor | None = None
    scale: float | Tensor = 1.0
    if clip.wanted:
        norm = norm_by_torch(t.grads, sums) if clip.norm is None else clip.norm
        if clip.skipped is not None and not norm.isfinite():
            clip.skipped.add_(1)
            return norm
        if clip.max_norm is not None:
            scale = (clip.max_norm / (norm + 1e-6)).clamp(max=1.0)
    lists = (t.params, t.grads, t.exp_avgs, t.exp_avg_sqs, t.masters)
    if _plain(t):
        _step_by_torchs_own(t, hypers, scale)
        return norm
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
    return norm


def _plain(t: Tensors) -> bool:
    """Whether torch's own fused step, which goes through memory once, can take them: float32 on a CPU, no masters."""
    tensors = (*t.params, *t.grads, *t.exp_avgs, *t.exp_avg_sqs)
    return all(w is None for w in t.masters) and all(x.is_cpu and x.dtype == torch.float32 for x in tensors)


def _step_by_torchs_own(t: Tensors, hypers: list[Hyper], scale: float | Tensor) -> None:
    for s in {id(s): s for s in t.steps}.values():
        s += 1
    # The fused step would write what it scales, and gradients are not ours to write to.
    factor = float(scale)
    grads = torch._foreach_mul(t.grads, factor) if factor != 1 else t.grads
    for number, h in enumerate(hypers):
        chosen = [i for i, group in enumerate(t.groups) if group == number]
        if chosen:
            torch._fused_adamw_(
                [t.params[i] for i in chosen],
                [grads[i] for i in chosen],
                [t.exp_avgs[i] for i in chosen],
                [t.exp_avg_sqs[i] for i in chosen],
                [],
                [t.steps[i].reshape(()) for i in chosen],
                lr=float(h.lr),
                beta1=h.betas[0],
                beta2=h.betas[1],
                weight_decay=h.weight_decay,
                eps=h.eps,
                amsgrad=False,
                maximize=h.maximize,
            )
