"""`train`: a run from a configuration, in a new folder, or one that goes on in its own."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from fusedlm.checkpoint.load import load_checkpoint
from fusedlm.data.dataset import Dataset
from fusedlm.hardware import available_cores, detect
from fusedlm.models import DecoderModel, ModelConfig, build_model
from fusedlm.tokenizer.files import write_text
from fusedlm.training.checkpoints import Checkpoints, StateError, read_manifest
from fusedlm.training.config import RunConfig, model_config, read_toml, validate
from fusedlm.training.datasets import CHARACTERS, open_dataset
from fusedlm.training.fit import fitting_micro_batches
from fusedlm.training.loggers import loggers
from fusedlm.training.lora import add_lora
from fusedlm.training.metrics import METRICS_FILE, MetricsFile, Observer
from fusedlm.training.publish import described_model
from fusedlm.training.ranks import Ranks, join_ranks
from fusedlm.training.trainer import Result, Sample, Trainer

RUN_FILE = "run.toml"
LOCK_FILE = ".lock"
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "bf16-pure": torch.bfloat16,
    "fp16": torch.float16,
}


def train(
    config: RunConfig,
    folder: Path | str,
    *,
    resume: bool = False,
    device: str = "auto",
    observers: Sequence[Observer] = (),
    sample: Sample | None = None,
    offline: bool = False,
    cache_dir: Path | None = None,
    profile: Path | None = None,
) -> Result:
    """Train a model in a folder, which holds all of the run when it is done: see docs/training.md.

    resume: go on from the folder's last good checkpoint, or from the beginning where there is none yet.
    device: "auto", "cpu" or "cuda"; under torchrun every process has its own. observers: hear of everything beside
    metrics.csv. sample: writes a text at evaluations. offline, cache_dir: of what data and weights are fetched.
    profile: a folder for a trace and a table of kernels of a few steps.

    Raises ValueError for what cannot be, among them DataError (the data), StateError (checkpoints), TrainingError (a
    run that cannot go on) and CheckpointError (weights to begin with).
    """
    with ExitStack() as stack:
        ranks = stack.enter_context(join_ranks(device))
        where: Path = ranks.gather(Path(folder))[0]
        observers = observers if ranks.first else ()
        config = _with_absolute_paths(_with_tokenizer(_with_precision(config, ranks.device)))
        _cores(ranks)
        if ranks.first:
            if profile is not None:
                _make_folder(profile, "a profile")
            if resume:
                _check_kept(config, where)
            else:
                stack.enter_context(_claimed(where, config))
            stack.enter_context(_only_process(where))
            prepared = _open(config, where, observers, offline, cache_dir)
            prepared.verify_changed(partial(_say, observers))
        ranks.gather(None)  # the others wait for the dataset
        dataset = _open(config, where, observers, offline, cache_dir)
        described = _described(where) if resume and config.model.init is not None and not config.lora.rank else None
        model, whole = _models(config, dataset, ranks, described, offline=offline, cache_dir=cache_dir)
        config = _with_micro_batches(config, model.config, ranks)
        own = [MetricsFile(where / METRICS_FILE), *loggers(config, where)] if ranks.first else []
        parts: dict[str, Any] = {"dataset": dataset, "ranks": ranks, "profile": profile, "sample": sample}
        trainer = Trainer(config, where, model=model, whole=whole, observers=[*own, *observers], **parts)
        del whole  # it has been divided, and must not take memory while the run lasts
        if resume:
            trainer.resume()
        if ranks.first:  # only now is it known that a run can go on with these settings
            write_text(where / RUN_FILE, config.to_toml())
        return trainer.run()


def read_run(folder: Path) -> RunConfig:
    """The configuration that a run was saved with. Raises ValueError where there is none."""
    path = folder / RUN_FILE
    if not path.exists():
        raise ValueError(f"{folder} holds no run: {path} is missing")
    return validate(read_toml(path), str(path))


def first_model(
    config: RunConfig,
    dataset: Dataset,
    device: torch.device,
    described: object = None,
    *,
    offline: bool = False,
    cache_dir: Path | None = None,
) -> DecoderModel:
    """The model that a run begins with, its weights drawn or read, on a device; with LoRA, its additions are there.

    described: a manifest's description of a checkpoint that has every weight; then none is drawn or read.
    Raises ValueError.
    """
    if described is not None:
        model = described_model(described).to(device)
        model.dropout = config.training.dropout
        return model.train()
    model = _drawn_or_read(config, dataset, device, offline, cache_dir)
    if config.lora.rank:
        add_lora(model, config.lora, config.training.seed)
    return model


def _described(folder: Path) -> object:
    """The model of a run's checkpoints, as the newest that can say so does; None without one."""
    checkpoints = Checkpoints(folder / "checkpoints")
    for step in reversed(checkpoints.steps()):
        with suppress(StateError):
            return read_manifest(checkpoints.path(step)).model
    return None


def _models(
    config: RunConfig, dataset: Dataset, ranks: Ranks, described: object, **options: Any
) -> tuple[DecoderModel, DecoderModel | None]:
    """`model` and `whole`, as `Trainer` takes them. One rank alone draws or reads weights, whatever their number."""
    if ranks.size == 1:
        return first_model(config, dataset, ranks.device, described, **options), None
    whole = first_model(config, dataset, torch.device("cpu"), described, **options) if ranks.first else None
    sizes: ModelConfig = ranks.gather(whole.config if whole is not None else None)[0]
    dtype = DTYPES[config.training.precision or "fp32"]
    model = build_model(sizes, dropout=config.training.dropout, device="meta", dtype=dtype)
    if config.lora.rank:
        add_lora(model, config.lora, config.training.seed)
    return model, whole


def _drawn_or_read(
    config: RunConfig, dataset: Dataset, device: torch.device, offline: bool, cache_dir: Path | None
) -> DecoderModel:
    training, settings = config.training, config.model
    dtype = DTYPES[training.precision or "fp32"]
    if settings.init is not None:
        checkpoint = load_checkpoint(settings.init, dtype=dtype, device=device, offline=offline, cache_dir=cache_dir)
        if checkpoint.tokenizer is not None:
            dataset.check_tokenizer(checkpoint.tokenizer, f"the tokenizer of {settings.init}")
        model = checkpoint.model
        model.dropout = training.dropout
        return model.train()
    described = model_config(settings, dataset.vocab_size)
    if training.context is not None and training.context > described.context_length:
        described = replace(described, context_length=training.context)
    model = build_model(described, dropout=training.dropout)
    model.init_weights(torch.Generator().manual_seed(training.seed))  # on the CPU: the same numbers on every device
    return model.to(device, dtype)


def _make_folder(folder: Path, what: str) -> None:
    """Raises ValueError where there can be no folder for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be the folder of {what}: {error.strerror or error}") from None


@contextmanager
def _claimed(folder: Path, config: RunConfig) -> Iterator[None]:
    """Make the run's folder and write its configuration there, so that it can go on from here.

    Where an error ends the run before it has anything else, the folder goes again: the next try needs no other name.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; expected a new folder, or --resume {folder} to go on")
    _make_folder(folder, "a run")
    write_text(folder / RUN_FILE, config.to_toml())
    try:
        yield
    except Exception:
        if {path.name for path in folder.rglob("*") if path.is_file()} <= {RUN_FILE, LOCK_FILE}:
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def _only_process(folder: Path) -> Iterator[None]:
    """Raises ValueError where another process trains in the folder. However that one ends, the system lets go."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK_FILE, timeout=0):
            yield
    except Timeout:
        raise ValueError(f"another process trains in {folder}; expected it to end first") from None


def _open(
    config: RunConfig, folder: Path, observers: Sequence[Observer], offline: bool, cache_dir: Path | None
) -> Dataset:
    where, say = folder / "data", partial(_say, observers)
    return open_dataset(config.data, where, offline=offline, cache_dir=cache_dir, say=say)


def _say(observers: Sequence[Observer], text: str) -> None:
    for observer in observers:
        observer.say(text)


def _with_precision(config: RunConfig, device: torch.device) -> RunConfig:
    """Settled where it was left open: bf16 on a GPU that has it, else fp16; fp32 on a CPU."""
    training = config.training
    if training.precision is None:
        found = "fp32"
        if device.type == "cuda":
            found = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
        training = training.model_copy(update={"precision": found})
    return config.model_copy(update={"training": training})


def _with_micro_batches(config: RunConfig, model: ModelConfig, ranks: Ranks) -> RunConfig:
    """Settled where it was left open."""
    if config.training.micro_batches is not None:
        return config
    gpu = detect(ranks.device) if ranks.device.type == "cuda" else None
    found = fitting_micro_batches(config, model, gpu, ranks.size)
    return config.model_copy(update={"training": config.training.model_copy(update={"micro_batches": found})})


def _with_tokenizer(config: RunConfig) -> RunConfig:
    """A model that is trained further keeps its tokenizer."""
    if config.model.init is None or config.data.tokenizer is not None:
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": config.model.init})})


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    """So that a run goes on from whatever folder it is asked to. What names no file is a name, and stays."""

    def absolute(given: str | None) -> str | None:
        path = Path(given).expanduser() if given else None
        return str(path.absolute()) if path is not None and path.exists() else given

    data, init = config.data, absolute(config.model.init)
    tokenizer = data.tokenizer if data.tokenizer == CHARACTERS else absolute(data.tokenizer)
    data = data.model_copy(update={"sources": tuple(map(absolute, data.sources)), "tokenizer": tokenizer})
    return config.model_copy(update={"data": data, "model": config.model.model_copy(update={"init": init})})


def _check_kept(config: RunConfig, folder: Path) -> None:
    """Raises ValueError where a run is to go on with settings that say what it began from, and are others."""
    if not (folder / RUN_FILE).exists():
        return
    before = _with_absolute_paths(read_run(folder))
    # A dataset that lies elsewhere may have moved, and is known by its fingerprint.
    made = (folder / "data").exists()
    kept = ["data.tokenizer", "data.chat", "data.val_fraction", "data.separator", "data.glob", "model.init"]
    kept += [*(["data.sources"] if made else []), *(f"lora.{name}" for name in type(config.lora).model_fields)]
    for key in kept:
        section, _, name = key.partition(".")
        was, now = (getattr(getattr(of, section), name) for of in (before, config))
        if was != now:
            raise ValueError(f"{key} is {now!r}, and {folder} began with {was!r}; expected that, or a new run")


def _cores(ranks: Ranks) -> None:
    """On a CPU, threads for the cores this process may use: torch counts those of the whole machine."""
    if ranks.device.type == "cpu":
        torch.set_num_threads(max(1, min(torch.get_num_threads(), available_cores() // ranks.size)))
