"""The loss of a whole split, or of its first batches: fixed rows, which compare from step to step and run to run."""

import math
from dataclasses import dataclass
from itertools import islice

import torch

from fusedlm.data.loader import Evaluation
from fusedlm.data.rows import IGNORED
from fusedlm.models import DecoderModel
from fusedlm.training.ranks import Ranks
from fusedlm.training.step import plain_loss


@dataclass(frozen=True)
class Evaluated:
    """loss: the mean, in nats a token, over so many tokens."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def bits_per_byte(self, size: int) -> float:
        """size: bytes of the text that the tokens stand for."""
        return self.loss * self.tokens / math.log(2) / size


@torch.no_grad()
def evaluate(model: DecoderModel, rows: Evaluation, ranks: Ranks, batches: int | None = None) -> Evaluated:
    """The mean loss over the targets of a split, or of its first batches, in evaluation mode, over all ranks."""
    training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    try:
        for batch in islice(rows, batches):
            there = batch.to(ranks.device)
            count = (there.targets != IGNORED).sum()
            loss = plain_loss(model, there)
            total += torch.stack([torch.where(count > 0, loss.double(), 0.0) * count, count.double()])
    finally:
        model.train(training)
    loss_sum, tokens = ranks.sum(total).tolist()
    return Evaluated(loss_sum / max(tokens, 1), int(tokens))
