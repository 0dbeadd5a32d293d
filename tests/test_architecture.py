"""The package's floors: which room may import which, read from the code."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

import pytest

from tests.ranks import REPOSITORY

FLOORS = (
    {"__main__", "import_adapter"},
    {"cli"},
    {"benchmark", "slurm", "tools"},
    {"training", "reports"},
    {"planner", "evaluation"},
    {"serving"},
    {"export"},
    {"data"},
    {"model"},
    {"methods"},
    {"storage"},
    {"backbone"},
    {"config"},
    {"formats"},
    {"sandbox", "distributed", "entry_point"},
    {"files", "contexts", "rank_environment"},
    {"errors"},
)
"""From the top down. A room (a package, or a file beside the packages) imports from floors below its own only."""
FLOOR = {room: -number for number, rooms in enumerate(FLOORS) for room in rooms}
PACKAGE = REPOSITORY / "adept_ds"


def _module(path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _imported(module: str) -> set[str]:
    """Modules of the package that a module imports, wherever in it: also within functions and for types only."""
    path = MODULES[module]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative to the module's package
                package = module if path.name == "__init__.py" else module.rpartition(".")[0]
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, *([node.module] if node.module else [])])
            if base in MODULES:
                names = {f"{base}.{alias.name}" for alias in node.names}
                found |= (names & MODULES.keys()) or {base}
    return found - {module}


GRAPH = {module: _imported(module) for module in MODULES}


def _room(module: str) -> str:
    return module.split(".")[1]


def test_every_room_has_a_floor() -> None:
    rooms = {_room(module) for module in MODULES if module != "adept_ds"}
    assert rooms == FLOOR.keys()


def test_nothing_is_imported_from_the_same_floor_or_above() -> None:
    upward = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        if module != "adept_ds"
        for other in others
        if other != "adept_ds" and _room(module) != _room(other) and FLOOR[_room(module)] <= FLOOR[_room(other)]
    ]
    assert not upward, "\n".join(upward)


def test_no_file_imports_itself_in_a_circle() -> None:
    # The package's own names are imported when they are asked for.
    graph = {module: others for module, others in GRAPH.items() if module != "adept_ds"}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail("imports go in a circle: " + ", ".join(f"{b} imports {a}" for a, b in pairwise(error.args[1])))


FREE = ("adept_ds.cli.", "adept_ds.sandbox")
"""Where a name made at run time cannot lead upwards: on the top floor, and where a program imports what it likes."""


def test_no_import_is_out_of_sight() -> None:
    """A module that is imported by a name made at run time would be missing from the graph."""
    hidden = [
        name
        for name, path in MODULES.items()
        if "import_module(" in path.read_text(encoding="utf-8") and not name.startswith(FREE)
    ]
    assert not hidden
