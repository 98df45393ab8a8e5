"""Weights of 8 bits: what they round to, and that models take them for the matrices they stand for."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fusedlm import LanguageModel, load
from fusedlm.models import DecoderModel
from fusedlm.models.quantized import GROUP, Int8Weight


def matrix(N: int, K: int) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(K)) * torch.logspace(-6, 3, N).unsqueeze(1)


@pytest.mark.parametrize("shape", [(7, 64), (5, 128), (33, 123), (3, 1)])
def test_every_element_is_within_half_a_step(shape: tuple[int, int]) -> None:
    weight = matrix(*shape)
    wide = Int8Weight.quantize(weight).widen()
    assert wide.shape == weight.shape
    for start in range(0, shape[1], GROUP):
        part, ours = weight[:, start : start + GROUP].double(), wide[:, start : start + GROUP].double()
        step = part.abs().amax(1, keepdim=True) / 127
        # A scale is rounded up to 8 bits of precision, and so is the product that `widen` gives in float32 exact.
        assert ((part - ours).abs() <= step / 2 * (1 + 2**-7) * (1 + 1e-5)).all()


def test_zeros_stay_zeros_and_powers_of_two_are_exact() -> None:
    weight = torch.zeros(2, 70)
    weight[1, :64] = 127 * 2.0**-9
    assert torch.equal(Int8Weight.quantize(weight).widen(), weight)


def test_it_takes_a_byte_an_element_and_half_a_bit() -> None:
    weight = Int8Weight.quantize(matrix(10, 128))
    assert weight.nbytes == 10 * 128 + 10 * 2 * 2
    assert weight.element_size() == 1
    assert weight.shape == (10, 128)
    assert weight.dtype == torch.float32


def test_products_and_rows_are_those_of_the_widened_matrix() -> None:
    weight = Int8Weight.quantize(matrix(10, 100))
    x, bias = torch.randn(2, 3, 100), torch.randn(10)
    assert torch.equal(F.linear(x, weight, bias), F.linear(x, weight.widen(), bias))
    assert torch.equal(F.linear(x, weight), F.linear(x, weight.widen()))
    ids = torch.tensor([[1, 9], [0, 1]])
    assert torch.equal(F.embedding(ids, weight), weight.widen()[ids])


def test_anything_else_is_refused() -> None:
    weight = Int8Weight.quantize(matrix(10, 100))
    with pytest.raises(NotImplementedError, match="8 bits"):
        weight + 1
    with pytest.raises(NotImplementedError, match="8 bits"):
        weight.t()


@pytest.fixture
def saved(tmp_path: Path, random_model: Callable[..., DecoderModel]) -> Path:
    LanguageModel(random_model("tiny-llama")).save(tmp_path / "model")
    return tmp_path / "model"


def test_load_quantizes_matrices_and_leaves_the_rest(saved: Path) -> None:
    wide, model = load(saved, device="cpu"), load(saved, device="cpu", quantize="int8")
    for (name, a), b in zip(wide.model.named_parameters(), model.model.parameters(), strict=True):
        assert a.shape == b.shape
        if a.ndim == 2:
            assert isinstance(b, Int8Weight), name
            assert torch.equal(b.widen(), Int8Weight.quantize(a.detach()).widen())
        else:
            assert torch.equal(a, b), name
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        assert (model(ids) - wide(ids)).abs().max() < 0.05 * wide(ids).abs().max()


def test_a_batch_and_one_alone_give_the_same_text(saved: Path) -> None:
    model = load(saved, device="cpu", quantize="int8")
    prompts = [[1, 2, 3], list(range(40, 60))]
    together = model.generate(prompts, max_new_tokens=12)
    assert [r.token_ids for r in together] == [model.generate(p, max_new_tokens=12).token_ids for p in prompts]  # type: ignore


def test_saving_one_says_what_to_do(saved: Path, tmp_path: Path) -> None:
    model = load(saved, device="cpu", quantize="int8")
    with pytest.raises(NotImplementedError, match="8 bits; expected to load without quantize"):
        model.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="unknown quantization 'int4'; expected None or 'int8'"):
        load(saved, device="cpu", quantize="int4")
    with pytest.raises(ValueError, match="computes in float32, and the dtype is torch"):
        load(saved, device="cpu", dtype="bfloat16", quantize="int8")
    with pytest.raises(ValueError, match="threads is 0; expected 1 or more"):
        load(saved, device="cpu", threads=0)
