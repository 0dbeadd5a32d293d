"""Metrics of a run: `metrics.jsonl` always, and any tracker that Accelerate knows by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from adept_ds.config.run import LoggingConfig
from adept_ds.errors import UserError, did_you_mean
from adept_ds.files import atomic_write
from adept_ds.storage.run_folder import METRICS_NAME, read_metrics


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


class MetricsLog:
    """Writes each line of metrics to the run folder and to the trackers. For rank 0 alone.

    Args:
        run_dir: The run folder.
        config: Which trackers.
        first_step: Lines of later steps are dropped: a run that resumes there takes those steps again.
        settings: The resolved config, for the trackers.
    """

    def __init__(self, run_dir: Path, config: LoggingConfig, first_step: int, settings: dict[str, Any]) -> None:
        path = run_dir / METRICS_NAME
        if path.exists():
            kept = [line for line in read_metrics(path) if line["step"] <= first_step]
            with atomic_write(path) as file:
                file.writelines(json.dumps(line) + "\n" for line in kept)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._trackers = [self._start(name, run_dir, config, settings) for name in config.trackers]

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

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add one line: `step` and the values."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for tracker in self._trackers:
            tracker.log(values, step=step)

    def close(self) -> None:
        """Flush everything."""
        self._file.close()
        for tracker in self._trackers:
            tracker.finish()
