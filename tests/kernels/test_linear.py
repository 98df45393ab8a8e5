"""`linear` and `mlp`: what they refuse, what they keep, which kernel serves, and GPT-2's layout without a copy."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fusedlm.kernels import backend, dropout, linear, mlp

x, w, b = torch.randn(5, 8), torch.randn(6, 8), torch.randn(6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"weight": torch.randn(6, 7)}, r"x has shape \(5, 8\) and weight \(6, 7\); expected"),
        ({"bias": torch.randn(5)}, r"bias has shape \(5,\); expected \(6,\)"),
        ({"activation": "relu"}, "activation is 'relu'; expected None, 'gelu' or 'gelu_tanh'"),
        ({"residual": torch.randn(6)}, r"residual has shape \(6,\); expected \(5, 6\)"),
        ({"activation": "gelu", "residual": torch.randn(5, 6)}, "there is a residual or dropout; expected either"),
        ({"activation": "gelu", "dropout_p": 0.5}, "there is a residual or dropout; expected either"),
    ],
)
def test_linear_says_what_does_not_fit(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        linear(**{"x": x, "weight": w, "bias": b} | arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"activation": "silu"}, "activation is 'silu'; expected 'gelu', 'gelu_tanh' or 'swiglu'"),
        ({"down": torch.randn(3, 5)}, r"x has shape \(5, 8\), up \(6, 8\) and down \(3, 5\); expected"),
        ({"activation": "swiglu", "down": torch.randn(3, 3)}, "there is a bias before swiglu"),
        ({"activation": "swiglu", "up_bias": None}, r"expected \(..., K\), \(2F, K\) and \(N, F\)"),
        ({"up_bias": torch.randn(3)}, r"up_bias has shape \(3,\); expected \(6,\)"),
        ({"down_bias": torch.randn(6)}, r"down_bias has shape \(6,\); expected \(3,\)"),
    ],
)
def test_mlp_says_what_does_not_fit(arguments: dict[str, Any], said: str) -> None:
    good = {"x": x, "up": w, "up_bias": b, "down": torch.randn(3, 6), "down_bias": None, "activation": "gelu"}
    with pytest.raises(ValueError, match=said):
        mlp(**good | arguments)


def test_dropout_has_the_mask_of_the_op_alone() -> None:
    seed, r = torch.tensor([7]), torch.randn(5, 6)
    want = dropout(F.linear(x, w, b), 0.4, seed=seed, stream=2) + r
    torch.testing.assert_close(linear(x, w, b, residual=r, dropout_p=0.4, seed=seed, stream=2), want)
    torch.testing.assert_close(linear(x, w, b, residual=r, dropout_p=0.4, training=False), F.linear(x, w, b) + r)


def test_leading_dimensions_and_weights_that_lie_transposed() -> None:
    wide, conv = x.expand(3, 2, 5, 8), w.T.contiguous().T  # GPT-2's files have (K, N)
    assert conv.stride() == (1, 6)
    torch.testing.assert_close(linear(wide, conv, b, activation="gelu"), F.gelu(F.linear(wide, w, b)))
    down = torch.randn(4, 6)
    y = mlp(wide, conv, b, down, None, "gelu_tanh")
    torch.testing.assert_close(y, F.linear(F.gelu(F.linear(wide, w, b), approximate="tanh"), down))


class Kept(saved_tensors_hooks):
    """Inside, notes the shapes that the backward pass keeps."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        super().__init__(self._note, lambda t: t)

    def _note(self, t: Tensor) -> Tensor:
        self.shapes.append(tuple(t.shape))
        return t


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu"])
def test_recomputing_gives_the_same_and_keeps_less(activation: Any) -> None:
    gated = activation == "swiglu"
    tensors = [torch.randn(7, 8), torch.randn(12 if gated else 6, 8), None if gated else torch.randn(6)]
    tensors += [torch.randn(4, 6), torch.randn(4)]
    found = {}
    for recompute in (None, True):
        leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
        kept = Kept()
        with kept:
            y = mlp(*leaves, activation, recompute=recompute)  # type: ignore[arg-type]
        gradients = torch.autograd.grad(y.square().sum(), [t for t in leaves if t is not None])
        found[recompute] = y, *gradients
        count = kept.shapes.count((7, 6))  # what the activation gives, and what it is given but for swiglu
        assert count == (0 if gated else 1) if recompute else count > (0 if gated else 1), kept.shapes
    for a, c in zip(found[None], found[True], strict=True):
        torch.testing.assert_close(a, c)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_whichever_serves(dtype: torch.dtype) -> None:
    """By itself the op chooses; the choice changes no more than rounding."""
    generator = torch.Generator("cuda").manual_seed(1)
    for M, K, F_, N in ((2048, 256, 512, 256), (3, 256, 512, 256), (1500, 100, 60, 36)):
        make = lambda *s: torch.randn(*s, device="cuda", generator=generator, dtype=dtype)  # noqa: E731
        given = [make(M, K), make(F_, K) / K**0.5, make(F_), make(N, F_) / F_**0.5, make(N)]
        results = []
        for name in ("auto", "torch"):
            leaves = [t.clone().requires_grad_() for t in given]
            with backend(name):  # type: ignore[arg-type]
                y = mlp(*leaves, "gelu_tanh")
            results.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y))))
        for ours, theirs in zip(*results, strict=True):
            assert ((ours - theirs).float().norm() / theirs.float().norm()) < 0.02
