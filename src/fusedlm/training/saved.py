"""A run's model from one of its checkpoints, and a model's loss on a text."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fusedlm.data.dataset import Dataset
from fusedlm.data.loader import Evaluation
from fusedlm.kernels import join_master, new_master
from fusedlm.models import DecoderModel
from fusedlm.tokenizer.interface import Tokenizer
from fusedlm.tokenizer.load import load_tokenizer
from fusedlm.training.checkpoints import Checkpoints, SavedCheckpoint, StateError
from fusedlm.training.datasets import open_dataset
from fusedlm.training.evaluation import Evaluated, evaluate
from fusedlm.training.identity import check_frozen, check_tokenizer
from fusedlm.training.lora import frozen_fingerprint, merged
from fusedlm.training.publish import described_model, model_of
from fusedlm.training.ranks import Ranks
from fusedlm.training.run import first_model, read_run
from fusedlm.training.saver import load_state


@dataclass(frozen=True)
class SavedModel:
    """A model as a run had it after so many steps."""

    model: DecoderModel
    tokenizer: Tokenizer
    step: int


def saved_model(
    folder: Path,
    *,
    step: int | None = None,
    masters: bool = False,
    warn: Callable[[str], None] = lambda text: None,
    offline: bool = False,
    cache_dir: Path | None = None,
) -> SavedModel:
    """The model of a run's checkpoint, the last good one or that of a step, on the CPU, LoRA merged.

    masters: the optimizer's fp32 masters in place of 16-bit weights. warn: is told of checkpoints that are damaged.
    Raises ValueError where there is no run, StateError where there is no such checkpoint.
    """
    config = read_run(folder)
    checkpoints = Checkpoints(folder / "checkpoints")
    found = checkpoints.last_good(warn) if step is None else checkpoints.verify(step)
    if found is None:
        raise StateError(f"{folder} has no checkpoint yet")
    ranks = Ranks(0, 1, torch.device("cpu"))
    tokenizer = _own_tokenizer(folder, found)
    if tokenizer is None or config.lora.rank:
        dataset = open_dataset(config.data, folder / "data", offline=offline, cache_dir=cache_dir)
    if tokenizer is None:
        tokenizer = dataset.tokenizer()
        check_tokenizer(tokenizer, found, f"the tokenizer of {dataset.folder}")
    if config.lora.rank:  # the weights that are not trained are not saved
        model = first_model(config, dataset, torch.device("cpu"), offline=offline, cache_dir=cache_dir)
        check_frozen(frozen_fingerprint(model), found, config)
    else:
        model = described_model(found.manifest.model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state: dict[str, Tensor] = {f"model.{name}": p.detach() for name, p in trained.items()}
    if masters and config.training.precision != "bf16-pure":
        for name, p in trained.items():
            state |= {f"optimizer.{name}.{key}": t for key, t in new_master(p).items()}
    load_state(found, state, ranks)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    if masters:
        parameters = {name: _master(name, p, state) for name, p in parameters.items()}
    whole = model_of(model.config, merged(parameters, config.lora))
    return SavedModel(whole, tokenizer, found.manifest.step)


def _master(name: str, p: Tensor, state: dict[str, Tensor]) -> Tensor:
    """A parameter in fp32: its master, where the state has one."""
    low = state.get(f"optimizer.{name}.master_low")
    return state.get(f"optimizer.{name}.master", p).float() if low is None else join_master(p, low)


def _own_tokenizer(folder: Path, found: SavedCheckpoint) -> Tokenizer | None:
    """The one beside the trained model in a run's folder, where it is the one that the run was trained with."""
    try:
        tokenizer = load_tokenizer(folder)
        check_tokenizer(tokenizer, found, str(folder))
    except ValueError:  # the run has not come to its end, or somebody has put another one there
        return None
    return tokenizer


@dataclass(frozen=True)
class TextLoss:
    """bits_per_byte: of the text that the targets stand for; what does not depend on the tokenizer."""

    evaluated: Evaluated
    bits_per_byte: float


def text_loss(
    model: DecoderModel, dataset: Dataset, split: str, *, context: int | None = None, batch_size: int = 8
) -> TextLoss:
    """The loss of a model on a split, whole. Raises ValueError where the tokenizer's ids are too many for the model."""
    dataset.check_vocabulary(model.config.vocab_size)
    context = min(1024 if context is None else context, model.config.context_length)
    rows = Evaluation(dataset, batch_size=batch_size, context=context, split=split)
    found = evaluate(model, rows, Ranks(0, 1, model.embedding.weight.device))
    tokenizer, tokens = dataset.tokenizer(), dataset.split(split)
    counts = np.bincount(tokens.tokens(1, tokens.n_tokens), minlength=dataset.vocab_size)
    size = sum(
        int(count) * len(tokenizer.token_bytes(id))
        for id, count in enumerate(counts)
        if count and not tokenizer.is_special(id)
    )
    return TextLoss(found, found.bits_per_byte(max(size, 1)))
