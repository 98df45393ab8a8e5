"""fusedlm trains and runs GPT-2 and Llama models on fused kernels: Triton on NVIDIA GPUs, PyTorch on a CPU."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusedlm.inference.chat import ChatSession
    from fusedlm.inference.generation import Generation, TextStream
    from fusedlm.inference.language_model import LanguageModel, load
    from fusedlm.training.config import make_config
    from fusedlm.training.run import train

__version__ = "0.1.0"

__all__ = ["ChatSession", "Generation", "LanguageModel", "TextStream", "__version__", "load", "make_config", "train"]

# Names are imported when they are first used, so that `fusedlm --help` need not wait for torch.
_HOME = {
    "ChatSession": "fusedlm.inference.chat",
    "Generation": "fusedlm.inference.generation",
    "LanguageModel": "fusedlm.inference.language_model",
    "TextStream": "fusedlm.inference.generation",
    "load": "fusedlm.inference.language_model",
    "make_config": "fusedlm.training.config",
    "train": "fusedlm.training.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fusedlm' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
