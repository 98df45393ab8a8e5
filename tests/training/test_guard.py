"""Steps that must not reach the weights: skipped and counted, or the end of the run with a reason."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedlm.training.guard import SpikeGuard
from fusedlm.training.judge import TrainingError
from fusedlm.training.run import train


class Breaking:
    """Makes one layer's output NaN, or its gradient infinite, in the batches of some steps."""

    def __init__(
        self, layer: str, steps: tuple[int, ...], *, backward: bool = False, factor: float | None = None
    ) -> None:
        self.layer, self.steps, self.backward, self.factor = layer, steps, backward, factor

    def begin(self, run: Any, done: int) -> None:
        bad = [run.loader.batch(step).tokens for step in self.steps]
        now = False

        def look(module: Any, given: Any) -> None:
            nonlocal now
            now = any(torch.equal(given[0], tokens) for tokens in bad)

        def spoil(module: Any, given: Any, result: Tensor) -> Tensor:
            if not now:
                return result
            if self.factor is not None:
                return result * self.factor
            if self.backward:
                result.register_hook(lambda g: g * float("inf"))
                return result
            return result * float("nan")

        run.model.embedding.register_forward_pre_hook(look)
        run.model.get_submodule(self.layer).register_forward_hook(spoil)

    def __getattr__(self, name: str) -> Any:
        return lambda *given: None


@pytest.fixture
def broken(configure: Any, tmp_path: Any, heard_of: Any) -> Callable[..., Any]:
    def broken(breaking: Breaking, *settings: str) -> Any:
        heard = heard_of()
        try:
            train(configure(*settings), tmp_path / "run", device="cpu", observers=[breaking, heard])
        except TrainingError as error:
            return heard, str(error)
        return heard, ""

    return broken


def test_a_step_of_nan_changes_nothing_and_is_counted(broken: Callable[..., Any], run: Callable[..., Any]) -> None:
    heard, error = broken(Breaking("blocks.1.mlp", (3, 5)), "training.steps=8")
    assert error == ""
    assert [r.skipped for r in heard.records] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert [text.split(":")[0] for text in heard.said] == ["step 4 was skipped", "step 6 was skipped"]
    assert all(p.isfinite().all() for p in heard.weights().values())
    plain, _ = run("plain", "training.steps=3")
    assert heard.losses[:3] == plain.losses


@pytest.mark.parametrize(
    ("breaking", "said"),
    [
        (
            Breaking("blocks.1.mlp", (3,)),
            r"step 4, micro-batch 1 of 1: the output of blocks\.1\.mlp is not finite\. Its batch is step 3",
        ),
        (
            Breaking("blocks.1.attention.out", (2,), backward=True),
            r"step 3, micro-batch 1 of 1: the gradient of blocks\.1\.attention\.out\.bias is not finite",
        ),
    ],
)
def test_stopping_names_step_batch_and_layer(broken: Callable[..., Any], breaking: Breaking, said: str) -> None:
    heard, error = broken(breaking, "training.nonfinite=stop")
    assert re.search(said, error), error
    assert len(heard.losses) == breaking.steps[0]


def test_too_many_skipped_steps_in_a_row_end_a_run(broken: Callable[..., Any]) -> None:
    heard, error = broken(Breaking("blocks.0.mlp", (2, 3, 4, 5)), "training.max_skipped=3")
    assert "step 5, micro-batch 1 of 1: the output of blocks.0.mlp is not finite" in error
    assert [text.split(":")[0] for text in heard.said] == [f"step {i} was skipped" for i in (3, 4, 5)]


def test_a_spike_is_skipped_or_stops(broken: Callable[..., Any]) -> None:
    breaking = Breaking("blocks.1.mlp", (110,), factor=-1000.0)
    settings = ("training.steps=114", "training.spike_sigmas=6", "training.lr=1e-3", "checkpoints.interval=0")
    heard, error = broken(breaking, *settings)
    assert error == ""
    assert [text for text in heard.said if "step 111 was skipped" in text and "is a spike" in text]
    assert int(heard.trainer.optimizer.skipped) == 1


def test_a_spike_stops(broken: Callable[..., Any]) -> None:
    breaking = Breaking("blocks.1.mlp", (110,), factor=-1000.0)
    settings = ("training.steps=114", "training.spike_sigmas=6", "training.lr=1e-3", "training.spike=stop")
    _, error = broken(breaking, *settings, "checkpoints.interval=0")
    assert "step 111: the loss is" in error
    assert "more than 6 standard deviations above its mean" in error


def test_the_guard_follows_mean_and_variance() -> None:
    guard = SpikeGuard(5.0, torch.device("cpu"))
    losses = 3 + 0.1 * torch.randn(400, generator=torch.Generator().manual_seed(1))
    for loss in losses[:50]:
        assert guard(loss) == loss
    assert float(guard.mean) == pytest.approx(float(losses[:50].mean()), rel=1e-5)
    assert float(guard.variance) == pytest.approx(float(losses[:50].var(correction=0)), rel=1e-4)
    assert guard(torch.tensor(100.0)) == 100.0  # too early to know
    guard = SpikeGuard(5.0, torch.device("cpu"))
    for loss in losses:
        assert guard(loss) == loss
    mean = float(guard.mean)
    assert torch.isnan(guard(torch.tensor(4.0)))
    assert float(guard.mean) == mean
    assert float(guard.spikes) == 1
    assert guard(torch.tensor(2.0)) == 2.0  # far below is none
    loss = torch.tensor(9.0, requires_grad=True)
    guard(loss).backward()
    assert torch.isnan(loss.grad)  # type: ignore[arg-type]
