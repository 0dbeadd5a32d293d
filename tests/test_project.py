"""The project's own promises: pins that fit, a package that is whole, commands that exist."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import adept_ds
from tests.test_upstream import USES

REPOSITORY = Path(__file__).resolve().parent.parent


def setup_file() -> configparser.ConfigParser:
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    return setup


def requirements() -> list[Requirement]:
    """What setup.cfg asks for, extras included."""
    setup = setup_file()
    blocks = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    return [Requirement(line) for block in blocks for line in block.splitlines() if line]


def pins() -> dict[str, Version]:
    """constraints.txt as name and version."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_every_requirement_is_pinned_within_its_range(requirement: Requirement) -> None:
    assert pins()[canonicalize_name(requirement.name)] in requirement.specifier


@pytest.mark.parametrize("package", USES)
def test_a_package_whose_private_names_are_used_is_bound_to_minor_versions_that_were_tried(package: str) -> None:
    major, minor, *_ = pins()[canonicalize_name(package)].release
    allowed = next(requirement.specifier for requirement in requirements() if requirement.name == package)
    assert Version(f"{major}.{minor + 1}") not in allowed


def test_every_package_that_is_imported_is_asked_for() -> None:
    files = [path for folder in ("adept_ds", "evals", "launchers") for path in (REPOSITORY / folder).rglob("*.py")]
    # What runs in the environments of engines asks for nothing here.
    files = [path for path in files if path.parent.name not in ("vllm_plugin", "workers")]
    imports = [
        name
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom) and node.module and not node.level
            else []
        )
    ]
    modules = {name.partition(".")[0] for name in imports} - sys.stdlib_module_names - {"adept_ds"}
    packages = {
        canonicalize_name({"sklearn": "scikit-learn", "pydantic_core": "pydantic"}.get(module, module))
        for module in modules
    }
    assert packages - {canonicalize_name(requirement.name) for requirement in requirements()} == set()


def test_no_pin_is_a_build_for_one_kind_of_machine() -> None:
    assert [name for name, version in pins().items() if version.local] == []


@pytest.fixture(scope="module")
def wheel_files(wheel: Path) -> set[str]:
    """Names of the files in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_every_file_of_the_package_is_in_the_wheel(wheel_files: set[str]) -> None:
    package = REPOSITORY / "adept_ds"
    files = {str(path.relative_to(REPOSITORY)) for path in package.rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert files - wheel_files == set()


def test_recipes_and_batch_scripts_are_in_the_wheel(wheel_files: set[str]) -> None:
    recipes = {f"adept_ds/recipes/{path.name}" for path in (REPOSITORY / "ds_configs").glob("*.json")}
    folder = REPOSITORY / "launchers" / "slurm"
    scripts = {f"adept_ds/slurm/scripts/{path.name}" for path in [*folder.glob("*.sbatch"), *folder.glob("*.sh")]}
    assert len(recipes) > 5
    assert len(scripts) > 5
    assert (recipes | scripts) - wheel_files == set()


def test_the_wheel_holds_nothing_but_the_package(wheel_files: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel_files if ".dist-info/" not in name} == {"adept_ds"}


def test_demo_makes_the_environment_first_and_the_report_last() -> None:
    command = ["make", "--dry-run", "--always-make", "demo"]
    recipe = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    steps = ["-m venv .venv", "adept_ds.tools.demo_model", "adept-ds train", "adept-ds eval", "adept-ds report"]
    positions = [recipe.index(step) for step in steps]
    assert positions == sorted(positions)


def test_an_interpreter_that_is_too_old_or_missing_is_named(tmp_path: Path) -> None:
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((REPOSITORY / name).read_bytes())
    done = subprocess.run(["make", "env", "PYTHON=/nowhere/python"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed, PYTHON is '/nowhere/python'" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_every_make_target_is_explained() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    explained = subprocess.run(["make"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert [target for target in phony[1].split() if target != "help" and f"make {target}" not in explained] == []


def test_the_version_is_the_newest_of_the_changelog_and_that_of_the_citation() -> None:
    version = setup_file()["metadata"]["version"]
    released = re.findall(
        r"^## \[(\d[^]]*)\] - \d{4}-\d\d-\d\d$", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert released == sorted(released, key=Version, reverse=True)
    assert (released[0], citation["version"]) == (version, version)


def test_the_package_tells_its_version() -> None:
    assert adept_ds.__version__ == importlib.metadata.version("adept-ds")


def test_the_hooks_before_a_commit_are_the_checks_of_make_lint() -> None:
    recipe = subprocess.run(["make", "--dry-run", "lint"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    commands = [line for line in recipe.stdout.splitlines() if line.startswith(".venv/bin/") and " -m " not in line]
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entries = [hook["entry"] for hook in hooks if hook["id"] != "schema"]
    assert len(entries) == len(commands)
    # The files that a hook is given follow its command.
    assert [entry for entry, command in zip(entries, commands, strict=True) if not command.startswith(entry)] == []
    scripts = commands[-1].removeprefix(entries[-1]).split()
    assert all(re.search(hook["files"], script) for hook in hooks if hook["id"] == "shellcheck" for script in scripts)
