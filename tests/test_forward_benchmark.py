"""The forward benchmark, small and on a CPU: contenders of one model's weights, a contender that is wrong, memory."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the benchmarks need Triton")
pytest.importorskip("transformers", reason="it is what ours is timed beside")

from benchmarks import forward
from benchmarks.forward import EAGER, OURS, contenders, errors, forward_table, largest_batch, main
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
    truth = model.double().hidden_states(ids[:1])  # of fewer rows than there are
    assert errors(found, truth, ids)[OURS] < 1e-6
    found[OURS] = lambda ids: forward.contenders(model, torch.bfloat16, ids.device, compiled=False)[OURS](ids)
    with pytest.raises(ValueError, match="from float64, and transformers'"):
        errors(found, truth, ids)


@torch.no_grad()
def test_contenders_are_compared_at_the_shape_that_is_timed() -> None:
    """So that what torch.compile makes for one shape is made once."""
    shapes = []

    def contender(ids: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return ids[..., None].float()

    ids = torch.arange(1, 13).view(4, 3)
    far = errors({OURS: contender, EAGER: contender}, ids[:2, :, None].double(), ids)
    assert far == {OURS: 0.0, EAGER: 0.0}
    assert set(shapes) == {(4, 3)}


@pytest.mark.parametrize(("holds", "found"), [(5000, 4608), (4096, 4096), (512, 512), (100, 0)])
def test_the_largest_batch(holds: int, found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    tried = []

    def contender(ids: torch.Tensor) -> torch.Tensor:
        tried.append(len(ids))
        if len(ids) > holds:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ids

    assert largest_batch(contender, torch.zeros(2, 3, dtype=torch.int64)) == found
    assert len(tried) == len(set(tried)) <= 8
