"""What sum_parts does beyond the contract: where it writes, how it rounds, and what it refuses."""

import pytest
import torch
from torch import Tensor

from fusedlm.kernels import backend, sum_parts

pytest.importorskip("triton", reason="the kernels need Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_it_writes_where_it_is_told(name: str) -> None:
    """And nowhere else."""
    x = torch.randn(3, 7, 41, device=DEVICE)
    room = torch.full((2 + 7 * 41 + 2,), torch.nan, device=DEVICE)
    out = room[2:-2].view(7, 41)
    with backend(name):  # type: ignore[arg-type]
        assert sum_parts(x, 0.5, out=out) is out
    torch.testing.assert_close(out.double(), x.double().sum(0) * 0.5, rtol=1e-6, atol=1e-6)
    assert room[:2].isnan().all()
    assert room[-2:].isnan().all()


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_it_rounds_once(name: str) -> None:
    """2048 and 1, eight times: in fp16 every sum on the way would be 2048 again. And a sum that fp16 cannot hold has a
    mean."""
    x = torch.tensor([[2048.0]] + [[1.0]] * 8, dtype=torch.float16, device=DEVICE)
    with backend(name):  # type: ignore[arg-type]
        assert sum_parts(x).item() == 2056.0
        assert sum_parts(x.repeat(9, 1), 1 / 9).item() == 2056.0
        assert sum_parts(torch.full((8, 1), 20000.0, dtype=torch.float16, device=DEVICE), 1 / 8).item() == 20000.0
    assert sum(x.unbind()).item() == 2048.0, "and so the order of rounding shows"


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_parts_that_are_apart_in_memory(name: str) -> None:
    """A row stride, one that is not positive included, and columns with gaps, which are copied."""
    base = torch.randn(4, 2, 33, device=DEVICE)
    with backend(name):  # type: ignore[arg-type]
        for x in (base[:, 1], base[::2, 0], base[1:2, 0].expand(3, 33), base[..., ::3], base.transpose(0, 2)):
            torch.testing.assert_close(sum_parts(x).double(), x.double().sum(0), rtol=1e-6, atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    x = torch.ones(2, 6)
    with pytest.raises(ValueError, match=r"x requires a gradient, and sum_parts has none"):
        sum_parts(x.clone().requires_grad_())
    with torch.no_grad():
        assert sum_parts(x.clone().requires_grad_()).tolist() == [2.0] * 6
    for bad in (torch.ones(()), torch.ones(0, 3), torch.ones(2, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"expected floating-point parts, \(R, \*\) with R of 1 or more"):
            sum_parts(bad)
    for out in (torch.ones(5), torch.ones(6).double(), torch.ones(12)[::2], torch.ones(6, device="meta")):
        with pytest.raises(ValueError, match=r"expected a contiguous \(6,\) torch.float32 on cpu"):
            sum_parts(x, out=out)


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_where_it_writes_may_be_compiled(name: str) -> None:
    def summed(x: Tensor, out: Tensor) -> Tensor:
        return sum_parts(x, 0.5, out=out) + 1

    x, out = torch.randn(3, 40, device=DEVICE), torch.full((40,), torch.nan, device=DEVICE)
    torch._dynamo.reset()
    with backend(name):  # type: ignore[arg-type]
        y = torch.compile(summed, fullgraph=True, backend="aot_eager")(x, out)
    torch.testing.assert_close(out.double(), x.double().sum(0) * 0.5, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y, out + 1)
