"""Learning rates over the steps of a run."""

import math
from dataclasses import dataclass

from fusedlm.training.config import TrainingConfig


@dataclass(frozen=True)
class Schedule:
    """The share of the highest learning rate that a step has.

    Warm-up is linear over `warmup` steps, from 1 / warmup. Then "cosine" (Loshchilov and Hutter 2017) and "linear" go
    down to `floor` at the last step; "wsd" (warm-up, stable, decay: Hu et al. 2024) stays at 1 and goes down linearly
    in the last `decay` of all steps; "constant" stays.
    """

    kind: str
    steps: int
    warmup: int
    floor: float
    decay: float

    @classmethod
    def of(cls, training: TrainingConfig) -> "Schedule":
        floor = 0.1 if training.min_lr is None else training.min_lr / training.lr
        return cls(training.schedule, training.steps, training.warmup, floor, training.decay)

    def __call__(self, step: int) -> float:
        """step: counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.kind == "constant":
            return 1.0
        begin = self.warmup
        if self.kind == "wsd":
            begin = max(begin, self.steps - round(self.decay * self.steps))
        gone = min(max(step - begin, 0) / max(self.steps - 1 - begin, 1), 1.0)
        share = (1 + math.cos(math.pi * gone)) / 2 if self.kind == "cosine" else 1 - gone
        return self.floor + (1 - self.floor) * share
