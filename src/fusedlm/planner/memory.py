"""Memory of training: what a step needs at its peak, and what fits."""

from dataclasses import replace

from fusedlm.hardware import GPU, find_gpu
from fusedlm.models import ModelConfig
from fusedlm.planner.step import walk
from fusedlm.planner.training import Memory, Training


def training_memory(config: ModelConfig, training: Training, gpu: str | GPU) -> Memory:
    """The memory of a step of AdamW, by walking through it: see `fusedlm.planner.step`.

    gpu: a name of `fusedlm.hardware.GPUS`, or what `detect` found; a little of the workspace depends on it.
    Raises ValueError for an unknown GPU, and where the context is longer than the model's.
    """
    if training.context > config.context_length:
        raise ValueError(f"context is {training.context}; the model's is {config.context_length}")
    return walk(config, training, find_gpu(gpu))


def largest_batch(config: ModelConfig, training: Training, gpu: str | GPU, limit: float) -> int:
    """The most sequences a GPU can take at once within `limit` bytes; 0 where not even one fits. batch is ignored."""

    def fits(batch: int) -> bool:
        return training_memory(config, replace(training, batch=batch), gpu).total <= limit

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
