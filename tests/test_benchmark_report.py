"""What the benchmarks make of their figures: tables, pages that are filled, plots."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from benchmark_rows import MACHINE, measured

pytest.importorskip("triton", reason="the benchmarks need Triton")

from benchmarks.report import write_report
from benchmarks.tables import embedding_table, figures, grouped, ops_table, summary


def test_tables() -> None:
    rows = [measured("fusedlm", 1e-5), measured("torch", 2e-5), measured("liger", 5e-6, graph=False)]
    rows += [measured("fusedlm", 2e-3, direction="both", extra_bytes=2e9, share_of_matmul=0.75)]
    rows += [measured("torch", 4e-3, direction="both", extra_bytes=3e6, share_of_matmul=0.4)]
    assert ops_table(rows[:2]).splitlines() == [
        "| op | shape | pass | us | share | against |",
        "|---|---|---|---:|---:|---|",
        "| op | 4 x 8 | forward | 10.0 | 50% | torch 2.00x |",
    ]
    lines = ops_table(rows).splitlines()
    assert lines[2] == "| op | 4 x 8 | forward | 10.0 | 50% | torch 2.00x, liger 0.50x* |  |"
    assert lines[3] == "| op | 4 x 8 | both | 2,000 | 75% of matmul | torch 2.00x | 2.00 GB, torch 3.0 MB |"
    assert [len(peers) for _, peers in grouped(rows)] == [2, 1]
    shape = {"B": 2, "T": 3, "C": 4, "V": 9, "p": 0.1}
    rows = [
        measured(v, t, op="embedding", shape=shape) for v, t in (("fusedlm", 1e-5), ("torch", 3e-5), ("compile", 2e-5))
    ]
    assert embedding_table(rows).splitlines()[2] == "| 2 x 3 x 4 | forward | 30.0 | 20.0 | 10.0 | 3.00x | 2.00x |"


def test_figures_of_a_page_show_three_sizes_and_tell_of_all() -> None:
    rows = []
    for i, size in enumerate((64, 8, 16, 32, 128)):  # the middle one by size is 32
        for direction in ("forward", "backward"):
            shape = {"M": 4, "N": size}
            rows += [measured("fusedlm", 1e-5, shape=shape, direction=direction, share_of_copy=0.5 + i / 10)]
            rows += [measured("torch", (i + 1) * 1e-5, shape=shape, direction=direction)]
            rows += [measured("liger", (7 - i) * 1e-5, shape=shape, direction=direction)] if size < 128 else []
    rows += [measured("fusedlm", 1e-6, op="alone", shape={"B": 2}, share_of_copy=0.004)]
    rows += [measured("novel", 3e-6, op="alone", shape={"B": 2})]
    assert figures(rows, ["op"], "a GPU").split("\n") == [
        "| M x N | pass | us | share of a copy | torch | Liger |",
        "|---|---|---:|---:|---:|---:|",
        "| 4 x 8 | forward | 10.0 | 60% | 2.00x | 6.00x |",
        "| 4 x 8 | backward | 10.0 | 60% | 2.00x | 6.00x |",
        "| 4 x 32 | forward | 10.0 | 80% | 4.00x | 4.00x |",
        "| 4 x 32 | backward | 10.0 | 80% | 4.00x | 4.00x |",
        "| 4 x 128 | forward | 10.0 | 90% | 5.00x |  |",
        "| 4 x 128 | backward | 10.0 | 90% | 5.00x |  |",
        "",
        "op, all 5 sizes: forward 50% to 90%, backward 50% to 90% of the limit; the fastest peer's time over ours: "
        "forward 1.00 to 5.00, backward 1.00 to 5.00.\\",
        "a GPU; bfloat16; peers' times over ours.",
    ]
    both = figures(rows, ["op", "alone"], "a GPU").split("\n")
    assert both[0] == "| op | shape | pass | us | share of a copy | torch | Liger | novel |"
    assert both[8] == "| alone | 2 | forward | 1.0 | 0.4% |  |  | 3.00x |"
    assert figures(rows, ["alone"], "a GPU").split("\n")[0] == "| B | us | share of a copy | novel |"
    three = figures([*rows, measured("fusedlm", 1e-6, op="third")], ["op", "alone", "third"], "a GPU").split("\n")
    assert [line.split(" | ")[:2] for line in three[2:6]] == [
        ["| op", "4 x 32"],
        ["| op", "4 x 32"],
        ["| alone", "2"],
        ["| third", "4 x 8"],
    ]
    assert three[7].startswith("op, all 5 sizes: ")


def test_figures_of_products_tell_memory_and_who_waits() -> None:
    rows = [measured("fusedlm", 2e-3, direction="both", extra_bytes=2e9, share_of_matmul=0.75)]
    rows += [measured("liger", 4e-3, direction="both", extra_bytes=3e6, share_of_matmul=0.4, graph=False)]
    lines = figures(rows, ["op"], "a GPU").split("\n")
    assert lines[0] == "| M x N | pass | us | share of the products' rate | memory | Liger |"
    assert lines[2] == "| 4 x 8 | forward + backward | 2,000 | 75% | 2.00 GB | 2.00x*, 3.0 MB |"
    assert lines[4].startswith("a GPU; bfloat16; peers' times over ours. Memory is the most")
    assert lines[4].endswith("\\* waits for the GPU inside, so it is timed from the host.")


def test_figures_of_products_with_epilogues() -> None:
    """Sizes of other names beside each other, and a peer that has no backward pass."""
    shapes = {
        "linear_gelu": {"M": 32, "K": 8, "N": 16, "activation": "gelu_tanh"},
        "linear_add": {"M": 32, "K": 8, "N": 8, "residual": True},
        "mlp": {"M": 32, "K": 8, "F": 16, "N": 8, "activation": "gelu_tanh"},
    }
    rows = []
    for op, shape in shapes.items():
        for direction in ("forward", "backward"):
            times = {"fusedlm": 1e-4, "torch": 2e-4, "compile": 1.5e-4}
            if op == "linear_gelu" and direction == "forward":
                times["cublaslt"] = 1.1e-4
            for name, seconds in times.items():
                row = measured(name, seconds, op=op, shape=shape, direction=direction, share_of_matmul=0.8)
                del row["share_of_copy"]
                rows.append(row)
    lines = figures(rows, list(shapes), "a GPU").split("\n")
    assert lines[0] == ("| op | shape | pass | us | share of the products' rate | torch | cuBLASLt | torch.compile |")
    assert lines[2:4] == [
        "| linear_gelu | 32 x 8 x 16, activation=gelu_tanh | forward | 100.0 | 80% | 2.00x | 1.10x | 1.50x |",
        "| linear_gelu | 32 x 8 x 16, activation=gelu_tanh | backward | 100.0 | 80% | 2.00x |  | 1.50x |",
    ]
    assert lines[6].startswith("| mlp | 32 x 8 x 16 x 8, activation=gelu_tanh | forward | ")
    assert "cublaslt 1.10x" in ops_table(rows).splitlines()[2]
    pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install '.[bench]'")
    from benchmarks.plots import op_figure, summary_figure

    axes = op_figure("linear_gelu", rows).axes
    labels = [label.get_text() for label in axes[0].get_xticklabels()]
    bars = {label: bar.get_height() for label, bar in zip(labels, axes[0].patches, strict=True)}
    assert bars == pytest.approx({"torch": 200, "torch.compile": 150, "cuBLASLt": 110, "fusedlm": 100})
    assert axes[1].get_ylabel() == "share of matmul rate"
    assert [bar.get_width() for bar in summary_figure(rows).axes[0].patches] == pytest.approx([1.1, 1.5, *[1.5] * 4])


def test_the_summary_tells_the_worst_too() -> None:
    rows = [measured("fusedlm", 1e-5, op=f"op{i}", direction=d) for i in range(4) for d in ("forward", "backward")]
    for i, row in enumerate(list(rows)):
        row["share_of_copy"] = 0.6 + 0.1 * i
        ratio = (0.97, 0.99, 1.2, 1.3, 1.4, 1.5, 1.6, 1.67)[i]  # 0.99 is no slower
        rows.append(measured("torch", ratio * 1e-5, op=row["op"], direction=row["direction"]))
        rows.append(measured("compile", 9e-5, op=row["op"], direction=row["direction"]))
    rows.append(measured("fusedlm", 1e-5, op="alone", share_of_copy=0.01))  # no backward pass: not among the shares
    assert summary(rows, "a GPU") == (
        "a GPU: forward passes run at 60% to 120% of the speed of a plain copy, half of them at 90% or more. Of 8 "
        "measurements, 7 are as fast as the fastest of torch and torch.compile or faster (within 2%), from 0.97x "
        "(op0 forward) to 1.67x (op3 backward)."
    )


def test_what_is_left_to_torch_is_marked_and_not_counted() -> None:
    times = {"forward": 1e-5, "backward": 5e-6}  # of torch; ours takes 1e-5
    rows = []
    for direction, seconds in times.items():
        left = {"left_to_torch": True} if direction == "backward" else {}
        rows.append(measured("fusedlm", 1e-5, direction=direction, **left))
        rows.append(measured("torch", seconds, direction=direction))
    assert "Of 1 measurements, 1 are as fast as torch or faster (within 2%), from 1.00x" in summary(
        [*rows, measured("fusedlm", 1e-5, direction="backward", shape={"M": 9, "N": 8})], "a GPU"
    )
    for table in (ops_table(rows), figures(rows, ["op"], "a GPU")):
        assert table.count("10.0† |") == 1
    assert "† Ours, asked for by name" in figures(rows, ["op"], "a GPU")
    assert "†" not in figures(rows[:2], ["op"], "a GPU")


def test_a_table_of_all_sizes() -> None:
    rows = [measured(v, 1e-5, shape={"M": 4, "N": n}) for n in range(1, 8) for v in ("fusedlm", "torch")]
    assert figures(rows, ["op"], "a GPU").count("| 4 x ") == 3
    assert figures(rows, ["op"], "a GPU", whole=True).count("| 4 x ") == 7


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """A folder of docs with two pages, a README beside it, and the results they are filled from."""
    (tmp_path / "docs/deep").mkdir(parents=True)
    rows = [
        measured(v, t, direction=d) for d in ("forward", "backward") for v, t in (("fusedlm", 1e-5), ("torch", 2e-5))
    ]
    results = {"environment": MACHINE, "copy_bytes_per_second": 1e12, "rows": rows}
    (tmp_path / "ops.json").write_text(json.dumps(results))
    (tmp_path / "README.md").write_text("# Us\n\n<!-- figures: summary -->\nold\n<!-- end -->\nmore\n")
    (tmp_path / "docs/deep/op.md").write_text("<!-- figures: op -->\n<!-- end -->\n\nText\n<!-- end -->\n")
    (tmp_path / "docs/other.md").write_text("Nothing, not even `<!-- figures: op -->`\n")
    return tmp_path


def test_pages_are_filled_between_their_marks(pages: Path) -> None:
    other = (pages / "docs/other.md").stat().st_mtime_ns
    for _ in range(2):  # what was filled once is filled again
        written = write_report(pages, pages / "docs", plots=False)
        names = {path.relative_to(pages).as_posix() for path in written}
        assert names == {"README.md", "docs/deep/op.md", "docs/kernels/results.md"}
        begin, sentence, empty, picture, *end = (pages / "README.md").read_text().split("\n")[2:]
        assert begin == "<!-- figures: summary -->"
        assert sentence.startswith("G, torch 2, Triton 3: forward passes run at 50% of the speed of a plain copy. Of 2")
        assert empty == ""
        assert picture.endswith("](docs/ops.png)")
        assert end == ["<!-- end -->", "more", ""]
        lines = (pages / "docs/deep/op.md").read_text().split("\n")
        assert "| 4 x 8 | backward | 10.0 | 50% | 2.00x |" in lines
        assert lines[-6] == "G, torch 2, Triton 3; bfloat16; peers' times over ours."
        assert lines[-5:] == ["<!-- end -->", "", "Text", "<!-- end -->", ""]
    assert (pages / "docs/other.md").stat().st_mtime_ns == other


def test_another_gpu_has_a_page_of_its_own(pages: Path) -> None:
    """Which results.md names; figures within pages stay those of ops.json. The embedding's table is of both."""
    results = json.loads((pages / "ops.json").read_text())
    size = {"B": 2, "T": 3, "C": 4}
    for name, gpu, seconds in (("ops.json", "G", 1e-5), ("ops_large.json", "L", 7e-6)):
        made = {**results, "environment": {**MACHINE, "gpu": gpu, "commit": f"of {gpu}"}}
        peers = (("fusedlm", seconds), ("torch", 2e-5), ("compile", 3e-5))
        made["rows"] = results["rows"] + [measured(v, t, op="embedding", shape=size) for v, t in peers]
        (pages / name).write_text(json.dumps(made))
    write_report(pages, pages / "docs", plots=False)
    first, other = ((pages / f"docs/kernels/{name}.md").read_text() for name in ("results", "results_large"))
    assert "The same on other GPUs: [L](results_large.md)." in first
    assert "ops.json" in first
    assert "ops_large.json" in other
    assert "\nL, driver 1, torch 2, Triton 3, today, commit of L; " in other
    assert "other GPUs" not in other
    assert "G, torch 2, Triton 3; bfloat16" in (pages / "docs/deep/op.md").read_text()
    tables = (pages / "docs/kernels/embedding_results.md").read_text().split("\n## ")[1:]
    assert [table.split("\n")[0] for table in tables] == ["G", "L"]
    assert "| 2 x 3 x 4 | forward | 20.0 | 30.0 | 10.0 |" in tables[0]
    assert "| 2 x 3 x 4 | forward | 20.0 | 30.0 | 7.0 |" in tables[1]


def test_figures_of_a_cache_are_refused_of_every_gpu(pages: Path) -> None:
    results = json.loads((pages / "ops.json").read_text())
    results["rows"][0]["cached"] = True
    (pages / "ops_large.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="figures of op come from a cache"):
        write_report(pages, pages / "docs", plots=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- figures: op -->\n", "have no line '<!-- end -->'"),
        ("<!-- figures: op -->\n<!-- figures: op -->\n<!-- end -->\n", "have no line '<!-- end -->'"),
        ("<!-- figures: summary -->\n<!-- figures: op -->\n", "have no line '<!-- end -->'"),
        ("<!-- figures: op, pop -->\n<!-- end -->\n", r"asks for figures of 'op, pop'; there are those of \['op'\]"),
    ],
)
def test_pages_that_cannot_be_filled_stay_as_they_are(pages: Path, text: str, message: str) -> None:
    (pages / "docs/z.md").write_text(text)
    before = (pages / "README.md").read_text()
    with pytest.raises(ValueError, match=message):
        write_report(pages, pages / "docs", plots=False)
    assert (pages / "docs/z.md").read_text() == text
    assert (pages / "README.md").read_text() == before


def test_forward_passes_have_a_block_of_their_own(pages: Path) -> None:
    """And are no training suite: they add nothing to the training steps' machines."""
    rows = [
        {"dtype": "fp16", "variant": name, "seconds": seconds, "peak_bytes": 2.0**30}
        for name, seconds in (("fusedlm", 0.06), ("transformers", 0.12), ("transformers, compiled", 0.08))
    ]
    size = {"preset": "gpt2", "batch": 512, "context": 300, "largest": {"fusedlm": 16384}}
    results = {"environment": {**MACHINE, "date": "later"}, **size, "rows": rows}
    (pages / "forward.json").write_text(json.dumps(results))
    row = {"variant": "fusedlm", "seconds": 0.1, "tokens_per_second": 10.0, "mfu": None, "peak_bytes": 0}
    (pages / "training_gpt2.json").write_text(json.dumps({"suite": "gpt2", "environment": MACHINE, "rows": [row]}))
    page = pages / "docs/blocks.md"
    page.write_text("<!-- figures: forward -->\n<!-- end -->\n<!-- figures: training steps -->\n<!-- end -->\n")
    write_report(pages, pages / "docs", plots=False)
    forward, steps, _ = page.read_text().split("<!-- end -->")
    assert "| fp16 | 60.0 | 120.0 | 80.0 | 0.75 | 1.00 / 1.00 / 1.00 |" in forward
    assert "largest batch found in fp16: fusedlm 16,384; G, torch 2, later." in forward
    assert "G, torch 2, today." in steps
    assert "later" not in steps


def test_plans_beside_what_was_measured(pages: Path) -> None:
    setup = {"preset": "gpt2", "batch": 8, "context": 1024, "recompute": "cheap"}
    rows = [{"setup": setup, "measured": 2 * 2**30, "planned": 2.5 * 2**30, "off": 0.25}]
    (pages / "memory.json").write_text(json.dumps({"environment": MACHINE, "rows": rows}))
    page = pages / "docs/blocks.md"
    page.write_text("<!-- figures: memory -->\n<!-- end -->\n")
    write_report(pages, pages / "docs", plots=False)
    assert "| gpt2, 8 x 1024, recompute=cheap | 2.00 | 2.50 | +25.0% |\n\nG, torch 2, today." in page.read_text()


def test_there_is_no_summary_of_what_nobody_was_compared_with() -> None:
    with pytest.raises(ValueError, match="no forward pass beside a peer"):
        summary([measured("fusedlm", 1e-5)], "a GPU")


RESULTS = Path(__file__).parents[1] / "benchmarks/results"


def test_the_committed_report_is_that_of_the_committed_results(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    shutil.copytree(root / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("*.png"))
    shutil.copy(root / "README.md", tmp_path)
    for path in write_report(RESULTS, tmp_path / "docs", plots=False):
        made = path.read_text(encoding="utf-8").split("## Plots")[0].rstrip()
        committed = (root / path.relative_to(tmp_path)).read_text(encoding="utf-8").split("## Plots")[0].rstrip()
        assert made == committed, f"{path.name}: run python -m benchmarks report"


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install '.[bench]'")
    from benchmarks.plots import LONGEST_BAR, op_figure, summary_figure

    rows = []
    for i, size in enumerate((768, 1024, 2048)):
        for option in ("tanh", "none"):
            shape = {"M": 64, "N": size, "approximate": option}
            for direction in ("forward", "backward"):
                rows += [measured("fusedlm", (i + 1) * 1e-5, shape=shape, direction=direction)]
                rows += [measured("torch", (i + 1) * 8e-5, shape=shape, direction=direction)]
    figure = op_figure("op", rows)
    titles = [axes.get_title("left") for axes in figure.axes if axes.get_title("left")]
    assert titles == [f"op, {d}, approximate={o}" for d in ("forward", "backward") for o in ("tanh", "none")]
    ours = next(line for line in figure.axes[0].get_lines() if line.get_label() == "fusedlm")
    assert list(ours.get_ydata()) == pytest.approx([10, 20, 30])
    assert figure.axes[0].get_ylabel() == "time, µs"
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["768", "1024", "2048"]
    bars = summary_figure(rows).axes[0].patches
    assert [bar.get_width() for bar in bars] == [LONGEST_BAR] * 2  # 8 times, cut
    spread = [measured(v, t, shape={"N": n}) for n in (1, 2, 3) for v, t in (("fusedlm", 1.0), ("torch", 2.0 / n))]
    axes = summary_figure(spread).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [1.0]  # the middle size
    assert axes.collections[0].get_segments()[0].tolist() == pytest.approx(np.array([[2 / 3, 0], [2, 0]]))
    left = [measured("fusedlm", 1.0, shape={"N": 4}) | {"left_to_torch": True}, measured("torch", 0.1, shape={"N": 4})]
    lines = summary_figure([*spread, *left]).axes[0].collections[0].get_segments()
    assert lines[0].tolist() == pytest.approx(np.array([[2 / 3, 0], [2, 0]]))  # what nobody is given is not counted
    single = op_figure("op", spread[:2])
    assert single.axes[0].get_title("left") == "op"  # without a backward pass there is nothing to tell apart
    assert [bar.get_height() for bar in single.axes[0].patches] == [2000, 1000]
    (tmp_path / "ops.json").write_text(
        json.dumps({"environment": MACHINE, "copy_bytes_per_second": 1e12, "rows": rows})
    )
    written = write_report(tmp_path, tmp_path / "docs")
    assert {p.name for p in written} == {"results.md", "op.png", "ops.png"}
    assert all(p.stat().st_size > 500 for p in written)
    first = (tmp_path / "docs/ops.png").read_bytes()
    write_report(tmp_path, tmp_path / "docs")
    assert (tmp_path / "docs/ops.png").read_bytes() == first
