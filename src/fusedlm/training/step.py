"""One training step: losses and gradients of its micro-batches, then the optimizer. And the same as one CUDA graph."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fusedlm.data.rows import IGNORED, Batch
from fusedlm.models import DecoderModel
from fusedlm.training.config import TrainingConfig
from fusedlm.training.guard import LossScale, SpikeGuard
from fusedlm.training.optimizer import Optimizer
from fusedlm.training.packing import PackedSequences
from fusedlm.training.ranks import Ranks

METRICS = ("loss", "norm", "skipped", "spikes", "scale")

Forward = Callable[[Batch], Tensor]


class Step:
    """A step, kernel by kernel.

    forward: the mean loss of a batch's targets, a scalar; see `forward_of`. Losses are weighed by their numbers of
    targets, over micro-batches and ranks, so that the step's gradient is that of the mean over all its targets.
    """

    def __init__(self, forward: Forward, optimizer: Optimizer, training: TrainingConfig, ranks: Ranks) -> None:
        device = optimizer.lr.device
        self.forward = forward
        self.optimizer = optimizer
        self.ranks = ranks
        self.guard = SpikeGuard(training.spike_sigmas, device) if training.spike_sigmas else None
        self.scaling = LossScale(device) if training.precision == "fp16" else None

    def __call__(self, batches: Sequence[Batch]) -> Tensor:
        """One step. batches: its micro-batches, on the device. Returns METRICS, fp32 on the device."""
        self.optimizer.zero_grad()
        loss = self.backward(batches)
        if self.scaling is not None:
            self.scaling.unscale(self.optimizer.parameters)
        self.optimizer.step()
        norm = self.optimizer.norm
        if self.scaling is not None:
            self.scaling.update(norm)
        nothing = loss.new_zeros(())
        return torch.stack(
            [
                loss,
                norm.float(),
                self.optimizer.skipped.float(),
                nothing if self.guard is None else self.guard.spikes,
                nothing if self.scaling is None else self.scaling.scale,
            ]
        )

    def backward(self, batches: Sequence[Batch]) -> Tensor:
        """Gradients of the mean loss over all targets, and that mean, over all ranks, detached."""
        counts = [(batch.targets != IGNORED).sum() for batch in batches]
        total = self.ranks.sum(torch.stack(counts).sum()).clamp(min=1).float()
        sums = torch.zeros((), dtype=torch.float32, device=total.device)
        for batch, count in zip(batches, counts, strict=True):
            loss = self.forward(batch)
            share = count / total
            # A batch without targets has no mean.
            sums += torch.where(count > 0, loss.detach(), 0.0) * share
            if self.guard is not None:
                loss = self.guard(loss if self.ranks.size == 1 else loss + (self.ranks.mean(loss) - loss).detach())
            scale = share * self.ranks.size  # FSDP divides sums of gradients by the number of ranks
            if self.scaling is not None:
                scale = scale * self.scaling.scale
            (loss * scale).backward()  # type: ignore[no-untyped-call]
            self.optimizer.widen()
        return self.ranks.sum(sums)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint keeps beside the parameters, by name."""
        yield from ((f"optimizer.{name}", value) for name, value in self.optimizer.state())
        for name, part in (("guard", self.guard), ("scaling", self.scaling)):
            if part is not None:
                yield from ((f"{name}.{key}", value) for key, value in part.state())


class CapturedStep:
    """The same step as one CUDA graph: the host launches it whole. For batches that all have one shape.

    The first steps run kernel by kernel, which compiles them; then one is captured, and from there on replayed. Batches
    are copied to where the graph reads them. Must be called with one and the same side stream current.
    """

    EAGER_STEPS = 2

    def __init__(self, step: Step) -> None:
        self.step = step
        self._done = 0
        self._batches: list[Batch] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._metrics: Tensor | None = None

    def __call__(self, batches: Sequence[Batch]) -> Tensor:
        if self._done < self.EAGER_STEPS:
            self._done += 1
            return self.step(batches)
        if self._graph is None:
            self._capture(batches)
        assert self._graph is not None
        assert self._metrics is not None
        for mine, given in zip(self._batches, batches, strict=True):
            mine.tokens.copy_(given.tokens)
            mine.targets.copy_(given.targets)
        self._graph.replay()
        return self._metrics.clone()

    def _capture(self, batches: Sequence[Batch]) -> None:
        self.step.optimizer.zero_grad()  # gradients get their places in the graph's own memory
        self._batches = [replace(b, tokens=b.tokens.clone(), targets=b.targets.clone()) for b in batches]
        self._graph = torch.cuda.CUDAGraph()
        # Threads that prefetch and save go on meanwhile, and are no concern of the capture.
        with torch.cuda.graph(self._graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            self._metrics = self.step(self._batches)


def plain_loss(model: DecoderModel, batch: Batch, *, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """The mean cross-entropy of a batch's targets, an fp32 scalar."""
    packed = None
    if batch.sequence_ends is not None:
        packed = PackedSequences(batch, model.dropout if model.training else 0.0)
    return model.loss(batch.tokens, batch.targets, packed, label_smoothing=label_smoothing, z_loss=z_loss)


def forward_of(model: DecoderModel, training: TrainingConfig) -> Forward:
    """The loss that is trained on, of a batch."""
    return partial(plain_loss, model, label_smoothing=training.label_smoothing, z_loss=training.z_loss)
