"""Recomputation: the same gradients, and the bytes kept that the planner says. (tests/planner holds the whole step.)"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fusedlm.models import PRESETS, DecoderModel, build_model
from fusedlm.training.recompute import RecomputeCheap, recompute_blocks


def model_of(name: str, dropout: float = 0.0) -> DecoderModel:
    model = build_model(PRESETS[name], dropout=dropout)
    generator = torch.Generator().manual_seed(1)
    model.init_weights(generator)
    with torch.no_grad():
        for p in model.parameters():  # biases of 0 and norms' weights of 1 would hide where they are left out
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return model


def gradients(model: DecoderModel, cheap: RecomputeCheap | None = None) -> list[Tensor]:
    ids = torch.randint(0, 512, (2, 33), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)
    if cheap is None:
        loss = model.loss(ids[:, :-1], ids[:, 1:])
    else:
        with cheap:
            loss = model.loss(ids[:, :-1], ids[:, 1:])
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_gradients_are_the_same(name: str, dropout: float) -> None:
    want = gradients(model_of(name, dropout))
    again = model_of(name, dropout)
    cheap = RecomputeCheap(again)
    blocks = model_of(name, dropout)
    recompute_blocks(blocks)
    for got in (gradients(again, cheap), gradients(again), gradients(blocks), gradients(again, cheap)):
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


class Kept(saved_tensors_hooks):
    """Inside, notes the storages that the backward pass keeps."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}
        super().__init__(self._note, lambda t: t)

    def _note(self, t: Tensor) -> Tensor:
        self.storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_what_is_cheap_is_not_kept(name: str) -> None:
    """Of each block: two norms' outputs and the activation's, of which SwiGLU in torch keeps two."""
    model = model_of(name)
    activations = 2 if name == "tiny-llama" else 1
    B, T = 3, 32
    ids = torch.randint(0, 512, (B, T))
    config = model.config

    def kept(cheap: bool) -> int:
        again = RecomputeCheap(model) if cheap else None
        seen = Kept()
        if again is None:
            with seen:
                model.loss(ids, ids)
        else:  # the inner hooks see what autograd gives, so only one pair may be active
            pack = again._pack
            again.pack_hook = lambda t: seen._note(t) if isinstance(pack(t), Tensor) else pack(t)
            with again:
                model.loss(ids, ids)
        return sum(seen.storages.values())

    assert kept(False) - kept(True) == config.n_layers * B * T * 4 * (2 * config.width + activations * config.mlp_width)


def test_memory_of_another_tensor_is_never_mistaken() -> None:
    """An output that is gone may leave its address to another tensor."""
    model = model_of("tiny-gpt2")
    cheap = RecomputeCheap(model)
    norm = model.blocks[0].norm1
    with cheap:
        y = norm(torch.randn(4, 64, requires_grad=True))
        place = y.untyped_storage().data_ptr()
        del y
        others = [torch.randn(4, 64, requires_grad=True) for _ in range(8)]
        for x in others:
            packed = cheap._pack(x)
            assert packed is x
    assert place


def test_a_result_is_computed_once_while_it_is_held() -> None:
    model = model_of("tiny-gpt2")
    cheap, norm, calls = RecomputeCheap(model), model.blocks[0].norm1, 0
    forward = norm.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(*args, **kwargs)

    norm.forward = counted  # type: ignore[method-assign]
    w, v = (torch.randn(64, 5, requires_grad=True) for _ in range(2))
    with cheap:
        y = norm(torch.randn(4, 64))
        loss = (y @ w).sum() + (y @ v).sum()
        want = y.detach().sum(0)
        del y
    loss.backward()
    assert calls == 3  # forward, and once each: nothing held it in between
    assert w.grad is not None
    torch.testing.assert_close(w.grad, want[:, None].expand(64, 5))


@pytest.mark.parametrize("mode", ["cheap", "blocks"])
def test_runs_with_it_are_the_same(run: Callable[..., Any], mode: str) -> None:
    plain, _ = run("plain", "training.dropout=0.1")
    again, _ = run("again", "training.dropout=0.1", f"training.recompute={mode}")
    assert plain.losses == again.losses
