"""What a run says of itself as it goes on: `status.json`, `metrics.jsonl`, and any tracker of Accelerate by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from tqdm import tqdm

from adept_ds.config.loader import flatten
from adept_ds.config.run import LoggingConfig, RunConfig
from adept_ds.errors import UserError, did_you_mean
from adept_ds.files import atomic_write
from adept_ds.storage.run_folder import METRICS_NAME, RunFolder, read_metrics


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuse trackers that Accelerate does not know or whose package is not there.

    Raises:
        UserError: Names the tracker and the known ones.
    """
    installed = {tracker.value for tracker in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(
                f"logging.trackers has {name!r}, which is none of {', '.join(LOGGER_TYPE_TO_CLASS)}"
                f"{did_you_mean(name, LOGGER_TYPE_TO_CLASS)}"
            )
        if name not in installed:
            raise UserError(f"logging.trackers has {name!r}, whose package is not installed")


class SilentLog:
    """The log of the ranks other than 0, which leave writing to it."""

    def set_status(self, state: str, step: int, **facts: Any) -> None:
        """Write `status.json`; `state` is running, interrupted, finished, or failed."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add one line of metrics: `step` and the values."""

    def say(self, text: str) -> None:
        """Print a line, beside a progress bar."""

    def close(self) -> None:
        """Flush all metrics."""


class RunLog(SilentLog):
    """The log of rank 0, which has opened the folder. The run counts as running from here on.

    Args:
        folder: The run folder.
        run: Which trackers, and the settings that they are told.
        first_step: Lines of later steps are dropped: a run that resumes there takes those steps again.
        total_steps: Steps of the whole run.
    """

    def __init__(self, folder: RunFolder, run: RunConfig, first_step: int, total_steps: int) -> None:
        self._folder, self._total_steps = folder, total_steps
        self.set_status("running", first_step)
        path = folder.path / METRICS_NAME
        if path.exists():
            kept = [line for line in read_metrics(path) if line["step"] <= first_step]
            with atomic_write(path) as file:
                file.writelines(json.dumps(line) + "\n" for line in kept)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        settings = flatten(run.model_dump(mode="json", by_alias=True))
        self._trackers = [self._start(name, folder.path, run.logging, settings) for name in run.logging.trackers]

    @staticmethod
    def _start(name: str, run_dir: Path, config: LoggingConfig, settings: dict[str, Any]) -> GeneralTracker:
        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        if name == "tensorboard":
            tracker = tracker_class("tensorboard", run_dir)
            tracker.start()
            return tracker
        if tracker_class.requires_logging_directory:
            tracker = tracker_class(config.project, logging_dir=run_dir)
        else:
            tracker = tracker_class(config.project)
        tracker.start()
        tracker.store_init_configuration(settings)
        return tracker

    def set_status(self, state: str, step: int, **facts: Any) -> None:
        """See `SilentLog.set_status`."""
        self._folder.set_status(state, step, self._total_steps, **facts)

    def write(self, step: int, values: dict[str, float]) -> None:
        """See `SilentLog.write`."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for tracker in self._trackers:
            tracker.log(values, step=step)

    def say(self, text: str) -> None:
        """See `SilentLog.say`."""
        tqdm.write(text)

    def close(self) -> None:
        """See `SilentLog.close`."""
        self._file.close()
        for tracker in self._trackers:
            tracker.finish()
