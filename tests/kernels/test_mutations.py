"""The script that plants bugs: its data fits the sources, and it tells what is caught from what is not."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mutations
import pytest
from mutations import Family, Mutation, Outcome, families, plant, report, section

from fusedlm.testing.cases import CASES

FAMILIES = families()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_planted_bug_fits_its_source_and_is_in_the_report(family: Family) -> None:
    assert set(family.ops) <= CASES.keys()
    assert len(family.mutations) >= 10
    assert len({m.breaks for m in family.mutations}) == len(family.mutations)
    for mutation in family.mutations:
        source = mutations.ROOT / (mutation.source or family.source)
        compile(plant(source.read_text(encoding="utf-8"), mutation), str(source), "exec")
    reported = mutations.REPORT.read_text(encoding="utf-8").split(f"\n## {family.name}\n", 1)[1].split("\n## ", 1)[0]
    lines = re.findall(r"^\| (.*?) \| ", reported, re.MULTILINE)
    assert lines[1:] == [mutations._cell(m.breaks) for m in family.mutations], "run mutations.py --report"
    assert "survived" not in reported


def test_text_that_does_not_occur_exactly_once_is_refused() -> None:
    assert plant("a = b + c", Mutation("", "b +", "b -")) == "a = b - c"
    with pytest.raises(ValueError, match="occurs 2 times, expected once"):
        plant("a + a", Mutation("twice", "a", "b"))
    with pytest.raises(ValueError, match="occurs 0 times"):
        plant("a + a", Mutation("never", "c", "b"))
    with pytest.raises(ValueError, match="the same"):
        plant("a", Mutation("nothing", "a", "a"))


def test_data_with_unknown_keys_is_refused(tmp_path: Path) -> None:
    (tmp_path / "op.toml").write_text('source = "a"\nops = []\n[[mutation]]\nbreaks = "b"\nold = "c"\nnwe = "d"\n')
    with pytest.raises(ValueError, match=r"op\.toml: .*nwe.*; expected"):
        families(tmp_path)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    """A repository of one function and its test, and two bugs: the test sees one of them."""
    files = {
        "pyproject.toml": "",
        "src/thing.py": "def f(x):\n    x = x + 1\n    return x * 2\n",
        "tests/kernels/test_contract.py": (
            "import pytest, thing\n@pytest.mark.parametrize('n', ['op-0'])\ndef test_contract(n):\n"
            "    assert thing.f(0) == 2, f'{n} is off'\n"
        ),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(mutations, "ROOT", tmp_path)
    bugs = (Mutation("one too many", "x + 1", "x + 2"), Mutation("a power", "x * 2", "x * 2**x"))
    return Family("family", "src/thing.py", ("op",), (), bugs)


def test_what_is_caught_and_what_survives(repository: Family) -> None:
    caught, survived = mutations.outcomes(repository)
    assert caught.test == "tests/kernels/test_contract.py::test_contract[op-0]"
    assert "op-0 is off" in caught.message
    assert survived.test is None
    assert (mutations.ROOT / "src/thing.py").read_text().count("x + 1") == 1, "the working tree was touched"
    text = section(repository, [caught, survived])
    assert "1 of 2 caught" in text
    assert "| a power | **survived** |" in text


def test_tests_that_fail_without_a_bug_catch_nothing(repository: Family) -> None:
    broken = mutations.ROOT / "src/thing.py"
    broken.write_text(broken.read_text().replace("x + 1", "1 + x + 1"))
    with pytest.raises(RuntimeError, match=r"without a bug .*test_contract"):
        list(mutations.outcomes(replace(repository, mutations=(Mutation("", "x * 2", "x * 3"),))))


def test_a_report_keeps_the_families_that_did_not_run() -> None:
    bug = Mutation("a | b", "x", "y")
    message = "AssertionError: op {'M': 7} torch.float32 scale 0.01 padded/contiguous: gradient of x: too large"
    outcome = Outcome(bug, "tests/kernels/test_contract.py::test_contract[op-3]", message)
    first, second = (Family(name, "s", ("op",), (), (bug,)) for name in ("first", "second"))
    before = report({f.name: section(f, [outcome]) for f in (first, second)})
    after = report({"second": section(second, [Outcome(bug, None, "survived")])}, before)
    assert after.index("## first") < after.index("## second")
    assert after.count("a \\| b") == 2
    assert "| contract of op (M=7, float32, scale 0.01, padded/contiguous): gradient of x: too large |" in after
    assert after.count("**survived**") == 1


def test_an_unknown_name_is_refused() -> None:
    done: Any = subprocess.run(
        [sys.executable, str(mutations.__file__), "nonsense"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "unknown names ['nonsense']; expected some of" in done.stderr
