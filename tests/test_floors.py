"""The architecture as a test: imports go to floors below, and what is heavy is imported where it is used."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    path.relative_to(ROOT)
    for package in ("fedlam_app", "strategies", "clients")
    for path in (ROOT / package).rglob("*.py")
)
FLOORS = {
    "fedlam_app.base": 0,
    "fedlam_app.config": 0,
    "fedlam_app.rules": 0,
    "fedlam_app.rules_privacy": 0,
    "fedlam_app.rules_split": 0,
    "fedlam_app.rules_wireless": 0,
    "fedlam_app.tables": 0,
    "fedlam_app.models": 1,
    "fedlam_app.data": 1,
    "fedlam_app.wireless": 1,
    "fedlam_app.privacy": 1,
    "fedlam_app.tasks": 2,
    "strategies": 2,
    "clients": 2,
    "fedlam_app.experiments": 3,
    "fedlam_app.inference": 3,
    "fedlam_app.parallel": 3,
    "fedlam_app": 4,  # what stands directly in the package: the entry points
}
FLOWER = {
    "fedlam_app/server_app.py",
    "fedlam_app/client_app.py",
    "fedlam_app/grid.py",  # the in-process grid is Flower's, for tests and benchmarks
    "fedlam_app/base/records.py",
    "strategies/base.py",
    "strategies/sites.py",  # who is there, and the exchange with them: the other half of base.py
}
HEAVY = {"sionna", "peft", "transformers", "matplotlib", "h5py", "opacus", "ray", "psutil", "huggingface_hub"}


def room(module: str) -> str:
    """Return the entry of FLOORS that a dotted module belongs to."""
    parts = module.split(".")
    for length in range(min(2, len(parts)), 0, -1):
        if ".".join(parts[:length]) in FLOORS:
            return ".".join(parts[:length])
    raise AssertionError(f"{module} stands on no floor: add its package to FLOORS and to the design")


def imports(path: Path, *, top_only: bool = False) -> Iterator[str]:
    """Yield the dotted modules that a file imports; ``top_only`` leaves out functions and type checking."""
    nodes = [ast.parse((ROOT / path).read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if _is_module(inner) else str(node.module)
        elif top_only and (isinstance(node, ast.FunctionDef) or _for_types_only(node)):
            continue
        nodes.extend(ast.iter_child_nodes(node))


def _is_module(dotted: str) -> bool:
    place = ROOT / dotted.replace(".", "/")
    return place.is_dir() or place.with_suffix(".py").is_file()


def _for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def ours(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_from_floors_below(path: Path) -> None:
    own = room(ours(path))
    for module in imports(path):
        if module.split(".")[0] not in ("fedlam_app", "strategies", "clients"):
            continue
        other = room(module)
        if other == own or (FLOORS[other] == FLOORS[own] and FLOORS[own] in (0, 1, 3)):
            continue  # neighbours on a floor may meet, except strategies, clients and tasks
        below = FLOORS[other] < FLOORS[own]
        meets_task = FLOORS[own] == 2 and other == "fedlam_app.tasks"
        assert below or meets_task, f"{path} (floor {FLOORS[own]}) imports {module} (floor {FLOORS[other]})"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_flower_appears_in_its_places_only(path: Path) -> None:
    if path.as_posix() not in FLOWER:
        assert not [module for module in imports(path) if module.split(".")[0] == "flwr"]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_heavy_libraries_are_imported_inside_functions(path: Path) -> None:
    found = {module.split(".")[0] for module in imports(path, top_only=True)}
    assert not found & HEAVY


@pytest.mark.parametrize("path", FILES, ids=str)
def test_radio_and_accounting_know_no_torch(path: Path) -> None:
    if "wireless" in path.parts or path.as_posix() == "fedlam_app/privacy/accounting.py":
        assert "torch" not in {module.split(".")[0] for module in imports(path)}


def test_the_command_line_starts_without_torch_and_flower() -> None:
    import subprocess
    import sys

    code = (
        "import sys, fedlam_app.cli, fedlam_app.launch;"
        "sys.exit(', '.join({'torch', 'flwr', 'matplotlib', 'ray'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_is_one_idea(path: Path) -> None:
    """Every file opens by saying what it is, and stays within 300 lines."""
    source = (ROOT / path).read_text(encoding="utf-8")
    if source.strip():
        assert ast.get_docstring(ast.parse(source)), f"{path} has no docstring"
    assert len(source.splitlines()) <= 300
