"""The trained model as a Hugging Face directory in the run's own folder, so that the run's path is a model's path."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedlm.checkpoint.config import config_from_huggingface
from fusedlm.checkpoint.load import save_checkpoint
from fusedlm.models import DecoderModel, ModelConfig, build_model
from fusedlm.tokenizer.interface import Tokenizer

CONFIG = "config.json"


def model_of(config: ModelConfig, parameters: dict[str, Tensor]) -> DecoderModel:
    """A model with these parameters, ready for evaluation."""
    model = build_model(config, device="meta")
    model.load_state_dict(parameters, assign=True)
    return model.eval()


def described_model(described: object) -> DecoderModel:
    """A model of a manifest's sizes and dtype, as Hugging Face's config.json says them; its weights are to be read."""
    values = dict(described)  # type: ignore[call-overload]
    dtype = getattr(torch, values["torch_dtype"])
    return build_model(config_from_huggingface(values, where="the checkpoint"), dtype=dtype)


def publish(model: DecoderModel, folder: Path, tokenizer: Tokenizer | None, generation: dict[str, Any]) -> None:
    """Put the model's files among those of a run. config.json goes first and comes last: without it, there is no model
    in the folder, so half of one is never loaded."""
    with tempfile.TemporaryDirectory(prefix=".model.", dir=folder) as temporary:
        files = Path(temporary)
        save_checkpoint(model, files, tokenizer=tokenizer, generation_config=generation)
        for path in files.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.chmod(0o644)
        (folder / CONFIG).unlink(missing_ok=True)
        for old in folder.glob("model*.safetensors*"):
            old.unlink()
        names = sorted((path.name for path in files.iterdir()), key=lambda name: name == CONFIG)
        for name in names:
            shutil.move(files / name, folder / name)
