"""The log of a run: metrics.jsonl across interruptions, status.json, trackers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, TensorBoardTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from adept_ds.config.run import RunConfig
from adept_ds.storage.run_folder import METRICS_NAME, RunFolder, read_metrics, read_status
from adept_ds.storage.run_log import RunLog


def open_log(run_dir: Path, first_step: int = 0, trackers: tuple[str, ...] = (), **logging: Any) -> RunLog:
    run_dir.mkdir(exist_ok=True)
    settings = {"run_dir": str(run_dir), "trackers": trackers, **logging}
    run = RunConfig.model_validate({"model": {"name_or_path": "x"}, "train": {"epochs": 1}, "logging": settings})
    log = RunLog(RunFolder(run_dir), run, first_step, total_steps=10)
    log.open()
    return log


def write_line(log: RunLog, step: int, **values: float) -> None:
    log.step = step
    log.write(values)


def write(run_dir: Path, steps: list[int], first_step: int = 0, loss: float = 1.0) -> None:
    log = open_log(run_dir, first_step)
    for step in steps:
        write_line(log, step, loss=loss)
    log.close()


def test_lines_are_step_and_values(tmp_path):
    log = open_log(tmp_path)
    log.step = 3
    log.write({"loss": 0.1 + 0.2, "learning_rate/network": 1e-4})
    log.write({"eval/loss": 2.0})
    log.close()
    assert read_metrics(tmp_path / METRICS_NAME) == [
        {"step": 3, "loss": 0.1 + 0.2, "learning_rate/network": 1e-4},
        {"step": 3, "eval/loss": 2.0},
    ]


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    log = open_log(tmp_path)
    write_line(log, 1, loss=1.0)
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
    write_line(log, 5, loss=0.25)
    log.close()
    (events,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    accumulator = EventAccumulator(str(events)).Reload()
    assert [(event.step, event.value) for event in accumulator.Scalars("loss")] == [(5, 0.25)]


def test_the_status_tells_where_trackers_keep_the_run(tmp_path, capsys):
    log = open_log(tmp_path, trackers=("tensorboard",))
    expected = {"tensorboard": str(tmp_path / "tensorboard")}
    assert read_status(tmp_path)["trackers"] == expected
    log.close()
    log.set_status("finished")
    assert read_status(tmp_path)["trackers"] == expected
    assert f"tensorboard has this run at {tmp_path / 'tensorboard'}" in capsys.readouterr().out


def test_a_tracker_that_fails_to_take_the_result_does_not_fail_the_run(tmp_path, capsys, monkeypatch):
    class Full(TensorBoardTracker):
        def log_artifacts(self, folder: str, name: str) -> None:
            raise OSError(f"no room for {name}")

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Full)
    log = open_log(tmp_path / "run", trackers=("tensorboard",), upload_result=True)
    log.close(tmp_path)
    assert "tensorboard did not take the result: OSError: no room for run-best" in capsys.readouterr().out


def test_odd_lines_are_left_out_and_told_and_hide_none_behind_them(tmp_path, capsys):
    write(tmp_path, [1, 2])
    path = tmp_path / METRICS_NAME
    odd = ['{"loss": 1}', '{"step": "two"}', "7", "[]", "\x00\x00", "[" * 100_000]
    path.write_text("\n".join([path.read_text().splitlines()[0], *odd, path.read_text().splitlines()[1]]) + "\n")
    write(tmp_path, [3], first_step=2)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    assert f"{path}: left out 6 that are no whole line of metrics" in capsys.readouterr().out


def test_figures_that_are_no_numbers_are_json_all_the_same(tmp_path):
    log = open_log(tmp_path)
    write_line(log, 1, loss=1.0, grad_norm=math.inf, **{"eval/loss": math.nan})
    log.set_status("failed", best_value=math.nan)
    log.close()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    (line,) = (tmp_path / METRICS_NAME).read_text().splitlines()
    expected = {"step": 1, "loss": 1.0, "not_finite": {"grad_norm": "inf", "eval/loss": "nan"}}
    assert json.loads(line, parse_constant=refuse) == expected
    assert json.loads((tmp_path / "status.json").read_text(), parse_constant=refuse)["best_value"] is None


def test_tensorboard_has_a_step_once_after_a_resume(tmp_path):
    for first, steps, loss in ((0, (1, 2, 3), 1.0), (1, (2, 3), 0.5)):
        log = open_log(tmp_path, first, trackers=("tensorboard",))
        for step in steps:
            write_line(log, step, loss=loss)
        log.close()
    accumulator = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in accumulator.Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, 0.5)]


def test_a_status_tells_the_step_while_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("adept_ds.storage.run_log.STATUS_SECONDS", 0.0)
    log = open_log(tmp_path)
    write_line(log, 7, loss=1.0)
    assert (read_status(tmp_path)["state"], read_status(tmp_path)["step"]) == ("running", 7)
    log.close()


def test_a_full_disk_under_metrics_and_status_is_told_and_ends_nothing(tmp_path, capsys):
    if not Path("/dev/full").exists():
        pytest.skip("no device that is always full")
    (tmp_path / METRICS_NAME).symlink_to("/dev/full")
    log = RunLog(RunFolder(tmp_path), open_log(tmp_path / "other")._run, 0, 10)
    log._file = (tmp_path / METRICS_NAME).open("a", buffering=1)
    for step in (1, 2):
        write_line(log, step, loss=1.0)
    assert capsys.readouterr().out.count("No space left on device") == 1
