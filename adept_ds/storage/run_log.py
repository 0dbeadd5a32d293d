"""What a run says of itself as it goes on: `status.json`, `metrics.jsonl`, trackers, and lines to the console."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from accelerate.tracking import GeneralTracker
from tqdm import tqdm
from typing_extensions import override

from adept_ds.config.loader import flatten
from adept_ds.config.run import RunConfig
from adept_ds.files import atomic_write, json_text
from adept_ds.storage.run_folder import METRICS_NAME, RunFolder, read_metrics, unwritable
from adept_ds.storage.trackers import address, start_tracker, upload

STATUS_SECONDS = 10.0
"""A running run's `status.json` is no older than this, or than its last line of metrics."""


class SilentLog:
    """The log of the ranks other than 0, which leave writing to it."""

    def __init__(self, first_step: int = 0) -> None:
        self.step = first_step
        """Steps taken so far, which all that is written is of; the trainer counts them."""

    def open(self) -> None:
        """Begin: the run counts as running from here on.

        Raises:
            UserError: A tracker cannot be started.
        """

    def set_status(self, state: str, **facts: Any) -> None:
        """Write `status.json`; `state` is running, interrupted, finished, or failed."""

    def write(self, values: dict[str, float]) -> None:
        """Add one line of metrics. Figures that are no finite numbers, which JSON has not, are under `not_finite`."""

    def say(self, text: str) -> None:
        """Print a line, beside a progress bar."""

    def close(self, result: Path | None = None) -> None:
        """Flush all metrics. The trackers are given the folder `result`, if there is one and the settings say so."""


class RunLog(SilentLog):
    """The log of rank 0, which has opened the folder.

    Args:
        folder: The run folder.
        run: Which trackers, and the settings that they are told.
        first_step: Lines of later steps are dropped: a run that resumes there takes those steps again.
        total_steps: Steps of the whole run.
    """

    def __init__(self, folder: RunFolder, run: RunConfig, first_step: int, total_steps: int) -> None:
        super().__init__(first_step)
        self._folder, self._run, self._total_steps = folder, run, total_steps
        self._file: IO[str]
        self._trackers: dict[str, GeneralTracker] = {}
        self._status_time = 0.0
        self._has_told = False

    @override
    def open(self) -> None:
        self.set_status("running")  # Who sees metrics finds a status beside them.
        path = self._folder.path / METRICS_NAME
        if path.exists():
            lines = read_metrics(path)
            kept = [line for line in lines if line["step"] <= self.step]
            odd = sum(map(bool, path.read_bytes().split(b"\n"))) - len(lines)
            if odd:
                print(f"{path}: left out {odd} that {'is' if odd == 1 else 'are'} no whole line of metrics")
            with atomic_write(path) as file:
                file.writelines(json_text(line) + "\n" for line in kept)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        settings = flatten(self._run.model_dump(mode="json", by_alias=True))
        for name in self._run.logging.trackers:
            self._trackers[name] = start_tracker(name, self._run.logging, self._folder.path, settings, self.step)
            print(f"{name} has this run at {address(self._trackers[name])}")
        if self._trackers:
            self.set_status("running")

    @override
    def set_status(self, state: str, **facts: Any) -> None:
        addresses = {name: address(tracker) for name, tracker in self._trackers.items()}
        with self._told_once():
            self._folder.set_status(state, self.step, self._total_steps, **facts, trackers=addresses)
        self._status_time = time.monotonic()

    @override
    def write(self, values: dict[str, float]) -> None:
        odd = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
        line = {"step": self.step} | {name: value for name, value in values.items() if name not in odd}
        with self._told_once():
            self._file.write(json.dumps(line | ({"not_finite": odd} if odd else {})) + "\n")
        if time.monotonic() - self._status_time > STATUS_SECONDS:
            self.set_status("running")
        for tracker in self._trackers.values():
            with self._told_once():
                tracker.log(values, step=self.step)

    @override
    def say(self, text: str) -> None:
        tqdm.write(f"step {self.step}: {text}")

    @override
    def close(self, result: Path | None = None) -> None:
        with self._told_once():
            self._file.close()
        for name, tracker in self._trackers.items():
            if result is not None and self._run.logging.upload_result:
                self._upload(name, tracker, result)
            tracker.finish()

    @contextmanager
    def _told_once(self) -> Iterator[None]:
        """Go on where the disk takes no line: the run is worth more than its record."""
        try:
            yield
        except OSError as error:
            if not self._has_told:
                self._has_told = True
                self.say(f"metrics and status are not whole: {unwritable(self._folder.path, error)}")

    def _upload(self, name: str, tracker: GeneralTracker, result: Path) -> None:
        """The run is done and its result on the disk, so a tracker that does not take it is told of and no more."""
        try:
            taken = upload(tracker, result.resolve(), f"{self._folder.path.resolve().name}-best")
        except Exception as error:
            self.say(f"logging.upload_result: {name} did not take the result: {type(error).__name__}: {error}")
        else:
            self.say(f"logging.upload_result: {name} {'has the result' if taken else 'takes no files'}")
