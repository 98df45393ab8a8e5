"""What becomes of a run whose step changed nothing: it is told and counted, or it is the end."""

import math
from collections.abc import Callable, Mapping

from fusedlm.training.config import TrainingConfig


class TrainingError(ValueError):
    """Training cannot go on: the message says at which step, why, and what could help."""


class Judge:
    """Looks at the METRICS of every step, in order.

    say: takes a line for people. diagnose: what to say of a step, counted from 0, whose gradients are not finite.
    """

    def __init__(self, training: TrainingConfig, say: Callable[[str], None], diagnose: Callable[[int], str]) -> None:
        self._training, self._say, self._diagnose = training, say, diagnose
        self._in_a_row = 0
        self._skipped = self._spikes = 0.0

    @property
    def stops_at_once(self) -> bool:
        """Whether a single bad step ends the run, so that the one after it must wait for the verdict."""
        return "stop" in (self._training.nonfinite, self._training.spike)

    def resume(self, *, skipped: float, spikes: float) -> None:
        """Counts that a run goes on with."""
        self._skipped, self._spikes = skipped, spikes

    def __call__(self, index: int, values: Mapping[str, float]) -> None:
        """Raises TrainingError where this step ends the run. index: of the step, from 0."""
        skipped, spiked = values["skipped"] > self._skipped, values["spikes"] > self._spikes
        self._skipped, self._spikes = values["skipped"], values["spikes"]
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if not skipped:
            return
        training, loss = self._training, values["loss"]
        if spiked:
            self._say(f"step {index + 1} was skipped: its loss, {loss:.4g}, is a spike")
            if training.spike == "stop":
                raise TrainingError(
                    f"step {index + 1}: the loss is {loss:.4g}, more than {training.spike_sigmas:g} standard "
                    f"deviations above its mean. {batch_of(index, training)}; the last checkpoint is not touched"
                )
            return
        # fp16 looks for its scale that way; where it has come down to 1 the scale is not what is wrong.
        if values["scale"] > 1 and math.isfinite(loss):
            return
        self._say(f"step {index + 1} was skipped: loss {loss:.4g}, norm of its gradients {values['norm']:.4g}")
        if training.nonfinite == "stop" or self._in_a_row >= training.max_skipped:
            raise TrainingError(self._diagnose(index))


def batch_of(index: int, training: TrainingConfig) -> str:
    """Which batch a step had, so that it can be looked at."""
    return f"Its batch is step {index} of the loader with seed {training.seed}"
