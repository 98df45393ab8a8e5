"""What embedding's backward pass does beyond the contract: the order of tokens, and one stream beside the other."""

import pytest
import torch
from torch import Tensor

from fusedlm.kernels import backend, embedding
from fusedlm.kernels.embedding.order import _tile, in_order, key_type, narrow_keys

pytest.importorskip("triton", reason="the kernels need Triton")

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="streams need a GPU")


@pytest.mark.parametrize(
    ("V", "width"), [(1, 1), (254, 1), (255, 2), (32766, 2), (32767, 2), (65534, 2), (65535, 4), (200000, 4)]
)
def test_keys_tell_ids_apart_and_lie_in_their_order(V: int, width: int) -> None:
    ids = torch.tensor([[V - 1, 0, V // 2], [V, -1, V + 7]])
    keys = narrow_keys(ids, V)
    dtype, bias = key_type(V)
    assert keys.dtype == dtype
    assert dtype.itemsize == width
    found = (keys.long() + bias).tolist()
    assert found[:3] == [V - 1, 0, V // 2]
    assert not set(found[3:]) & set(range(V)), "out of range, and so is its key"
    assert found[3] == found[5] == V


@pytest.mark.parametrize("V", [1, 7, 300, 70000])
@pytest.mark.parametrize("M", [1, 15, 16, 17, 63, 64, 65, 100, 4095, 4096, 4097, 16384, 16385])
def test_tokens_lie_in_the_order_of_their_ids_and_those_of_one_id_in_their_own(M: int, V: int) -> None:
    """Around every number at which another kernel takes over; a third of the ids out of range, far and near."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if M > 100 and device == "cpu":
        pytest.skip("the interpreter ranks fewer")
    generator = torch.Generator().manual_seed(M)
    ids = torch.randint(0, V, (M,), generator=generator)
    ids[torch.rand(M, generator=generator) < 0.1] = -1
    ids[torch.rand(M, generator=generator) < 0.1] = V
    ids[torch.rand(M, generator=generator) < 0.1] = 2**40
    found = in_order(ids.to(device), V)
    keys = (found.ids.cpu().long() + found.bias).tolist()
    ours = [(v, token) for v, token in zip(keys, found.tokens.tolist(), strict=True) if 0 <= v < V]
    assert ours == sorted((v, token) for token, v in enumerate(ids.tolist()) if 0 <= v < V)
    assert sorted(found.tokens.tolist()) == list(range(M))


@pytest.mark.parametrize("less", [0, 1])
@pytest.mark.parametrize("tiles", [1, 2])
def test_keys_at_the_end_of_32_bits(tiles: int, less: int) -> None:
    """The most rows whose ids and places share a word, and one more."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    M = _tile(1) * tiles + (tiles > 1)
    V = 2**31 // _tile(M) - 2 - less
    ids = torch.tensor([V - 1, V, 0, -1, V - 2], device=device).repeat(-(-M // 5))[:M]
    found = in_order(ids, V)
    kept = [(v, token) for token, v in enumerate(ids.tolist()) if 0 <= v < V]
    ours = zip((found.ids.long() + found.bias).tolist(), found.tokens.tolist(), strict=True)
    assert [(v, token) for v, token in ours if 0 <= v < V] == sorted(kept)
    assert sorted(found.tokens.tolist()) == list(range(M))


def _truth(ids: Tensor, dy: Tensor, V: int, S: int) -> tuple[Tensor, Tensor]:
    dw = torch.zeros(V, dy.shape[-1], dtype=torch.float64, device=dy.device)
    dw.index_add_(0, ids.reshape(-1), dy.double().reshape(-1, dy.shape[-1]))
    dpos = torch.zeros(S, dy.shape[-1], dtype=torch.float64, device=dy.device)
    dpos[: dy.shape[1]] = dy.double().sum(0)
    return dw, dpos


@GPU
@pytest.mark.parametrize("V", [50, 50257, 70000])
@pytest.mark.parametrize("B", [16, 64, 160])  # one tile, several, a sort
def test_steps_that_follow_each_other_at_once(B: int, V: int) -> None:
    """Nothing waits for the host, and memory goes round; every gradient is right, and the same at every repetition."""
    T, C, S = 128, 96, 200
    w, pos = (torch.randn(n, C, device="cuda", requires_grad=True) for n in (V, S))
    ids = [torch.randint(0, V, (B, T), device="cuda") for _ in range(5)]
    upstream = [torch.randn(B, T, C, device="cuda") for _ in range(5)]
    found = []
    for turn in range(40):
        y = embedding(ids[turn % 5], w, pos)
        found.append(torch.autograd.grad(y, (w, pos), upstream[turn % 5]))
        del y
    for turn, gradients in enumerate(found):
        for ours, truth in zip(gradients, _truth(ids[turn % 5], upstream[turn % 5], V, S), strict=True):
            assert (ours - truth).norm() <= 1e-6 * truth.norm(), turn
        assert all(torch.equal(a, b) for a, b in zip(gradients, found[turn % 5], strict=True)), turn


@GPU
@pytest.mark.parametrize("B", [8, 300])
def test_in_a_cuda_graph(B: int) -> None:
    """The other stream joins the capture, and leaves it."""
    T, C, V = 64, 64, 50257
    w, pos = (torch.randn(n, C, device="cuda", requires_grad=True) for n in (V, T))
    ids = torch.randint(0, V, (B, T), device="cuda")
    dy = torch.randn(B, T, C, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.autograd.grad(embedding(ids, w, pos), (w, pos), dy)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            found = torch.autograd.grad(embedding(ids, w, pos), (w, pos), dy)
        for _ in range(3):
            ids.copy_(torch.randint(0, V, (B, T), device="cuda"))
            graph.replay()
            for ours, truth in zip(found, _truth(ids, dy, V, T), strict=True):
                assert (ours - truth).norm() <= 1e-6 * truth.norm()


@pytest.mark.parametrize("width", [6, 40])
def test_a_run_over_very_many_chunks(width: int) -> None:
    """One id for most of the tokens, between others, and a last chunk that is not full."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.full((3, 37), 5, device=device)
    ids[0, 1], ids[1, 4], ids[2, 36] = 0, 8, 4
    w = torch.randn(9, width, device=device, requires_grad=True)
    dy = torch.randn(3, 37, width, device=device)
    with backend("triton"):
        (found,) = torch.autograd.grad(embedding(ids, w), w, dy)
    truth, _ = _truth(ids, dy, 9, 37)
    assert (found - truth).norm() <= 1e-6 * truth.norm()
    assert found[[1, 2, 3, 6, 7]].abs().max() == 0
