"""Verdicts kept on disk, one small file per distinct program, tests, limits, isolation, packages and interpreter."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adept_ds.errors import UserError
from adept_ds.files import atomic_write

from .program import Limits, Program, Verdict

_FORMAT = 4
"""Raised whenever a change of the sandbox could change a verdict."""


class VerdictCache:
    """A folder of verdicts. Time-outs are not kept: they say something of the machine too.

    `isolation` is the sandbox's description of itself, which names the packages and their versions. Raises UserError if
    the folder cannot be written to.
    """

    def __init__(self, folder: Path, limits: Limits, isolation: dict[str, Any]) -> None:
        self.folder = folder
        self.limits = limits
        self.common = [_FORMAT, isolation, platform.python_version(), platform.machine()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"sandbox cache {str(folder)!r}: {error.strerror}; expected a folder") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"sandbox cache {str(folder)!r}: no permission to write to this folder")
        self._has_warned = False

    def _path(self, program: Program) -> Path:
        of_program = [asdict(self.limits.of(program)), program.source, asdict(program.tests)]
        text = json.dumps([*self.common, *of_program], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.json"

    def get(self, program: Program) -> Verdict | None:
        """Return the verdict that an equal program got before, under this one's id."""
        try:
            fields = json.loads(self._path(program).read_text(encoding="utf-8"))
            return Verdict(**fields | {"id": program.id})
        except (OSError, ValueError, TypeError):
            return None

    def put(self, program: Program, verdict: Verdict) -> None:
        """Keep a verdict that would come out the same again. Where that fails, on a full disk say, the run goes on."""
        if verdict.status not in ("passed", "failed", "error"):
            return
        try:
            with atomic_write(self._path(program)) as file:
                json.dump(asdict(verdict), file)
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    f"sandbox cache {str(self.folder)!r}: {error.strerror}; verdicts that cannot be kept there must be "
                    "found anew by the next run",
                    stacklevel=2,
                )
