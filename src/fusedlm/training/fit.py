"""How many micro-batches a step takes, where nobody says: as few as the planner fits into the GPU's memory."""

from fusedlm.hardware import GPU
from fusedlm.models import ModelConfig
from fusedlm.planner import Training, largest_batch
from fusedlm.training.config import RunConfig

_HEADROOM = 0.1  # of the memory: CUDA's context, gaps between blocks


def planned(config: RunConfig, context: int, batch: int, gpus: int, *, accumulate: bool) -> Training:
    """The planner's description of a run. context: tokens a row. batch: rows that a GPU takes at once."""
    training = config.training
    precision = training.precision or "fp32"
    pure = precision == "bf16-pure"
    return Training(
        batch=batch,
        context=context,
        dtype=precision.removesuffix("-pure"),
        masters=not pure,
        grad_dtype=training.grad_dtype,
        state_dtype=training.state_dtype or ("bf16" if pure else "fp32"),
        dropout=training.dropout > 0,
        recompute=training.recompute,
        accumulate=accumulate,
        gpus=gpus,
        reshard=config.parallel.reshard_after_forward,
        direct=config.parallel.direct and config.parallel.replicas == 1,
    )


def fitting_micro_batches(config: RunConfig, model: ModelConfig, gpu: GPU | None, ranks: int) -> int:
    """The fewest micro-batches into which a rank's rows divide evenly and of which one fits; 1 without a GPU.

    Raises ValueError where rows do not divide among the ranks, and where not one row fits.
    """
    training = config.training
    if training.batch_size % ranks:
        raise ValueError(f"training.batch_size is {training.batch_size}; expected a multiple of {ranks} processes")
    rows = training.batch_size // ranks
    if gpu is None:
        return 1
    context = training.context or min(model.context_length, 1024)
    shards = max(ranks // config.parallel.replicas, 1)
    limit = gpu.memory * (1 - _HEADROOM)
    at_once, summed = (
        largest_batch(model, planned(config, context, 1, shards, accumulate=accumulate), gpu, limit)
        for accumulate in (False, True)
    )
    if at_once >= rows:
        return 1
    if summed < 1:
        raise ValueError(
            f"not one row of {context:,} tokens fits into the {gpu.memory / 2**30:.0f} GiB of {gpu.name}; "
            "training.context, training.recompute or more GPUs would help, and `fusedlm plan` says how much"
        )
    return next(parts for parts in range(2, rows + 1) if rows % parts == 0 and rows // parts <= summed)
