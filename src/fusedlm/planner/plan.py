"""Everything at once: what training a model on a GPU takes."""

from dataclasses import dataclass, replace
from typing import Any

from fusedlm.hardware import GPU, dtype_name, find_gpu
from fusedlm.models import ModelConfig
from fusedlm.planner.flops import Flops, flops_per_token
from fusedlm.planner.memory import largest_batch, training_memory
from fusedlm.planner.parameters import Parameters, parameters
from fusedlm.planner.tokens import fitted_tokens, optimal_tokens
from fusedlm.planner.training import Memory, Training


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `make_plan` found.

    flops: a token. memory: of one GPU. limit: bytes a GPU may give to it. largest_batch: sequences that fit one GPU, 0
    where none does. tokens_per_second: of all GPUs. optimal_tokens, fitted_tokens: see `fusedlm.planner.tokens`.
    tokens: how many are trained on, in `seconds`, for `cost`; None without a price.
    """

    gpu: GPU
    config: ModelConfig
    training: Training
    parameters: Parameters
    flops: Flops
    memory: Memory
    limit: float
    largest_batch: int
    mfu: float
    tokens_per_second: float
    optimal_tokens: float
    fitted_tokens: float
    tokens: float
    seconds: float
    cost: float | None

    @property
    def fits(self) -> bool:
        """Whether the batch does."""
        return self.memory.total <= self.limit


def make_plan(
    config: ModelConfig,
    *,
    gpu: str | GPU,
    batch: int | None = None,
    context: int | None = None,
    mfu: float = 0.4,
    tokens: float | None = None,
    price: float | None = None,
    headroom: float = 0.1,
    **options: Any,
) -> Plan:
    """What it takes to train a model.

    gpu: a name of `fusedlm.hardware.GPUS`, or what `detect` found. batch: sequences a GPU, by default as many as fit.
    context: tokens of each, by default the model's. mfu: the share of the peak that is reached; an assumption, of which
    speed, time and cost are made. tokens: to train on, by default 20 a parameter. price: of one GPU for an hour.
    headroom: the share of a GPU's memory that is left to CUDA's context and code, to communication, and to gaps between
    blocks. options: those of `Training`. Raises ValueError for what cannot be.
    """
    gpu = find_gpu(gpu)
    for name, value in (("mfu", mfu), ("tokens", tokens), ("price", price)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value}; expected more than 0")
    if mfu > 1:
        raise ValueError(f"mfu is {mfu}; expected a share of the peak, at most 1")
    if not 0 <= headroom < 1:
        raise ValueError(f"headroom is {headroom}; expected 0 or more, and less than 1")
    context = config.context_length if context is None else context
    options["dtype"] = dtype_name(options.get("dtype", "bf16"))
    training = Training(batch=1 if batch is None else batch, context=context, **options)
    peak = gpu.peak(training.dtype)
    limit = gpu.memory * (1 - headroom)
    largest = largest_batch(config, training, gpu, limit)
    if batch is None:
        training = replace(training, batch=max(largest, 1))
    counted, flops = parameters(config), flops_per_token(config, training.context)
    speed = mfu * peak * training.gpus / flops.total
    optimal = optimal_tokens(counted.total)
    seconds = (tokens or optimal) / speed
    return Plan(
        gpu=gpu,
        config=config,
        training=training,
        parameters=counted,
        flops=flops,
        memory=training_memory(config, training, gpu),
        limit=limit,
        largest_batch=largest,
        mfu=mfu,
        tokens_per_second=speed,
        optimal_tokens=optimal,
        fitted_tokens=fitted_tokens(counted.total),
        tokens=tokens or optimal,
        seconds=seconds,
        cost=None if price is None else price * training.gpus * seconds / 3600,
    )
