"""Trackers that Accelerate knows by name: which there are, where a person finds the run in them, and its result."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

from adept_ds.config.run import LoggingConfig
from adept_ds.errors import UserError, did_you_mean

UPLOADS: dict[str, Callable[[Any, str, str], Any]] = {
    "wandb": lambda run, folder, name: run.log_artifact(folder, name=name, type="model"),
}
"""How a folder gets into a tracker for which Accelerate has no `log_artifacts` as it has for MLflow."""
ADDRESSES = ("url", "log_dir", "dir", "info.run_id")
"""Where the objects behind the trackers keep the run's web page, or else its folder, or its id."""


def check_trackers(config: LoggingConfig) -> None:
    """Refuse trackers that Accelerate does not know or whose package is not there, and a result that none would take.

    Raises:
        UserError: Names the tracker and the known ones.
    """
    of_packages = {tracker.value for tracker in LoggerType} - {tracker.value for tracker in get_available_trackers()}
    for name in config.trackers:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(
                f"logging.trackers has {name!r}, which is none of {', '.join(LOGGER_TYPE_TO_CLASS)}"
                f"{did_you_mean(name, LOGGER_TYPE_TO_CLASS)}"
            )
        if name in of_packages:
            raise UserError(f"logging.trackers has {name!r}, whose package is not installed")
    if config.upload_result and not any(map(_takes_files, config.trackers)):
        takers = ", ".join(filter(_takes_files, LOGGER_TYPE_TO_CLASS))
        raise UserError(
            f"logging.upload_result is true, but no files can be put into logging.trackers {list(config.trackers)}; "
            f"expected one of {takers} there"
        )


def start_tracker(
    name: str, config: LoggingConfig, run_dir: Path, settings: dict[str, Any], first_step: int = 0
) -> GeneralTracker:
    """Begin a run in a tracker, and tell it the resolved settings. What TensorBoard has of steps after `first_step`
    goes: the run takes them anew.

    Raises:
        UserError: It cannot be begun: nobody is logged in, the server does not answer, or whatever it says.
    """
    tracker_class = LOGGER_TYPE_TO_CLASS[name]
    is_tensorboard = name == "tensorboard"
    options: dict[str, Any] = {"logging_dir": run_dir} if tracker_class.requires_logging_directory else {}
    if is_tensorboard:
        options["purge_step"] = first_step + 1
    try:
        tracker = tracker_class("tensorboard" if is_tensorboard else config.project, **options)
        tracker.start()
        if not is_tensorboard:  # which would make a run of its own of them
            tracker.store_init_configuration(settings)
    except Exception as error:
        raise UserError(f"logging.trackers has {name!r}, which cannot be begun: {error}") from error
    return tracker


def address(tracker: GeneralTracker) -> str | None:
    """Where a person finds the run: a web page, a folder, or an id; None if the tracker does not tell."""
    for path in ADDRESSES:
        try:
            found = operator.attrgetter(path)(tracker.tracker)
        except AttributeError:
            continue
        if found:
            return str(found)
    return None


def upload(tracker: GeneralTracker, folder: Path, name: str) -> bool:
    """Put the files of a folder into the tracker's run; return whether it takes files."""
    if not _takes_files(tracker.name):
        return False
    if hasattr(tracker, "log_artifacts"):
        tracker.log_artifacts(str(folder), name)
    else:
        UPLOADS[tracker.name](tracker.tracker, str(folder), name)
    return True


def _takes_files(name: str) -> bool:
    return name in UPLOADS or hasattr(LOGGER_TYPE_TO_CLASS[name], "log_artifacts")
