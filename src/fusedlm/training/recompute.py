"""What the backward pass computes again in place of keeping it: the cheap ops' outputs, or whole blocks.

"cheap": norms, GELU and SwiGLU. Their outputs are what the products behind them keep; what they are computed from is
kept anyway (the residual stream, and the products before the activations), so they cost a pass over memory each and no
product. Activations are not kept on a GPU in any mode: `mlp` makes them anew in passing. "blocks" (Chen et al. 2016):
of each block only its inputs are kept, and its forward pass runs twice.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from fusedlm.kernels import GELU, LayerNorm, RMSNorm, SwiGLU
from fusedlm.models import DecoderModel
from fusedlm.models.gpt2 import MLP
from fusedlm.models.llama import GatedMLP

CHEAP = (LayerNorm, RMSNorm, GELU, SwiGLU)


class Again:
    """How a tensor is computed anew. While somebody holds the result, it is not computed twice."""

    def __init__(self, module: nn.Module, *given: Tensor | None) -> None:
        """given: what the module was given; of a norm behind a sum, the sum, which is what it is the norm of."""
        self.module = module
        self.given = tuple(t if t is None else t.detach() for t in given)
        self._result: Callable[[], Tensor | None] = lambda: None

    def __call__(self) -> Tensor:
        result = self._result()
        if result is None:
            with torch.no_grad():
                result = self.module.forward(*self.given)
            self._result = weakref.ref(result)
        return result


class RecomputeCheap(saved_tensors_hooks):
    """Inside, of what the cheap modules of a model's blocks give the backward pass keeps how it is computed alone.

    A module's output is packed right after it was made, by the product that takes it, so the last one is remembered,
    and only for as long as it lives.
    """

    def __init__(self, model: DecoderModel) -> None:
        super().__init__(self._pack, self._unpack)
        self._active = False
        self._last: tuple[Callable[[], Any], Again] | None = None
        for module in model.blocks.modules():
            if isinstance(module, MLP | GatedMLP):
                module.recompute = True
            if isinstance(module, CHEAP):
                module.register_forward_hook(self._note)

    def __enter__(self) -> None:
        super().__enter__()
        self._active = True

    def __exit__(self, *error: Any) -> None:
        self._active, self._last = False, None
        super().__exit__(*error)

    def _note(self, module: nn.Module, given: tuple[Any, ...], result: Any) -> None:
        if not self._active or not torch.is_grad_enabled():
            return
        y, *of = result if isinstance(result, tuple) else (result, *given)
        if y.is_contiguous() and y.storage_offset() == 0:
            self._last = weakref.ref(y.untyped_storage()), Again(module, *of)

    def _pack(self, t: Tensor) -> Any:
        if self._last is not None and self._last[0]() is t.untyped_storage():
            return self._last[1], t.size(), t.stride(), t.storage_offset()
        return t

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        again, *layout = packed
        return again().as_strided(*layout)


def recompute_blocks(model: DecoderModel) -> None:
    """Have every block of a model keep its inputs alone, and compute the rest again. For good."""
    # torch's own generator is asked by attention's dropout alone; other masks are functions of a seed that is kept.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": model.dropout > 0}
    for block in model.blocks:

        def again(*args: Any, forward: Callable[..., Any] = block.forward) -> Any:
            return checkpoint(forward, *args, **options) if torch.is_grad_enabled() else forward(*args)

        block.forward = again
