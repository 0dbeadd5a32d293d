"""Finds what of the host's site-packages has to be shown to programs that may import some packages."""

from __future__ import annotations

import importlib.util
import os
import site
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from adept_ds.errors import UserError, did_you_mean

PACKAGE_FOLDERS = ("site-packages", "dist-packages")
INSIDE = "/packages"
"""Where the packages lie inside tiers that have a file system of their own."""


def package_paths(name: str) -> list[Path]:
    """Return a package's folder or file, and beside it the folder of the libraries that its wheel brought along.

    Raises:
        UserError: `name` is no top-level package that is installed for this interpreter and has files of its own.
    """
    setting = f"sandbox package {name!r}"
    if name in sys.stdlib_module_names:
        raise UserError(f"{setting}: part of the standard library, which programs can import anyway")
    if not name.isidentifier():
        raise UserError(f"{setting}: expected the name that is imported, without a part behind a dot, such as numpy")
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise UserError(f"{setting}: not installed for {sys.executable}{did_you_mean(name, _installed())}")
    if spec.origin is None or not os.path.isfile(spec.origin):
        raise UserError(f"{setting}: expected a folder with __init__.py, or a file; it has neither")
    path = Path(spec.origin)
    path = path.parent if spec.submodule_search_locations else path
    libraries = path.with_name(f"{name}.libs")
    return [path, libraries] if libraries.is_dir() else [path]


def visible_packages(names: Sequence[str]) -> dict[str, str]:
    """Map what is to be shown read-only on the host to its place inside."""
    paths = [path for name in names for path in package_paths(name)]
    return {os.path.realpath(path): f"{INSIDE}/{path.name}" for path in paths}


def site_packages() -> list[str]:
    """Return the folders of installed packages: of the virtual environment and of the interpreter behind it."""
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    folders = {*sys.path, *site.getsitepackages(), site.getusersitepackages()}
    folders |= {sysconfig.get_path(name, vars=base) for name in ("purelib", "platlib")}
    found = {os.path.realpath(folder) for folder in folders if os.path.basename(folder) in PACKAGE_FOLDERS}
    return sorted(folder for folder in found if os.path.isdir(folder))


def _installed() -> set[str]:
    files = [path for folder in site_packages() for path in Path(folder).iterdir()]
    return {path.stem for path in files if path.suffix in ("", ".py")}
