"""What torch really allocates in a training step, without a GPU: the models on the device "meta", whose tensors have
sizes and no data, with the Triton kernels' launches left out. Prints the peak of each case as JSON.

    python tests/planner/step_on_meta.py '[{"preset": "gpt2", "batch": 8, "context": 512}]'

A process of its own, for Triton's interpreter must be off. What a GPU does and this does not is replaced below.
"""

import json
import sys
import weakref
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusedlm.kernels import AdamW, _launch, backend
from fusedlm.models import PRESETS, build_model
from fusedlm.training.recompute import RecomputeCheap, recompute_blocks

# A product of bf16 into fp32, which cuBLAS has and meta has not; it allocates nothing.
sys.modules["fusedlm.kernels.linear_cross_entropy"]._product_into = lambda *_, **__: None  # type: ignore[attr-defined]


class Forgotten(list[Any]):
    """Launches that are neither run nor recorded: records would hold their tensors."""

    def append(self, launch: Any) -> None:
        pass


_launch._recorded = Forgotten()


class Allocations(TorchDispatchMode):
    """Follows every storage from the operator that makes it to its last reference."""

    def __init__(self) -> None:
        super().__init__()
        self.living: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.add.Tensor:  # autograd adds gradients in place, but not where a mode looks on
            func = torch.ops.aten.add_.Tensor
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.is_meta and t.untyped_storage()._cdata not in self.living:
                self._made(t.untyped_storage())
        return out

    def _made(self, storage: Any) -> None:
        size = -(-storage.nbytes() // 512) * 512
        self.living.add(storage._cdata)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, storage._cdata, size)

    def _freed(self, key: int, size: int) -> None:
        self.living.remove(key)
        self.now -= size


def peak(case: dict[str, Any]) -> int:
    """Bytes at the peak of a step that is not the first."""
    config = replace(PRESETS[case["preset"]], **case.get("config", {}))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[case.get("dtype", "bf16")]
    with Allocations() as allocations, backend("triton"):
        model = build_model(config, device="meta", dtype=dtype, dropout=case.get("dropout", 0.0))
        if dtype == torch.float16 or case.get("grad_dtype") == "fp32":
            for p in model.parameters():
                p.grad_dtype = torch.float32
        states = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.get("state_dtype", "fp32")]
        optimizer = AdamW(
            model.parameters(), max_norm=1.0, master_weights=case.get("masters", True), state_dtype=states
        )
        if case.get("recompute") == "blocks":
            recompute_blocks(model)
        cheap = RecomputeCheap(model) if case.get("recompute") == "cheap" else nullcontext()
        for _ in range(3 if case.get("accumulate") else 2):
            allocations.peak = 0
            ids, targets = (torch.empty(case["batch"], case["context"], dtype=torch.int64, device="meta"),) * 2
            targets = torch.empty_like(ids)
            with cheap:
                loss = model.loss(ids, targets)
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
            optimizer.step()
            if not case.get("accumulate"):
                optimizer.zero_grad(set_to_none=True)
        return allocations.peak


if __name__ == "__main__":
    print(json.dumps([peak(case) for case in json.loads(sys.argv[1])]))
