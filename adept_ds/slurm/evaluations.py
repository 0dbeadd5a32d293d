"""Evaluations that are asked for, and whether a folder holds them already: of this adapter, by this protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adept_ds.config.run import RunConfig
from adept_ds.evaluation.results import (
    GENERATION_NAME,
    SUMMARY_NAME,
    adapter_digest,
    program_protocol,
    task_protocol,
)
from adept_ds.files import read_json


@dataclass(frozen=True)
class Request:
    """An evaluation that is to be in a folder."""

    adapter: str | None
    """Adapter or model folder; None for the backbone alone."""
    out: str
    """Folder of the evaluation."""
    split: str = "test"
    ks: tuple[int, ...] = (1,)
    """Of programs, the k of pass@k."""
    paper: bool = False
    """Of programs, whether the paper's two post-processings are scored as well."""

    @property
    def flags(self) -> list[str]:
        """As flags of `adept-ds eval` and `adept-ds text2text`, those at their defaults left out."""
        return [
            *(("--adapter", self.adapter) if self.adapter else ()),
            *("--out", self.out),
            *(("--split", self.split) if self.split != "test" else ()),
            *["--paper_scoring"] * self.paper,
            *(("--k", *map(str, self.ks)) if self.ks != (1,) else ()),
        ]

    def foreign_samples(self, run: RunConfig) -> str | None:
        """Why samples of programs in the folder are not those that are asked for; None if they are, or if there are
        none."""
        path = Path(self.out) / GENERATION_NAME
        if not path.is_file():
            return None
        stored = read_json(path)
        asked = {
            "data": run.data.model_dump(mode="json"),
            "max_examples": run.eval.max_examples,
            "k": list(self.ks),
            "paper_scoring": self.paper,
        }
        differing = [name for name, value in asked.items() if name not in stored or stored[name] != value]
        facts = stored.get("facts", {})
        return self._foreign(path, facts, program_protocol(run, self.split)) or (
            f"{path}: of other settings ({', '.join(differing)})" if differing else None
        )

    def foreign_figures(self, run: RunConfig, task: str) -> str | None:
        """As `foreign_samples`, for the figures of a text-to-text task."""
        path = Path(self.out) / task / SUMMARY_NAME
        return self._foreign(path, read_json(path), task_protocol(run, task, self.split)) if path.is_file() else None

    def has_scores(self) -> bool:
        """Whether the summary of programs is one of the samples beside it."""
        summary, samples = Path(self.out) / SUMMARY_NAME, Path(self.out) / GENERATION_NAME
        if not (summary.is_file() and samples.is_file()):
            return False
        digest = read_json(samples).get("facts", {}).get("samples_sha256")
        return digest is not None and read_json(summary).get("samples_sha256") == digest

    def _foreign(self, path: Path, facts: Mapping[str, Any], protocol: Mapping[str, Any]) -> str | None:
        if not self._is_of_adapter(path, facts):
            return f"{path}: not of the adapter that is in {self.adapter or 'the backbone alone'} now"
        found = facts.get("protocol", {})
        differing = [name for name, value in protocol.items() if name not in found or found[name] != value]
        return f"{path}: by another protocol ({', '.join(differing)})" if differing else None

    def _is_of_adapter(self, path: Path, facts: Mapping[str, Any]) -> bool:
        if self.adapter is None:
            return "adapter" in facts and facts["adapter"] is None
        digest = adapter_digest(Path(self.adapter))
        if digest is not None:
            return facts.get("adapter_sha256") == digest
        # A fully tuned model has no digest: it is told by time.
        files = [file for file in Path(self.adapter).glob("*") if file.is_file()]
        is_model = any(file.name == "config.json" for file in files) and facts.get("adapter") is not None
        return is_model and max(file.stat().st_mtime for file in files) < path.stat().st_mtime
