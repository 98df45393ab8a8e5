"""The kernels that turn logits into losses and their gradient: which one serves, and targets that do not count."""

import pytest
import torch

from fusedlm.kernels import backend, linear_cross_entropy
from fusedlm.kernels._index_errors import raise_index_errors
from fusedlm.kernels._launch import Launch, record_launches
from fusedlm.kernels.cross_entropy import cross_entropy_ref
from fusedlm.kernels.linear_cross_entropy.launches import LINE, MIN_V, kernel_for, losses_in_place

pytest.importorskip("triton", reason="the kernels need Triton")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def _logits(V: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(7, V, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("V", "capability", "name"),
    [
        (50304, 90, "hopper"),
        (128256, 90, "hopper"),
        (50257, 90, "plain"),
        (50264, 90, "plain"),  # TMA could read it, as lines of 8
        (MIN_V, 90, "hopper"),
        (MIN_V - LINE, 90, "plain"),
        (50304, 80, "plain"),
        (50304, 100, "plain"),
    ],
)
def test_hopper_has_a_kernel_for_long_rows_that_tma_can_read(V: int, capability: int, name: str) -> None:
    with record_launches(capability):
        assert kernel_for(_logits(V)) == name
        with backend("triton"):
            assert kernel_for(_logits(V)) == ("plain" if V % LINE or capability != 90 else "hopper")


@pytest.mark.parametrize(
    ("V", "dtype", "gradient", "copied_twice"),
    [
        (50304, torch.bfloat16, True, False),
        (114688, torch.bfloat16, True, False),  # all slots
        (114752, torch.bfloat16, True, True),
        (114752, torch.bfloat16, False, False),  # read once anyway
        (57344, torch.float32, True, False),
        (57408, torch.float32, True, True),
    ],
)
def test_what_is_longer_than_shared_memory_is_copied_twice(
    V: int, dtype: torch.dtype, gradient: bool, copied_twice: bool
) -> None:
    target, losses = torch.empty(7, dtype=torch.int64, device="meta"), torch.empty(7, device="meta")
    with record_launches(90) as launches:
        losses_in_place(_logits(V, dtype), target, losses, -100, 0.0, 0.0, gradient=gradient)
    [launch] = launches
    assert isinstance(launch, Launch)
    constants = launch.constants
    assert (constants["STREAM"] > 0) == copied_twice
    assert constants["SLOTS"] % 4 == constants["STREAM"] % 4 == 0  # slots belong to one of four groups of warps
    block = launch.arguments[0].block_shape
    chunks = -(-V // (block[1] * block[2]))
    assert not gradient or copied_twice or chunks <= constants["SLOTS"]


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("V", [192, 50304, 128256] if GPU else [192, 50])
def test_rows_that_are_ignored_and_targets_out_of_range(V: int, gradient: bool) -> None:
    dtype = torch.float32
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300 if GPU else 9, V, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)
    M = len(logits)
    target = torch.randint(0, V, (M,), generator=generator)
    bad, ignored = torch.zeros(M, dtype=torch.bool), torch.zeros(M, dtype=torch.bool)
    bad[[1, 4, 5]], ignored[[0, 3, M - 1]] = True, True
    target[bad] = torch.tensor([V, -5, 2**40])
    target[ignored] = -100
    good = ~(bad | ignored)
    leaf = logits[good].double().requires_grad_()
    options = (-100, "none", 0.1, 1e-3)
    truth = cross_entropy_ref(leaf, target[good].to(DEVICE), *options)
    truth.sum().backward()
    made = logits.clone()
    losses = torch.empty(M, device=DEVICE)
    with backend("triton"):
        losses_in_place(made, target.to(DEVICE), losses, -100, 0.1, 1e-3, gradient=gradient)
    if GPU:
        torch.cuda.synchronize()
    with pytest.raises(ValueError, match="an index out of range"):
        raise_index_errors()
    raise_index_errors()  # once is enough
    torch.testing.assert_close(losses[good].double(), truth.detach(), rtol=1e-5, atol=1e-5)
    assert bool(losses[bad].isnan().all())
    assert bool((losses[ignored] == 0).all())
    if not gradient:
        assert torch.equal(made, logits)
        return
    assert leaf.grad is not None
    torch.testing.assert_close(made[good].double(), leaf.grad, rtol=1e-4, atol=1e-7)
    assert bool(made[bad].isnan().all())
    assert bool((made[ignored] == 0).all())


def test_the_inputs_memory_takes_its_gradient_where_that_is_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (13, 21))
    t = torch.randint(0, 21, (13,), generator=generator)
    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    truth = torch.autograd.grad(cross_entropy_ref(leaves[0] @ leaves[1].T, t), leaves)
    for reuse in (False, True):
        ours = [v.float().to(DEVICE).requires_grad_() for v in (x, w)]
        hidden = ours[0] * 1.0
        before = hidden.detach().clone()
        with backend("triton"):
            loss = linear_cross_entropy(hidden, ours[1], t.to(DEVICE), reuse_input=reuse)
            found = torch.autograd.grad(loss, ours)
        assert torch.equal(hidden, before) != reuse
        for a, b in zip(found, truth, strict=True):
            torch.testing.assert_close(a.cpu().double(), b, rtol=1e-5, atol=1e-6)
    with backend("triton"), torch.no_grad():  # no gradient, nothing to write
        linear_cross_entropy(before, ours[1], t.to(DEVICE), reuse_input=True)
    assert not torch.equal(hidden, before)
