"""The order of imports that docs/architecture.md gives, and what may import what, held by the syntax trees."""

import ast
from collections.abc import Iterator
from pathlib import Path

import fusedlm

SOURCE = Path(fusedlm.__file__).parent

# A package may import those before it, and those that share its place; training and inference not each other.
ORDER = [
    {"hardware"},
    {"kernels"},
    {"testing", "models"},
    {"checkpoint", "tokenizer", "data", "planner"},
    {"training", "inference"},
    {"server"},
    {"cli", "__main__"},
]
PLACE = {name: i for i, names in enumerate(ORDER) for name in names}
PEERS_APART = {"training", "inference"}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files() -> list[tuple[str, Path]]:
    found = [(p.relative_to(SOURCE).parts[0].removesuffix(".py"), p) for p in SOURCE.rglob("*.py")]
    assert len(found) > 20
    return [(package, path) for package, path in found if package != "__init__"]


def test_imports_go_down_the_layers() -> None:
    for package, path in files():
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "fusedlm" or len(parts) < 2 or parts[1] not in PLACE:
                continue
            other = parts[1]
            assert PLACE[other] <= PLACE[package], f"{path} imports {name}, which is above it"
            apart = {package, other} == PEERS_APART
            assert not apart, f"{path} imports {name}; training and inference do not know each other"


def test_every_package_has_a_place() -> None:
    assert {package for package, _ in files()} <= PLACE.keys()


def test_only_kernels_import_triton_and_nobody_imports_peers() -> None:
    for package, path in files():
        roots = {name.split(".")[0] for name in imports(path)}
        assert "transformers" not in roots, path
        assert package == "kernels" or "triton" not in roots, path
