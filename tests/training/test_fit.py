"""Micro-batches that are chosen: held to the planner's own figures."""

from dataclasses import replace

import pytest

from fusedlm.hardware import find_gpu
from fusedlm.models import PRESETS
from fusedlm.planner import training_memory
from fusedlm.training.config import make_config
from fusedlm.training.fit import fitting_micro_batches, planned


@pytest.mark.parametrize(
    ("preset", "gpu", "ranks"),
    [("gpt2", "rtx4090", 1), ("gpt2", "h100", 8), ("gpt2-xl", "h100", 1), ("llama-3.2-1b", "a100", 2)],
)
def test_one_micro_batch_fits_and_fewer_do_not(preset: str, gpu: str, ranks: int) -> None:
    config = make_config(preset, None, ["training.precision=bf16"])
    model, found_gpu = PRESETS[preset], find_gpu(gpu)
    context = config.training.context or 1024
    rows = config.training.batch_size // ranks
    found = fitting_micro_batches(config, model, found_gpu, ranks)

    def fits(parts: int) -> bool:
        training = planned(config, context, rows // parts, ranks, accumulate=parts > 1)
        return training_memory(model, training, found_gpu).total <= 0.9 * found_gpu.memory

    assert rows % found == 0
    assert fits(found)
    assert not any(fits(parts) for parts in range(1, found) if rows % parts == 0)


def test_where_there_is_nothing_to_choose() -> None:
    config = make_config("shakespeare-char", None, ["training.precision=bf16"])
    model = replace(PRESETS["gpt2"], n_layers=6, width=384, n_heads=6, n_kv_heads=6, mlp_width=1536, vocab_size=65)
    assert fitting_micro_batches(config, model, find_gpu("h100"), 1) == 1
    assert fitting_micro_batches(config, model, None, 4) == 1
    with pytest.raises(ValueError, match="batch_size is 64; expected a multiple of 3 processes"):
        fitting_micro_batches(config, model, None, 3)
    large = make_config("llama-3.1-8b", None, ["training.precision=fp16"])
    with pytest.raises(ValueError, match="not one row of 4,096 tokens fits into the 15 GiB of Tesla T4"):
        fitting_micro_batches(large, PRESETS["llama-3.1-8b"], find_gpu("t4"), 1)


@pytest.mark.parametrize(
    ("override", "reshard", "direct"),
    [
        ("parallel.replicas=1", True, True),
        ("parallel.reshard_after_forward=false", False, True),
        ("parallel.direct=false", True, False),
        ("parallel.replicas=2", True, False),  # between which NCCL sums
    ],
)
def test_how_gpus_share_a_model_is_planned_as_it_is_run(override: str, reshard: bool, direct: bool) -> None:
    training = planned(make_config("gpt2", None, [override]), 1024, 4, 4, accumulate=False)
    assert (training.gpus, training.reshard, training.direct) == (4, reshard, direct)
