"""A bfloat16 parameter and the lower half of its float32 master: together the master, in 4 bytes and exactly.

    p = (bits + 0x8000) >> 16      the master's bits, rounded to the upper half; what is halfway goes away from 0
    low = bits - (p << 16)         in [-0x8000, 0x7fff]
so bits = (p << 16) + low. It is bfloat16's usual rounding but for numbers that are exactly halfway.
"""

from typing import Any

import torch
from torch import Tensor

from fusedlm.kernels.adamw.shards import local


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as its rounding to bfloat16 and the int16 that `join_master` needs beside it, of its shape.

    NaN becomes bfloat16's quiet NaN and 0. Numbers that bfloat16 has no room for become infinite in it, and come back.
    Raises ValueError for another dtype.
    """
    if master.dtype != torch.float32:
        raise ValueError(f"master is {master.dtype}; expected {torch.float32}")
    bits = master.view(torch.int32)
    # By name, for torch's >> and << give something else of DTensors. Beyond 2^31 it wraps, which NaN alone reaches.
    high = torch.bitwise_right_shift(bits + 0x8000, 16)
    low = (bits - torch.bitwise_left_shift(high, 16)).to(torch.int16)
    nan = master.isnan()
    return high.to(torch.int16).view(torch.bfloat16).masked_fill(nan, torch.nan), low.masked_fill(nan, 0)


def join_master(p: Tensor, low: Tensor) -> Tensor:
    """The float32 master of a bfloat16 parameter and its int16 of the same shape: the inverse of `split_master`.

    A finite parameter that was written since, to which low does not belong, gives a master that rounds to it all the
    same. Raises ValueError where dtypes or shapes do not fit.
    """
    if (p.dtype, low.dtype) != (torch.bfloat16, torch.int16):
        raise ValueError(f"p is {p.dtype} and low {low.dtype}; expected {torch.bfloat16} and {torch.int16}")
    if p.shape != low.shape:
        raise ValueError(f"low has shape {tuple(low.shape)}; expected {tuple(p.shape)}, p's")
    high = torch.bitwise_left_shift(p.view(torch.int16).to(torch.int32), 16)
    # Below the bits of 0 are those of NaN; a parameter that was set to 0 must not become one.
    return torch.where((p == 0) & (low < 0), high, high + low).view(torch.float32)


def new_master(p: Tensor) -> dict[str, Tensor]:
    """What an optimizer's state holds so that it has the float32 master of a parameter, p itself to begin with.

    bfloat16: "master_low", the int16 of `split_master`. float16: "master", float32. Nothing for others.
    """
    if p.dtype == torch.bfloat16:
        return {"master_low": torch.zeros_like(p, dtype=torch.int16, memory_format=torch.preserve_format)}
    return {"master": p.detach().to(torch.float32, copy=True)} if p.dtype == torch.float16 else {}


@torch.no_grad()
def set_master(p: Any, low: Any, master: Any) -> None:
    """Write the two parts of a float32 master into a bfloat16 parameter and its int16. DTensors are sharded alike."""
    (shard,) = local([master])
    for out, part in zip(local([p, low]), split_master(shard), strict=True):
        out.copy_(part)
