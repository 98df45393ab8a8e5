"""The global norm: a sum of squares a chunk, then these summed in a fixed order, and over processes where sharded."""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedlm.kernels._backend import use_triton
from fusedlm.kernels._launch import launch
from fusedlm.kernels.adamw.kernels import DTYPES, config, squares_kernel, sum_kernel
from fusedlm.kernels.adamw.shards import Sums, local, sums_of
from fusedlm.kernels.adamw.workspace import Kinds, Launch, Workspace, chunk_table, dense, kinds, own_workspace, pointers


def global_norm_ref(tensors: Sequence[Tensor]) -> Tensor:
    squares = [t.to(torch.promote_types(t.dtype, torch.float32)).square().sum() for t in tensors]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())


class _Plan(NamedTuple):
    """bounds: the partial sums of sum j are those from bounds[j] to bounds[j + 1]. partials: how many there are."""

    launches: list[Launch]
    bounds: Tensor
    partials: int


def _plan(read: Kinds, of: list[int], workspace: Workspace, device: torch.device) -> _Plan:
    members: dict[tuple[int, str, bool], list[int]] = {}
    for i, (size, dtype, offset, number) in enumerate(zip(*read, of, strict=True)):
        if size:
            members.setdefault((number, DTYPES[dtype], not (size | offset) & 15), []).append(i)
    launches, counts = [], [0] * (max(of) + 2)
    for (number, name, aligned), chosen in sorted(members.items()):
        constants: dict[str, Any] = {"GRAD": name, "ALIGNED": aligned, **config("squares")}
        chunks = chunk_table(chosen, read.sizes, constants["BLOCK_N"], first=sum(counts))
        launches.append(Launch(workspace.upload(chunks, device), constants))
        counts[number + 1] += len(chunks)
    bounds = torch.tensor(list(accumulate(counts)), dtype=torch.int64, device="cpu")
    return _Plan(launches, workspace.upload(bounds, device), sum(counts))


def norm_by_kernels(addresses: Tensor, read: Kinds, sums: Sums, workspace: Workspace) -> Tensor:
    """The norm of tensors whose addresses are on the device."""
    device = addresses.device
    plan = workspace.recall("norm", (read, sums.of), lambda: _plan(read, sums.of, workspace, device), device)
    partial = torch.empty(max(plan.partials, 1), dtype=torch.float32, device=device)
    for chunks, constants in plan.launches:
        launch(squares_kernel, (len(chunks), 1, 1), None, (addresses, chunks, partial), (), constants)
    found = torch.empty(len(sums.groups), dtype=torch.float32, device=device)
    constants = {"SQRT": sums.here, **config("sum")}
    launch(sum_kernel, (len(found), 1, 1), None, (partial, plan.bounds, found), (), constants)
    return found[0] if sums.here else sums.norm(found)


def norm_by_torch(tensors: Sequence[Tensor], sums: Sums) -> Tensor:
    if sums.here:
        return global_norm_ref(tensors)
    members = [[t for t, at in zip(tensors, sums.of, strict=True) if at == j] for j in range(len(sums.groups))]
    return sums.norm(torch.stack([global_norm_ref(m).square() for m in members]))


@torch.no_grad()
def global_norm(tensors: Iterable[Tensor], *, workspace: Workspace | None = None) -> Tensor:
    """The 2-norm of all elements of all tensors, as `torch.nn.utils.get_total_norm`. Nothing waits for the GPU.

    tensors: any shapes, strides and dtypes, on one device; DTensors are summed over their mesh, once for all that are
    sharded alike. workspace: see `adamw`. Returns a scalar in float32 (float64 of float64) on their device, the same
    bits at each call. Like every sum of squares in fp32 it is infinite from 1.8e19 on. Raises ValueError where devices
    or dtypes do not fit, and for DTensors that are partial sums.
    """
    given = list(tensors)
    sums, shards = sums_of(given), local(given)
    if not shards:
        return global_norm_ref(shards)
    device, kernels = shards[0].device, use_triton(shards[0])
    for i, t in enumerate(shards):
        if t.device != device:
            raise ValueError(f"tensors[{i}] is on {t.device}; expected {device}, as tensors[0] is")
        if kernels and t.dtype not in DTYPES:
            raise ValueError(f"tensors[{i}] is {t.dtype}; the kernels take {', '.join(map(str, DTYPES))}")
    if not kernels:
        return norm_by_torch(shards, sums)
    shards = [t if dense(t) else t.contiguous() for t in shards]
    tables, at = workspace or own_workspace(device), pointers(shards)
    host = torch.tensor(at, dtype=torch.int64, device="cpu")
    addresses = tables.recall("addresses", at, lambda: tables.upload(host, device), device)
    return norm_by_kernels(addresses, kinds(shards, at), sums, tables)
