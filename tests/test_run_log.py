"""metrics.jsonl across interruptions, and trackers by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from adept_ds.config.run import RunConfig
from adept_ds.errors import UserError
from adept_ds.storage.run_folder import METRICS_NAME, RunFolder, read_metrics
from adept_ds.storage.run_log import RunLog, check_trackers


def open_log(run_dir: Path, first_step: int = 0, trackers: tuple[str, ...] = ()) -> RunLog:
    settings = {"run_dir": str(run_dir), "trackers": trackers}
    run = RunConfig.model_validate({"model": {"name_or_path": "x"}, "train": {"epochs": 1}, "logging": settings})
    return RunLog(RunFolder(run_dir), run, first_step, total_steps=10)


def write(run_dir: Path, steps: list[int], first_step: int = 0, loss: float = 1.0) -> None:
    log = open_log(run_dir, first_step)
    for step in steps:
        log.write(step, {"loss": loss})
    log.close()


def test_lines_are_step_and_values(tmp_path):
    log = open_log(tmp_path)
    log.write(3, {"loss": 0.1 + 0.2, "learning_rate/network": 1e-4})
    log.write(3, {"eval/loss": 2.0})
    log.close()
    assert read_metrics(tmp_path / METRICS_NAME) == [
        {"step": 3, "loss": 0.1 + 0.2, "learning_rate/network": 1e-4},
        {"step": 3, "eval/loss": 2.0},
    ]


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    log = open_log(tmp_path)
    log.write(1, {"loss": 1.0})
    assert len(read_metrics(tmp_path / METRICS_NAME)) == 1
    log.close()


def test_lines_after_the_resumed_step_are_dropped(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    write(tmp_path, [3, 4], first_step=2, loss=5.0)
    lines = read_metrics(tmp_path / METRICS_NAME)
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 1.0), (3, 5.0), (4, 5.0)]


def test_starting_over_drops_all_lines(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [1])
    assert len(read_metrics(tmp_path / METRICS_NAME)) == 1


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', "{", '{"step": 3'])
def test_a_last_line_cut_short_is_left_out(tmp_path, rest):
    write(tmp_path, [1, 2])
    with (tmp_path / METRICS_NAME).open("a") as file:
        file.write(rest)
    assert [line["step"] for line in read_metrics(tmp_path / METRICS_NAME)] == [1, 2]
    write(tmp_path, [3], first_step=2)
    assert [line["step"] for line in read_metrics(tmp_path / METRICS_NAME)] == [1, 2, 3]


def test_tensorboard_gets_the_values(tmp_path):
    log = open_log(tmp_path, trackers=("tensorboard",))
    log.write(5, {"loss": 0.25})
    log.close()
    (events,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    accumulator = EventAccumulator(str(events)).Reload()
    assert [(event.step, event.value) for event in accumulator.Scalars("loss")] == [(5, 0.25)]


def test_known_trackers_pass():
    check_trackers(("tensorboard",))
    check_trackers(())


def test_an_unknown_tracker_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"logging\.trackers has 'tensorbord', .*did you mean 'tensorboard'"):
        check_trackers(("tensorbord",))


def test_a_tracker_that_is_not_installed_is_refused():
    missing = sorted(set(LOGGER_TYPE_TO_CLASS) - {tracker.value for tracker in get_available_trackers()})
    if not missing:
        pytest.skip("every tracker that Accelerate knows is installed")
    with pytest.raises(UserError, match=f"'{missing[0]}', whose package is not installed"):
        check_trackers((missing[0],))
