"""Verdicts kept on disk, one small file per distinct program, tests, limits, isolation and interpreter."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict
from pathlib import Path

from adept_ds.files import atomic_write

from .program import Limits, Program, Verdict

_FORMAT = 1
"""Raised whenever a change of the sandbox could change a verdict."""


class VerdictCache:
    """A folder of verdicts. Time-outs are not kept: they say something of the machine too."""

    def __init__(self, folder: Path, limits: Limits, tier: str) -> None:
        self.folder = folder
        self.common = [_FORMAT, asdict(limits), tier, platform.python_version(), platform.machine()]

    def _path(self, program: Program) -> Path:
        text = json.dumps([self.common, program.source, asdict(program.tests)], sort_keys=True)
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
        """Keep a verdict that would come out the same again."""
        if verdict.status in ("passed", "failed", "error"):
            with atomic_write(self._path(program)) as file:
                json.dump(asdict(verdict), file)
