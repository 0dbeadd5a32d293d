"""`launchers/status.py` from runs' own files, without SLURM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from adept_ds.slurm import status
from adept_ds.slurm.queue import QueuedJob
from adept_ds.slurm.status import RunState, read_states, run_folders

from .conftest import REPOSITORY

TRY = {
    "job": "7",
    "array_task": None,
    "try": 0,
    "nodes": ["n1"],
    "world_size": 2,
    "started": "2026-01-01T00:00:00+00:00",
    "from_step": 0,
    "to_step": 10,
    "ended_by": "time limit",
    "requeued": True,
}


def make_run(folder: Path, state: str | None = None, step: int = 0, **facts: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"train": {"global_batch_size": 8}}))
    if state:
        (folder / "status.json").write_text(json.dumps({"state": state, "step": step, "total_steps": 100, **facts}))
    return folder


def submitted(folder: Path, members: tuple[str, ...] = (), **jobs: str) -> None:
    (folder / "slurm").mkdir(parents=True)
    record = {"jobs": jobs, "members": members, "scripts": [], "submitted": ""}
    (folder / "slurm" / "submission.json").write_text(json.dumps(record))


def write_history(folder: Path, *tries: dict[str, Any]) -> None:
    (folder / "history.jsonl").write_text("".join(json.dumps({**TRY, **one}) + "\n" for one in tries))


@pytest.fixture
def state_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The state of a run with the given jobs in the queue."""

    def read(folder: Path, *queued: QueuedJob, ended: str | None = None) -> RunState:
        monkeypatch.setattr(status.queue, "is_available", lambda: True)
        monkeypatch.setattr(status.queue, "queued_jobs", lambda users: list(queued))
        monkeypatch.setattr(status.queue, "last_state", lambda job: ended)
        return read_states([folder], warn=print)[0]

    return read


def job(id: str, state: str = "RUNNING", reason: str = "None", task: int | None = None, restarts: int = 0) -> QueuedJob:
    return QueuedJob(id, task, "name", state, reason, restarts, "1:00:00", "n[1-2]")


def test_a_pending_run_has_its_reason(tmp_path: Path, state_of: Any) -> None:
    submitted(tmp_path / "run", train="7")
    found = state_of(tmp_path / "run", job("7", "PENDING", "Priority"))
    assert (found.state, found.job, found.note) == ("pending", "7", "Priority")


def test_a_run_that_failed_and_was_submitted_again_is_pending(tmp_path: Path, state_of: Any) -> None:
    run = make_run(tmp_path / "run", "failed", 20)
    write_history(run, {"job": "7", "ended_by": "failed", "requeued": False})
    submitted(run, train="10")
    found = state_of(run, job("10", "PENDING", "Priority"))
    assert (found.state, found.job) == ("pending", "10")
    by_hand = state_of(run, job("7"))  # not the run's newest
    assert by_hand.state == "failed"


def test_a_running_run_has_rate_and_time_left(tmp_path: Path, state_of: Any) -> None:
    run = make_run(tmp_path / "run", "running", 20)
    submitted(run, train="7")
    write_history(run, {}, {"ended_by": None, "requeued": None, "try": 1})
    lines = [{"step": 40, "loss": 0.5, "examples_per_second": 16.0}, {"step": 40, "eval/loss": 0.7}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4')
    found = state_of(run, job("7", restarts=1))
    assert (found.state, found.step, found.total_steps, found.loss, found.requeued) == ("running", 40, 100, 0.5, 1)
    assert (found.steps_per_second, found.seconds_left) == (2.0, 30.0)


@pytest.mark.parametrize(
    ("state", "reason", "shown", "note"),
    [
        ("SUSPENDED", "None", "suspended", "SUSPENDED on n[1-2]"),
        ("STOPPED", "None", "suspended", "STOPPED on n[1-2]"),
        ("CONFIGURING", "None", "starting", "on n[1-2]"),
        ("COMPLETING", "None", "running", "COMPLETING on n[1-2]"),
        ("REQUEUE_HOLD", "launch failed requeued held", "pending", "held; `scontrol release 7` lets it go on"),
        ("PENDING", "JobHeldUser", "pending", "JobHeldUser; `scontrol release 7` lets it go on"),
    ],
)
def test_a_jobs_state_is_shown_as_what_it_is(
    state: str, reason: str, shown: str, note: str, tmp_path: Path, state_of: Any
) -> None:
    run = make_run(tmp_path / "run", "running", 20)
    submitted(run, train="7")
    found = state_of(run, job("7", state, reason))
    assert found.state == shown
    assert note in found.note


@pytest.mark.parametrize(
    ("ended", "shown", "note"),
    [("FAILED", "failed", "the batch script was killed; SLURM says FAILED"), ("CANCELLED", "cancelled", "")],
)
def test_a_killed_batch_script_is_no_interruption(
    ended: str, shown: str, note: str, tmp_path: Path, state_of: Any
) -> None:
    run = make_run(tmp_path / "run", "interrupted", 20)  # by ranks that SLURM has told to stop
    submitted(run, train="7")
    write_history(run, {"ended_by": None, "requeued": None})
    found = state_of(run, ended=ended)
    assert found.state == shown
    assert note in found.note


def test_gpu_hours_are_those_of_all_tries(tmp_path: Path, state_of: Any) -> None:
    run = make_run(tmp_path / "run", "finished", 100)
    start = "2026-01-01T00:00:00+00:00"
    write_history(
        run,
        {"started": start, "ended": "2026-01-01T02:00:00+00:00"},  # before GPUs were noted
        {"started": start, "ended": "2026-01-01T02:00:00+00:00", "gpus": 8},
        {"started": start, "ended": "2026-01-01T00:30:00+00:00", "gpus": 4},
    )
    assert state_of(run).gpu_hours == 18.0
    with_one = {**TRY, "started": (datetime.now().astimezone() - timedelta(hours=3)).isoformat(), "gpus": 2}
    write_history(run, {**with_one, "ended": None, "ended_by": None})
    assert state_of(run).gpu_hours == pytest.approx(6.0, abs=0.1)


def test_a_figure_of_an_earlier_adapter_is_marked(tmp_path: Path, state_of: Any) -> None:
    run = make_run(tmp_path / "run", "finished", 100)
    (run / "best").mkdir()
    (run / "best" / "adapter_config.json").write_text('{"tensors_sha256": "new"}')
    (run / "eval" / "adept").mkdir(parents=True)
    for digest, mark in (("old", " (of an earlier adapter)"), ("new", "")):
        summary = {"pass@1": {"mean": 0.5}, "adapter": "runs/run/best", "adapter_sha256": digest}
        (run / "eval" / "adept" / "summary.json").write_text(json.dumps(summary))
        assert state_of(run, ended="COMPLETED").score == f"adept pass@1 50.0 %{mark}"


def test_an_evaluation_that_is_under_way_is_told(tmp_path: Path, state_of: Any) -> None:
    run = make_run(tmp_path / "run", "finished", 100)
    submitted(run, train="7", eval="8", score="9")
    found = state_of(run, job("8"), job("9", "PENDING", "Dependency"))
    assert (found.state, found.job, found.note) == ("evaluating", "8", "eval is RUNNING")


def test_a_finished_run_has_its_score(tmp_path: Path, state_of: Any) -> None:
    run = make_run(tmp_path / "run", "finished", 100)
    submitted(run, train="7", eval="8")
    (run / "eval" / "adept").mkdir(parents=True)
    (run / "eval" / "adept" / "summary.json").write_text('{"pass@1": {"mean": 0.4322}}')
    (run / "eval" / "test" / "rte").mkdir(parents=True)
    figures = '{"metrics": {"accuracy": {"value": 0.82, "low": 0.75}, "f1": {"value": 0.7}}}'
    (run / "eval" / "test" / "rte" / "summary.json").write_text(figures)
    found = state_of(run, ended="COMPLETED")
    assert (found.state, found.score) == ("finished", "adept pass@1 43.2 %, test/rte accuracy 82.0 %")


@pytest.mark.parametrize(
    ("facts", "history", "ended", "state", "note"),
    [
        ({"state": "failed", "error": "UserError: no\nmore"}, {}, None, "failed", "UserError: no"),
        ({"state": "running"}, {"ended_by": "failed", "error": "first to fail: rank 1"}, None, "failed", "rank 1"),
        ({"state": "running"}, {"ended_by": "no progress"}, None, "failed", "no progress"),
        ({"state": "running"}, {"ended_by": None}, "NODE_FAIL", "failed", "NODE_FAIL"),
        ({"state": "interrupted"}, {"ended_by": "stopped"}, None, "interrupted", ""),
        ({"state": "running"}, {"ended_by": "cancelled"}, None, "cancelled", ""),
        ({}, {"ended_by": None}, "OUT_OF_MEMORY", "failed", "OUT_OF_MEMORY"),
        ({"state": "finished", "reason": "early stopping at step 3"}, {}, None, "finished", "early stopping at step 3"),
    ],
)
def test_a_run_that_is_no_longer_in_the_queue_says_why(
    facts: dict[str, Any], history: dict[str, Any], ended: str, state: str, note: str, tmp_path: Path, state_of: Any
) -> None:
    run = make_run(tmp_path / "run")
    if facts:
        (run / "status.json").write_text(json.dumps({"step": 3, "total_steps": 100, **facts}))
    submitted(run, train="7")
    if history:
        write_history(run, history)
    found = state_of(run, ended=ended)
    assert found.state == state
    assert note in found.note


def test_an_evaluation_that_failed_is_a_failure(tmp_path: Path, state_of: Any) -> None:
    run = make_run(tmp_path / "run", "finished", 100)
    submitted(run, train="7", eval="8", score="9")
    found = state_of(run, ended="FAILED")
    assert (found.state, found.note) == ("failed", "trained, but eval ended as FAILED")


def test_the_members_of_a_sweep_are_its_tasks(tmp_path: Path, state_of: Any) -> None:
    submitted(tmp_path / "sweep", ("a", "b"), train="7")
    make_run(tmp_path / "sweep" / "b", "running", 20)
    folders = run_folders([tmp_path / "sweep"])
    assert folders == [tmp_path / "sweep" / "a", tmp_path / "sweep" / "b"]
    tasks = (job("7", "PENDING", "JobArrayTaskLimit", task=0), job("7", task=1))
    assert [state_of(folder, *tasks).state for folder in folders] == ["pending", "running"]
    assert state_of(folders[1], *tasks).job == "7_1"


def call(*arguments: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, REPOSITORY / "launchers" / "status.py", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PATH": "/nowhere", **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_without_slurm_a_runs_files_tell(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "done", "finished", 100)
    make_run(tmp_path / "runs" / "live [1]", "running", 20)
    table = call("runs", cwd=tmp_path)
    assert table.returncode == 0, table.stderr
    lines = table.stdout.splitlines()
    assert lines[1].split()[:3] == ["runs/done", "finished", "100/100"]
    assert lines[2].startswith("runs/live [1]  running")

    dead = make_run(tmp_path / "runs" / "dead", "running", 20)
    long_ago = time.time() - 7200
    for path in dead.iterdir():
        os.utime(path, (long_ago, long_ago))
    found = call("runs", "--json", cwd=tmp_path)
    assert found.returncode == 1
    states = {Path(row["run"]).name: row for row in json.loads(found.stdout)}
    assert {name: row["state"] for name, row in states.items()} == {
        "done": "finished",
        "live [1]": "running",
        "dead": "failed",
    }
    assert states["dead"]["note"].startswith("has written nothing for 2:00:")


def test_where_slurm_does_not_answer_a_runs_files_tell(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "finished", 100)
    for name in ("sbatch", "squeue"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
        program.chmod(0o755)
    done = call("run", cwd=tmp_path, PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert done.returncode == 0
    assert "finished" in done.stdout
    assert "SLURM does not answer" in done.stderr
    assert "Unable to contact slurm controller" in done.stderr


def test_a_watch_ends_when_nothing_is_under_way(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "finished", 100)
    done = call("run", "--watch", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "finished" in done.stdout


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, message in (("empty", "empty: holds neither a run nor runs"), ("none", "none: no such folder")):
        done = call(name, cwd=tmp_path)
        assert (done.returncode, done.stderr.strip()) == (2, f"error: {message}")
