"""The forward benchmark, small and on a CPU: contenders of one model's weights, a contender that is wrong, memory."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_rows import MACHINE

pytest.importorskip("triton", reason="the benchmarks need Triton")
pytest.importorskip("transformers", reason="it is what ours is timed beside")

from benchmarks import forward
from benchmarks.forward import (
    CAUSAL,
    COMPILED,
    EAGER,
    OURS,
    contenders,
    errors,
    forward_table,
    largest_batch,
    limit_of,
    main,
    random_model,
)
from fusedlm.models import build_model


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
    model = random_model("tiny-gpt2")
    ids = torch.randint(512, (2, 8))
    found = contenders(model, torch.float32, torch.device("cpu"), compiled=False)
    truth = model.double().hidden_states(ids[:1])  # of fewer rows than there are
    assert errors(found, truth, ids)[OURS] < 1e-6
    found[OURS] = lambda ids: forward.contenders(model, torch.bfloat16, ids.device, compiled=False)[OURS](ids)
    with pytest.raises(ValueError, match="from float64, and transformers'"):
        errors(found, truth, ids)
    without_bias = build_model(model.config).eval()
    without_bias.load_state_dict(model.state_dict())
    without_bias.get_parameter("blocks.1.attention.out.bias").zero_()
    found[OURS] = without_bias.hidden_states
    with pytest.raises(ValueError, match="from float64, and transformers'"):
        errors(found, truth, ids)


@torch.no_grad()
def test_the_compiled_peer_at_its_best_has_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is it has one; both compute what it computes eagerly, and flash attention is for 16 bits alone."""
    kinds: list[tuple[object, object]] = []  # of the attention of each graph: its mask, and whether it is causal

    def noted(graph: Any, _: Any) -> Any:
        attention = next(n for n in graph.graph.nodes if "scaled_dot_product" in str(n.target))
        kinds.append((attention.kwargs.get("attn_mask") is not None, attention.kwargs.get("is_causal")))
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=noted))
    model = random_model("tiny-gpt2")
    ids = torch.randint(512, (3, 16))
    found = contenders(model, torch.bfloat16, ids.device, compiled=True)
    expected = found[EAGER](ids)
    for name in (COMPILED, CAUSAL):
        torch.testing.assert_close(found[name](ids), expected, atol=0.05, rtol=0)
    assert kinds == [(True, False), (False, True)]
    assert CAUSAL not in contenders(model, torch.float32, ids.device, compiled=True)


def test_a_contender_that_is_not_there_in_a_dtype_leaves_its_cell_empty() -> None:
    seconds = {"fp16": {OURS: 0.05, EAGER: 0.1, CAUSAL: 0.08}, "fp32": {OURS: 0.6, EAGER: 0.5}}
    rows = [
        {"dtype": dtype, "variant": name, "seconds": s, "peak_bytes": 2**30}
        for dtype, found in seconds.items()
        for name, s in found.items()
    ]
    size = {"preset": "gpt2", "batch": 512, "context": 300}
    lines = forward_table({**size, "rows": rows, "largest": {}, "environment": MACHINE}).split("\n")
    assert lines[2] == "| fp16 | 50.0 | 100.0 | 80.0 | 0.62 | 1.00 / 1.00 / 1.00 |"
    assert lines[3] == "| fp32 | 600.0 | 500.0 |  | 1.20 | 1.00 / 1.00 / - |"


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


@pytest.mark.parametrize(
    ("holds", "guess", "found"),
    [(5000, 5100, 4992), (5000, 4000, 4992), (4096, 4096, 4096), (64, 5, 64), (63, 900, 0), (20000, 21000, 19968)],
)
def test_the_largest_batch(holds: int, guess: int, found: int) -> None:
    tried = []

    def fits(rows: int) -> bool:
        tried.append(rows)
        return rows <= holds

    assert largest_batch(fits, guess) == found
    assert len(tried) == len(set(tried)) <= 10


def test_what_stops_a_contender_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that was guessed wrong, and something else than memory."""
    zeros = torch.zeros
    monkeypatch.setattr("torch.zeros", lambda *sizes, device, **options: zeros(*sizes, **options))
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda: None)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (5000, 9000))

    def contender(ids: torch.Tensor) -> torch.Tensor:
        assert ids.shape[1] == 3
        if len(ids) > 640:
            raise RuntimeError("too many blocks\nin a grid")
        if len(ids) > 512:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ids

    assert limit_of(contender, 3, 5.0) == (512, "CUDA out of memory")
    results = {"preset": "gpt2", "batch": 512, "context": 300, "environment": MACHINE}
    results["rows"] = [{"dtype": "fp16", "variant": name, "seconds": 1.0, "peak_bytes": 1.0} for name in (OURS, EAGER)]
    results |= {"largest": {OURS: 2048, EAGER: 512}, "stopped": {EAGER: "too many blocks"}}
    line = forward_table(results).split("\n")[-1]
    assert "found in fp16: fusedlm 2,048, transformers 512 (of more it says: too many blocks); G, torch 2" in line
