"""The forward benchmark, small and on a CPU: contenders of one model's weights, and a contender that is wrong."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import forward
from benchmarks.forward import EAGER, OURS, contenders, errors, forward_table, main
from fusedlm.models import PRESETS, build_model


def test_a_run_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--preset", "tiny-gpt2", "--batch", "3", "--context", "16", "--device", "cpu", "--out", str(tmp_path)]
    main([*arguments, "--dtypes", "fp32", "bf16"])
    results = json.loads((tmp_path / "forward.json").read_text())
    assert [(row["dtype"], row["variant"]) for row in results["rows"]] == [
        ("fp32", OURS), ("fp32", EAGER), ("bf16", OURS), ("bf16", EAGER)
    ]  # fmt: skip
    assert all(row["tokens_per_second"] == pytest.approx(3 * 16 / row["seconds"]) for row in results["rows"])
    assert max(row["error"] for row in results["rows"] if row["dtype"] == "fp32") < 1e-6
    assert 1e-4 < max(row["error"] for row in results["rows"] if row["dtype"] == "bf16") < 0.05
    assert forward_table(results) in capsys.readouterr().out


@torch.no_grad()
def test_a_contender_that_is_far_off_is_refused() -> None:
    model = build_model(PRESETS["tiny-gpt2"])
    model.init_weights()
    ids = torch.randint(512, (2, 8))
    found = contenders(model, torch.float32, torch.device("cpu"), compiled=False)
    truth = model.double().hidden_states(ids)
    assert errors(found, truth, ids)[OURS] < 1e-6
    found[OURS] = lambda ids: forward.contenders(model, torch.bfloat16, ids.device, compiled=False)[OURS](ids)
    with pytest.raises(ValueError, match="from float64, and transformers'"):
        errors(found, truth, ids)
