"""How a run is configured: TOML and overrides on top of a preset; an unknown key is an error with the nearest name."""

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from fusedlm.kernels import RopeScaling
from fusedlm.models import PRESETS as MODELS
from fusedlm.models import GPT2Config, LlamaConfig, ModelConfig
from fusedlm.training.presets import PRESETS, preset

Precision = Literal["fp32", "tf32", "bf16", "bf16-pure", "fp16"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(_Section):
    """What is trained on.

    sources: files, folders, named sets, or the folder of a prepared dataset. tokenizer: "characters", a folder or a
    name; None for the one that goes with the sources. val_fraction, separator, glob, chat: as `fusedlm data prepare`.
    order, documents: as `fusedlm.data.loader.Loader`.
    """

    sources: tuple[str, ...] = ("python",)
    tokenizer: str | None = None
    val_fraction: float | None = Field(default=None, ge=0, lt=1)
    separator: str | None = None
    glob: str | None = None
    chat: bool = False
    order: Literal["random", "shuffled"] = "random"
    documents: Literal["joined", "separate", "packed"] | None = None


class ModelSettings(_Section):
    """What is trained.

    preset: sizes by a name of `fusedlm.models.PRESETS`; those given beside it replace its own. Without one,
    architecture and sizes: n_kv_heads as n_heads, mlp_width 4 * width for GPT-2 and 8/3 * width for Llama by default.
    bias: GPT-2's, in products and norms; false makes the model nanoGPT's.
    init: the weights to begin with, a name or a path as `fusedlm generate --model` takes; it brings its own sizes.
    vocab_size: by default the data's tokenizer's, raised to a multiple of vocab_multiple.
    """

    preset: str | None = None
    init: str | None = None
    architecture: Literal["gpt2", "llama"] = "gpt2"
    vocab_size: int | None = Field(default=None, ge=1)
    vocab_multiple: int = Field(default=1, ge=1)
    context_length: int | None = Field(default=None, ge=1)
    n_layers: int | None = Field(default=None, ge=1)
    n_heads: int | None = Field(default=None, ge=1)
    n_kv_heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)
    mlp_width: int | None = Field(default=None, ge=1)
    norm_eps: float | None = Field(default=None, gt=0)
    tied: bool | None = None
    bias: bool | None = None
    rope_theta: float | None = Field(default=None, gt=0)


class TrainingConfig(_Section):
    """How it is trained.

    batch_size: rows a step, of all micro-batches and GPUs together. micro_batches: parts in which a GPU takes its rows,
    by default as few as fit its memory. context: tokens a row; by default the model's, at most 1,024.
    lr, min_lr: the highest and the last learning rate, this one by default a tenth of the other. warmup: steps. decay:
    the share of the steps in which "wsd" decays, at the end. muon_lr: of the matrices that Muon takes.
    precision: "fp32"; "tf32", its products rounded; "bf16", with fp32 masters in the optimizer; "bf16-pure", without;
    "fp16", with masters and a scaled loss. state_dtype: of the optimizer's moments; bf16 for "bf16-pure" by default.
    grad_dtype: "fp32" sums the gradients of micro-batches in fp32, in twice the memory; "fp16" always does so.
    recompute: what the backward pass computes anew: nothing, what is cheap (norms, GELU, SwiGLU), or blocks.
    graph: a step is one CUDA graph where there is a GPU and shapes are fixed.
    nonfinite, spike: what happens at gradients that are no numbers, and at losses more than spike_sigmas standard
    deviations above their moving mean (0: nothing is a spike). max_skipped: steps skipped in a row that end the run.
    """

    steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=32, ge=1)
    micro_batches: int | None = Field(default=None, ge=1)
    context: int | None = Field(default=None, ge=1)
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    min_lr: float | None = Field(default=None, ge=0)
    muon_lr: float = Field(default=0.02, gt=0)
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup: int = Field(default=100, ge=0)
    decay: float = Field(default=0.2, gt=0, le=1)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    max_norm: float | None = Field(default=1.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    z_loss: float = Field(default=0.0, ge=0)
    precision: Precision | None = None
    state_dtype: Literal["fp32", "bf16"] | None = None
    grad_dtype: Literal["same", "fp32"] = "same"
    recompute: Literal["none", "cheap", "blocks"] = "none"
    graph: bool = True
    deterministic: bool = False
    seed: int = Field(default=1337, ge=0, lt=1 << 63)
    nonfinite: Literal["skip", "stop"] = "skip"
    spike: Literal["skip", "stop"] = "skip"
    spike_sigmas: float = Field(default=0.0, ge=0)
    max_skipped: int = Field(default=20, ge=1)

    @field_validator("min_lr")
    @classmethod
    def _not_above_lr(cls, min_lr: float | None, found: ValidationInfo) -> float | None:
        lr = found.data.get("lr")  # not there where it is no number, which is an error of its own
        if min_lr is not None and lr is not None and min_lr > lr:
            raise ValueError(f"a number up to training.lr, {lr!r}: the learning rate goes down to it")
        return min_lr


class EvaluationConfig(_Section):
    """When the split val is evaluated: every `interval` steps, and at the end; 0 is never.

    batches: at most so many, None for all of it. batch_size: rows a batch, by default those of a micro-batch.
    sample_tokens: of a sample that follows each evaluation, 0 for none; prompt: what it continues.
    """

    interval: int = Field(default=250, ge=0)
    batches: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    sample_tokens: int = Field(default=100, ge=0)
    prompt: str = "\n"
    temperature: float = Field(default=0.8, ge=0)


class CheckpointConfig(_Section):
    """interval: steps between two, 0 for one at the end alone. keep: how many stay. asynchronous: training goes on
    while one is written."""

    interval: int = Field(default=500, ge=0)
    keep: int = Field(default=2, ge=1)
    asynchronous: bool = True


class ParallelConfig(_Section):
    """Under torchrun. reshard_after_forward: let go of weights between forward and backward (ZeRO stage 3, else 2).
    replicas: groups of GPUs that each hold the whole, sharded within (HSDP). direct: GPUs of a single host, without
    replicas, that reach each other's memory write there, which leaves their multiprocessors to the model; gradients are
    summed in fp32. Elsewhere, or without it, NCCL's kernels gather and sum. reduce_dtype: of the sums of these."""

    reshard_after_forward: bool = True
    replicas: int = Field(default=1, ge=1)
    reduce_dtype: Literal["fp32", "same"] = "fp32"
    direct: bool = True


class LoRAConfig(_Section):
    """Train low-rank additions to some matrices, and nothing else; rank 0 trains all weights.

    targets: names of matrices in a block: attention.qkv, attention.out, mlp.up, mlp.gate_up, mlp.down.
    """

    rank: int = Field(default=0, ge=0)
    alpha: float = Field(default=16.0, gt=0)
    targets: tuple[str, ...] = ("attention.qkv", "attention.out")

    @field_validator("alpha", "targets")
    @classmethod
    def _of_a_rank(cls, value: Any, found: ValidationInfo) -> Any:
        assert found.field_name is not None
        if found.data.get("rank") == 0 and value != cls.model_fields[found.field_name].default:
            raise ValueError("lora.rank beside it, without which all weights are trained")
        if isinstance(value, tuple) and not 0 < len(value) == len(set(value)):
            raise ValueError("names, each once")
        return value


class LogConfig(_Section):
    """interval: steps between two rows of metrics.csv. tensorboard, wandb: write there too; the extra of that name."""

    interval: int = Field(default=10, ge=1)
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "fusedlm"


class RunConfig(_Section):
    """All of a run. `preset` is the name it was begun from, for people."""

    preset: str | None = None
    data: DataConfig = DataConfig()
    model: ModelSettings = ModelSettings()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    parallel: ParallelConfig = ParallelConfig()
    lora: LoRAConfig = LoRAConfig()
    log: LogConfig = LogConfig()

    def to_toml(self) -> str:
        """The same as TOML; what is None is left out."""
        values = self.model_dump(exclude_none=True)
        lines = [f"{key} = {_toml(value)}" for key, value in values.items() if not isinstance(value, dict)]
        for name, section in values.items():
            if isinstance(section, dict):
                lines += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in section.items())]
        return "\n".join(lines).lstrip() + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)


def make_config(
    name: str | None = None,
    file: Path | str | None = None,
    overrides: Sequence[str] = (),
    **sections: Mapping[str, Any],
) -> RunConfig:
    """A preset (see `training.presets`), then a TOML file, then sections, then overrides such as "training.lr=3e-4".

    Where neither a name nor the file's key `preset` says which preset, there is none: defaults stand.
    Raises ValueError for an unknown preset or key, with the nearest name there is, for a value that does not fit, and
    for a file that is no TOML.
    """
    given = read_toml(Path(file)) if file is not None else {}
    name = name or given.get("preset")
    values: dict[str, Any] = preset(name) if name is not None else {}
    _merge(values, given)
    _merge(values, {"preset": name} if name is not None else {})
    later: dict[str, Any] = {section: dict(entries) for section, entries in sections.items() if entries}
    for override in overrides:
        _merge(later, _override(override))
    _merge(values, later)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        of_file = all(_has(given, item["loc"]) and not _has(later, item["loc"]) for item in error.errors())
        raise _refusal(error, str(file) if of_file else "the configuration") from None


def override_config(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The same with some settings changed. Raises ValueError as make_config does."""
    values = config.model_dump()
    for override in overrides:
        _merge(values, _override(override))
    return validate(values, "the configuration")


def read_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file. Raises ValueError where it cannot be read or is no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None


def validate(values: Mapping[str, Any], where: str) -> RunConfig:
    """The configuration of a table. Raises ValueError, which calls it `where`."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise _refusal(error, where) from None


def _refusal(error: ValidationError, where: str) -> ValueError:
    return ValueError(f"{where}: {'; '.join(map(_complaint, error.errors()))}")


def _has(values: Any, loc: Sequence[Any]) -> bool:
    """Whether a table sets the key at a place, or something around it."""
    for key in loc:
        if not isinstance(values, Mapping):
            return True
        if key not in values:
            return False
        values = values[key]
    return True


# What pydantic expects, in the words of TOML.
_KINDS = {"tuple_type": 'a list, ["a", "b"] for example', "model_type": "a table of settings"}


def _complaint(error: Any) -> str:
    path = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"unknown key {path}; {_nearest(error['loc'])}"
    if error["type"] == "missing":
        owner, _, _ = path.rpartition(".")
        return f"{owner} is {error['input']!r}; expected more values"
    if error["type"] in _KINDS:
        return f"{path} is {error['input']!r}; expected {_KINDS[error['type']]}"
    expected = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{path} is {error['input']!r}; expected {expected}"


# Names that other trainers give to settings, of those that look nothing like ours.
_ELSEWHERE = {
    "learning_rate": "training.lr",
    "max_lr": "training.lr",
    "learning_rate_decay": "training.schedule",
    "lr_scheduler_type": "training.schedule",
    "grad_clip": "training.max_norm",
    "max_grad_norm": "training.max_norm",
    "gradient_accumulation_steps": "training.micro_batches",
    "max_iters": "training.steps",
    "block_size": "training.context",
    "seq_len": "training.context",
    "n_embd": "model.width",
    "hidden_size": "model.width",
    "dtype": "training.precision",
    "dataset": "data.sources",
}


def _nearest(loc: tuple[Any, ...]) -> str:
    """What an unknown key may have been meant to be: in its own section, or in another one."""
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    keys = {name: list(_fields(kind)) for name, kind in sections.items() if _fields(kind)}
    if len(loc) == 1:
        near = difflib.get_close_matches(loc[0], sections, n=1)
        elsewhere = [f"{name}.{loc[0]}" for name, known in keys.items() if loc[0] in known]
        known = list(sections)
    else:
        near = [f"{loc[0]}.{name}" for name in difflib.get_close_matches(loc[1], keys.get(loc[0], []), n=1)]
        elsewhere = [f"{name}.{loc[1]}" for name, known in keys.items() if loc[1] in known]
        known = keys.get(loc[0], [])
    meant = _ELSEWHERE.get(str(loc[-1]))
    guesses = elsewhere or ([meant] if meant is not None else near)
    return f"did you mean {' or '.join(guesses)}?" if guesses else f"expected one of {', '.join(known)}"


def _override(text: str) -> dict[str, Any]:
    """{"training": {"lr": 3e-4}} of "training.lr=3e-4". A value that is no TOML is text."""
    path, equals, value = text.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or not all(keys):
        raise ValueError(f"--set {text!r}; expected section.key=value, training.lr=3e-4 for example")
    try:
        parsed: Any = tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    if parsed == "none" and _may_be_none(keys):
        parsed = None
    for key in reversed(keys):
        parsed = {key: parsed}
    return parsed


def _may_be_none(keys: list[str]) -> bool:
    """Whether a key takes None, which TOML has no word for."""
    section = RunConfig.model_fields.get(keys[0])
    field = _fields(section.annotation).get(keys[-1]) if section is not None and len(keys) == 2 else None
    return field is not None and isinstance(field.annotation, UnionType) and type(None) in get_args(field.annotation)


def _fields(kind: Any) -> Mapping[str, Any]:
    """The keys of a section; none of anything else."""
    return kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}


def _merge(values: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = dict(value) if isinstance(value, Mapping) else value


def model_config(settings: ModelSettings, vocab_size: int) -> ModelConfig:
    """The model that settings describe, for a tokenizer of so many ids.

    Raises ValueError for an unknown preset, sizes that are missing or that cannot be.
    """
    sizes = {
        name: getattr(settings, name)
        for name in (
            *("context_length", "n_layers", "n_heads", "n_kv_heads", "head_dim", "width", "mlp_width", "norm_eps"),
            *("tied", "bias", "rope_theta"),
        )
        if getattr(settings, name) is not None
    }
    base = _base(settings, sizes)
    known = {**vars(base), **sizes} if base is not None else _defaults(settings, sizes)
    if base is not None and "head_dim" not in sizes and ("width" in sizes or "n_heads" in sizes):
        known["head_dim"] = known["width"] // known["n_heads"]
    needed = vocab_size if settings.vocab_size is None else settings.vocab_size
    multiple = settings.vocab_multiple
    known["vocab_size"] = -(-needed // multiple) * multiple
    kind = type(base) if base is not None else {"gpt2": GPT2Config, "llama": LlamaConfig}[settings.architecture]
    if kind is GPT2Config and "rope_theta" in known:
        raise ValueError("model.rope_theta is given for GPT-2, which has no rotary positions")
    if kind is LlamaConfig and known.pop("bias", False):
        raise ValueError("model.bias is true for Llama, which has no biases; expected it for GPT-2 alone")
    return kind(**known)


def _base(settings: ModelSettings, sizes: Mapping[str, Any]) -> ModelConfig | None:
    if settings.preset is None:
        return None
    if settings.preset not in MODELS:
        near = difflib.get_close_matches(settings.preset, MODELS, n=1)
        expected = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(MODELS)}"
        raise ValueError(f"model.preset is {settings.preset!r}; {expected}")
    return MODELS[settings.preset]


def _defaults(settings: ModelSettings, sizes: Mapping[str, Any]) -> dict[str, Any]:
    missing = [name for name in ("context_length", "n_layers", "n_heads", "width") if name not in sizes]
    if missing:
        raise ValueError(f"model has no preset and no {', '.join(missing)}; expected the one or the others")
    llama, width = settings.architecture == "llama", sizes["width"]
    defaults: dict[str, Any] = {
        "n_kv_heads": sizes["n_heads"],
        "head_dim": width // sizes["n_heads"],
        "mlp_width": -(-8 * width // (3 * 64)) * 64 if llama else 4 * width,
        "norm_eps": 1e-5,
        "tied": True,
    }
    scaling: RopeScaling | None = None
    return {**defaults, **({"rope_theta": 10000.0, "rope_scaling": scaling} if llama else {}), **sizes}


__all__ = ["PRESETS", "ModelSettings", "RunConfig", "TrainingConfig", "make_config", "model_config"]
