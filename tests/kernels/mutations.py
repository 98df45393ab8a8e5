"""Plant bugs in the kernels, one at a time, and see that the tests catch every one.

    python tests/kernels/mutations.py [NAMES] [--report]

Each file in tests/kernels/mutations/ lists the bugs of one family of ops: text that occurs exactly once in the family's
source and what stands in its place. A bug is planted in a copy of src/, never in the working tree; there the
interpreted contract of the family's ops runs and then the family's own tests, up to the first failure. The exit status
is 1 where a bug survives, or where the tests fail without one. --report writes docs/kernels/mutations.md anew for the
families that ran.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).with_suffix("")
REPORT = ROOT / "docs/kernels/mutations.md"
TIMEOUT = 300.0  # seconds; what passes does so in less, also on a busy machine


@dataclass(frozen=True)
class Mutation:
    """A planted bug: `old`, which occurs once in the source, becomes `new`.

    breaks: what is wrong then, in a line. source: the file, where it is not the family's. hangs: running out of time
    counts as caught.
    """

    breaks: str
    old: str
    new: str
    source: str | None = None
    hangs: bool = False


@dataclass(frozen=True)
class Family:
    """Bugs of one family of ops. source: the file they are planted in. ops: names of the cases that hold it to the
    contract. tests: its own tests, relative to the root."""

    name: str
    source: str
    ops: tuple[str, ...]
    tests: tuple[str, ...]
    mutations: tuple[Mutation, ...]


@dataclass(frozen=True)
class Outcome:
    """How a mutant fared: caught by a test, which said why; or it survived, and `test` is None."""

    mutation: Mutation
    test: str | None
    message: str


def families(folder: Path = DATA) -> dict[str, Family]:
    """What is listed in the data files, by name. Raises ValueError where a file has keys that mean nothing."""
    found = {}
    for path in sorted(folder.glob("*.toml")):
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        try:
            mutations = tuple(Mutation(**m) for m in data.pop("mutation"))
            found[path.stem] = Family(
                path.stem, data.pop("source"), tuple(data.pop("ops")), tuple(data.pop("tests", ())), mutations
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: {error}; expected source, ops, tests and [[mutation]] breaks, old, new"
            ) from None
        if data:
            raise ValueError(f"{path}: unknown keys {sorted(data)}; expected source, ops, tests and [[mutation]]")
    return found


def plant(text: str, mutation: Mutation) -> str:
    """The source with the bug. Raises ValueError unless the old text occurs exactly once and the new one differs."""
    count = text.count(mutation.old)
    if count != 1:
        raise ValueError(f"{mutation.breaks!r}: the text to replace occurs {count} times, expected once")
    if mutation.old == mutation.new:
        raise ValueError(f"{mutation.breaks!r}: old and new text are the same")
    return text.replace(mutation.old, mutation.new)


def run_tests(family: Family, root: Path) -> tuple[str, str] | None:
    """The first test that fails in a copy of the repository, and what it said; None where all pass.

    Raises TimeoutError where they do not end.
    """
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "TRITON_INTERPRET": "1", "COLUMNS": "400"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # a mutant of the same length in the same second looks unchanged
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-rfE",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    contract = " or ".join(f"test_contract[{op}-" for op in family.ops)
    selections = [["tests/kernels/test_contract.py", "-k", contract], *([list(family.tests)] if family.tests else [])]
    for selection in selections:
        try:
            done = subprocess.run(
                [*pytest, *selection], cwd=root, env=environment, capture_output=True, text=True, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"no end within {TIMEOUT:.0f} s") from None
        if done.returncode < 0:
            return "", f"a crash (signal {-done.returncode})"
        if done.returncode > 1:  # nothing was collected, say, or the package does not import
            return "", "import or collection: " + (done.stdout + done.stderr).strip()[-200:]
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - (.*))?$", done.stdout, re.MULTILINE)
        if failed:
            return failed.group(1), (failed.group(2) or "").strip()
        if done.returncode:
            return "tests", done.stdout.strip()[-400:]
    return None


def outcomes(family: Family) -> Iterator[Outcome]:
    """Every bug of a family, planted and tested. Raises RuntimeError where the tests fail without a bug."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for part in ("src", "tests"):
            shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", root)
        mutants = []  # all of them before anything runs: one may not fit
        for mutation in family.mutations:
            file = root / (mutation.source or family.source)
            original = file.read_text(encoding="utf-8")
            mutants.append((mutation, file, original, plant(original, mutation)))
        failed = run_tests(family, root)
        if failed is not None:
            raise RuntimeError(f"{family.name}: without a bug {failed[0]} fails: {failed[1]}")
        for mutation, file, original, text in mutants:
            file.write_text(text, encoding="utf-8")
            otherwise = "survived"
            try:
                caught = run_tests(family, root)
            except TimeoutError as error:
                caught, otherwise = ("", str(error)) if mutation.hangs else None, f"survived: {error}"
            finally:
                file.write_text(original, encoding="utf-8")
            yield Outcome(mutation, *(caught or (None, otherwise)))


def _cell(text: str) -> str:
    """Text that cannot end a table's cell."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def _caught_by(outcome: Outcome) -> str:
    """Where a bug showed, in a reader's words."""
    if outcome.test is None:
        return f"**{outcome.message}**"
    contract = re.search(r"test_contract\[(\w+)-\d+\]", outcome.test)
    if contract is None:
        return f"`{outcome.test.split('::', 1)[-1]}`" if outcome.test else outcome.message
    said = re.sub(r"^\w+: ", "", outcome.message)  # the exception's name
    told = re.match(rf"{contract.group(1)} (\{{.*?\}}) torch\.(\w+) scale (\S+) (\S+): (.*)$", said)
    if told is None:
        return f"contract of {contract.group(1)}: {said[:120]}"
    shape, dtype, scale, layout, what = told.groups()
    setting = [shape.strip("{}").replace("'", "").replace(": ", "="), dtype]
    setting += [f"scale {scale}"] if scale != "1.0" else []
    setting += [layout] if layout != "contiguous/contiguous" else []
    return f"contract of {contract.group(1)} ({', '.join(setting)}): {what}"


def section(family: Family, found: list[Outcome]) -> str:
    """A family's part of the report."""
    caught = sum(o.test is not None for o in found)
    lines = [f"## {family.name}", "", f"{family.source}: {caught} of {len(found)} caught.", ""]
    lines += ["| bug | caught by |", "|---|---|"]
    lines += [f"| {_cell(o.mutation.breaks)} | {_cell(_caught_by(o))} |" for o in found]
    return "\n".join(lines) + "\n"


def report(sections: dict[str, str], before: str = "") -> str:
    """The whole report: new sections, and those of an earlier report for families that did not run."""
    kept = {part.split("\n", 1)[0]: f"## {part.strip()}\n" for part in before.split("\n## ")[1:]}
    every = {**kept, **sections}
    head = """# Planted bugs

Made by `python tests/kernels/mutations.py --report`. Each line is a bug that was planted in a copy of the source,
alone, and the first test that failed: the interpreted contract of the ops (fp32 before fp16), then tests of their own.
"""
    return "\n".join([head, *(every[name] for name in sorted(every))])


def main() -> None:
    known = families()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", help=f"families or ops, some of {', '.join(known)}; all where none is named"
    )
    parser.add_argument("--report", action="store_true", help="write docs/kernels/mutations.md for those that run")
    options = parser.parse_args()
    of_op = {op: family.name for family in known.values() for op in family.ops}
    unknown = set(options.names) - known.keys() - of_op.keys()
    if unknown:
        parser.error(f"unknown names {sorted(unknown)}; expected some of {sorted(known.keys() | of_op.keys())}")
    bad = 0
    for name in dict.fromkeys(name if name in known else of_op[name] for name in options.names or known):
        start, found = time.perf_counter(), []
        try:
            for outcome in outcomes(known[name]):
                found.append(outcome)
                print(f"{name}: {outcome.mutation.breaks}: {_caught_by(outcome)}", flush=True)
        except (RuntimeError, ValueError, TimeoutError) as error:
            print(f"{name}: {error}", flush=True)
            bad += 1
            continue
        survived = sum(o.test is None for o in found)
        bad += survived
        seconds = time.perf_counter() - start
        print(f"{name}: {len(found) - survived} of {len(found)} caught, {seconds:.0f} s", flush=True)
        if options.report:  # at once: another family may take a quarter of an hour
            before = REPORT.read_text(encoding="utf-8") if REPORT.exists() else ""
            REPORT.write_text(report({name: section(known[name], found)}, before), encoding="utf-8")
            print(f"wrote {name} to {REPORT}", flush=True)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
