"""What the jobs decide by: ranks, histories, nodes' reports, failures. No SLURM is needed."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from adept_ds.config.run import RunConfig
from adept_ds.errors import UserError
from adept_ds.rank_environment import expand_counts, first_host, take_slurm_ranks
from adept_ds.slurm.node_check import NodeReport, compare, inspect_node, verdict
from adept_ds.slurm.tries import (
    REQUEUE,
    Try,
    config_of_task,
    first_failure,
    never_started,
    read_history,
    why_no_more,
    write_history,
)
from adept_ds.storage.run_folder import MANIFEST, RNG_NAME, STATE_NAME, file_proof

from .conftest import REPOSITORY, write_config

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "5",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "rack[03-04,9]n1",
}


def test_a_task_of_a_step_is_a_rank() -> None:
    environment = dict(STEP)
    take_slurm_ranks(environment)
    assert {name: value for name, value in environment.items() if not name.startswith("SLURM_")} == {
        "RANK": "4",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "rack03n1",
        "MASTER_PORT": "16711",
    }


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param(STEP | {"RANK": "0"}, id="another launcher within a step"),
        pytest.param(
            {name: value for name, value in STEP.items() if "STEP" not in name} | {"SLURM_PROCID": "0"},
            id="batch script",
        ),
        pytest.param(STEP | {"SLURM_STEP_NUM_TASKS": "1"}, id="a step of one task"),
        pytest.param({}, id="no SLURM"),
    ],
)
def test_other_processes_are_left_as_they_are(environment: dict[str, str]) -> None:
    before = dict(environment)
    take_slurm_ranks(environment)
    assert environment == before


LEFT_OVER = {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        pytest.param(STEP | {"SLURM_STEP_ID": "0"}, ["4", "5", "rack03n1", "16711"], id="a step of several tasks"),
        pytest.param(STEP | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, [None] * 4, id="a step of one task"),
        pytest.param({}, ["0", "8", "elsewhere", "29500"], id="a launcher's rank, no SLURM"),
    ],
)
def test_what_a_shell_had_left_over_makes_no_rank_of_a_step(
    environment: dict[str, str], rank: list[str | None]
) -> None:
    assert ranks_of(LEFT_OVER | environment) == rank


def test_a_launcher_within_a_step_is_believed() -> None:
    own = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "12345"}
    assert ranks_of(LEFT_OVER | STEP | {"SLURM_STEP_ID": "0"}, own) == ["1", "2", "n1", "12345"]


def ranks_of(environment: dict[str, str], by_launcher: dict[str, str] | None = None) -> list[str | None]:
    """What makes a rank of a program that a task of a step, with this environment, becomes, or starts as a launcher."""
    program = (
        "import json, os\n"
        "from adept_ds.rank_environment import take_slurm_ranks\n"
        "take_slurm_ranks(os.environ)\n"
        "take_slurm_ranks(os.environ)\n"  # as the entry point and `init_world` do
        "names = ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')\n"
        "print(json.dumps([os.environ.get(name) for name in names]))\n"
    )
    settings = " ".join(f"{name}={value}" for name, value in (by_launcher or {}).items())
    start = f"env {settings} " if by_launcher else "exec "
    # The shell is the task's process, whose number SLURM tells it.
    shell = f'export SLURM_TASK_PID=$$; {start}"$0" -c "$1"; true'
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        ["bash", "-c", shell, sys.executable, program],
        env={**inherited, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("text", "host"),
    [("n1", "n1"), ("n[1-2]", "n1"), ("a7,n[1-2]", "a7"), ("r[03-05,9]n[2,4]-ib,login", "r03n2-ib")],
)
def test_the_first_host_of_a_list(text: str, host: str) -> None:
    assert first_host(text) == host


def test_counts_of_tasks_are_expanded() -> None:
    assert expand_counts("8(x3),4,1(x2)") == [8, 8, 8, 4, 1, 1]


def a_try(number: int, from_step: int, to_step: int | None, ended_by: str | None = "time limit") -> Try:
    ended = None if ended_by is None else "2026-01-01T00:00:01+00:00"
    return Try("7", None, number, ("n1",), 2, "2026-01-01T00:00:00+00:00", from_step, ended, to_step, ended_by, True)


def test_a_history_is_read_as_it_was_written(tmp_path: Path) -> None:
    tries = [a_try(0, 0, 5), a_try(1, 5, None, None)]
    write_history(tmp_path, tries)
    assert read_history(tmp_path) == tries
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["try"] for line in lines] == [0, 1]


@pytest.mark.parametrize(
    ("tries", "restarts", "reason"),
    [
        ([], 0, None),
        ([a_try(0, 0, 5)], 1, None),
        ([a_try(0, 0, 0)], 1, None),
        ([a_try(0, 0, 0), a_try(1, 0, 0)], 2, "no progress"),
        ([a_try(0, 0, 0), a_try(1, 0, 3)], 2, None),
        ([a_try(0, 0, 0), a_try(1, 0, 3), a_try(2, 3, 3)], 3, None),
        ([a_try(3, 0, 5)], 4, "restart cap"),
        ([a_try(0, 0, 0, "launch failure"), a_try(1, 0, 0, "launch failure")], 2, None),
        ([a_try(number, 0, 0, "launch failure") for number in range(3)], 3, "launch failure"),
        ([a_try(0, 0, 0), a_try(1, 0, 0, "launch failure")], 2, None),
    ],
)
def test_a_run_ends_at_the_cap_or_where_it_gains_nothing(tries: list[Try], restarts: int, reason: str | None) -> None:
    found = why_no_more(tries, restarts, max_restarts=3)
    assert (found and found[0]) == reason


def test_a_member_of_an_array_has_its_own_line(tmp_path: Path) -> None:
    configs = tmp_path / "configs.txt"
    configs.write_text("a.json\nb c.json\n")
    assert config_of_task(configs, {"SLURM_ARRAY_TASK_ID": "1"}) == Path("b c.json")
    assert config_of_task(configs, {}) == configs
    with pytest.raises(UserError, match="has 2 lines, and none for the array's task 2"):
        config_of_task(configs, {"SLURM_ARRAY_TASK_ID": "2"})


def leave(logs: Path, rank: int, time: float, status: int, error: str | None = None, of_rank: bool = True) -> None:
    """What a rank that fails leaves."""
    (logs / f"rank-{rank}.exit").write_text(f"{time + 1} {status} n{rank}\n")
    if error is not None:
        record = {"time": time, "error": error, "of_rank": of_rank}
        (logs / f"rank-{rank}.error").write_text(json.dumps(record))


def test_the_first_error_is_the_one_that_is_named(tmp_path: Path) -> None:
    leave(tmp_path, 0, 10.2, 1, "ValueError: later")
    leave(tmp_path, 1, 10.1, 1, "ValueError: earlier")
    assert first_failure(tmp_path, "rank").startswith("first to fail: rank 1 on n1: ValueError: earlier")


@pytest.mark.parametrize("status", [7, 137])
def test_a_rank_that_dies_is_named_and_not_those_that_miss_it(tmp_path: Path, status: int) -> None:
    leave(tmp_path, 0, 10.0, 1, "RuntimeError: gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    leave(tmp_path, 1, 10.5, status)
    leave(tmp_path, 2, 9.0, 143)
    text = "exit status 7" if status == 7 else "signal 9"
    assert f"rank 1 on n1: {'ended with' if status == 7 else 'killed by'} {text}" in first_failure(tmp_path, "rank")


def test_a_mistake_of_the_user_is_no_ranks(tmp_path: Path) -> None:
    leave(tmp_path, 0, 10.0, 2, "train.global_batch_size is 3", of_rank=False)
    leave(tmp_path, 1, 13.0, 2)
    assert first_failure(tmp_path, "rank").startswith("train.global_batch_size is 3 (log: ")


def test_a_job_without_any_trace_says_so(tmp_path: Path) -> None:
    assert str(tmp_path) in first_failure(tmp_path, "rank")


def report(node: str, *problems: str, torch: str = "2.13.0") -> NodeReport:
    return NodeReport(node, problems, {"torch": torch})


def test_the_node_that_differs_is_the_one_to_exclude() -> None:
    problems = compare([report("n1", torch="2.12.0"), report("n2"), report("n3")])
    assert problems == {"n1": ["torch is 2.12.0, on n2 it is 2.13.0"]}
    assert "--exclude=n1" in verdict(problems, 3)
    assert "--exclude" not in verdict({"n1": ["a"], "n2": ["a"]}, 2)
    assert compare([report("n1"), report("n2")]) == {}


RUN = RunConfig.model_validate({"model": {"name_or_path": "org/name"}, "train": {"max_steps": 9, "warmup_steps": 1}})


def test_gpus_that_were_asked_for_are_to_be_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    environment = {"ADEPT_DS_SCRATCH": str(tmp_path), "ADEPT_DS_MIN_FREE_GB": "0", "SLURM_GPUS_ON_NODE": "4"}
    (problem,) = inspect_node(RUN, environment).problems
    assert problem == "3 GPUs are visible, 4 were asked for"
    assert inspect_node(RUN, environment | {"DS_ACCELERATOR": "cpu"}).problems == ()
    (problem,) = inspect_node(RUN, environment | {"SLURM_GPUS_ON_NODE": "3", "LOCAL_WORLD_SIZE": "4"}).problems
    assert "--gpus-per-node" in problem


class Script:
    """A run with what its batch script calls, of a job on n1."""

    def __init__(self, folder: Path, job: str = "7", restarts: int = 0) -> None:
        self.run_dir = folder / "run"
        self.config = write_config(folder / "run.json", self.run_dir)
        self.environment = {"SLURM_JOB_ID": job, "SLURM_NTASKS": "2", "SLURM_GPUS_ON_NODE": "2"}
        self.environment |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}

    def call(self, *arguments: str | Path, queue: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "ADEPT_DS_"))}
        return subprocess.run(
            [sys.executable, "-P", "-m", "adept_ds.slurm.tries", *map(str, arguments)],
            env={**inherited, "PYTHONPATH": str(REPOSITORY), **self.environment, **variables},
            input=queue,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def begin(self, queue: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        return self.call("begin", "--nodes", "n1", "--", self.config, queue=queue, **variables)

    def end(self, status: int = 0, facts: str = "", **flags: int | str) -> subprocess.CompletedProcess[str]:
        values = {"warned": 0, "preempted": 0, "cancelled": 0, "lost": "", **flags}
        words = [str(word) for name, value in values.items() for word in (f"--{name}", value)]
        words += ["--part", "rank", "--status", str(status), "--facts", facts]
        return self.call("end", "--run_dir", self.run_dir, *words)

    def ended(self) -> list[tuple[int, str | None, bool | None]]:
        return [(one.number, one.ended_by, one.requeued) for one in read_history(self.run_dir)]


def test_another_users_job_in_the_run_folder_is_named(tmp_path: Path) -> None:
    assert Script(tmp_path).begin().returncode == 0
    second = Script(tmp_path, "8").begin(queue="7 alice\n8 bob\n")
    assert second.returncode == 2
    assert f"job 7 is training in {tmp_path / 'run'} now, submitted by alice" in second.stderr
    unknown = Script(tmp_path, "8").begin(queue="")
    assert unknown.returncode == 2
    assert "SLURM does not say whether job 7 is still training" in unknown.stderr
    # Once the first is gone from the queue, whatever ended it.
    assert Script(tmp_path, "8").begin(queue="8 bob\n").returncode == 0
    assert Script(tmp_path).ended() == [(0, "killed", False), (0, None, None)]


def test_a_try_waits_for_the_lock_of_an_older_tries_rank_and_says_whose_it_is(tmp_path: Path) -> None:
    script = Script(tmp_path)
    script.run_dir.mkdir()
    with (script.run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 5 of alice on n9\n")
        lock.flush()
        refused = script.begin(ADEPT_DS_LOCK_SECONDS="0.1")
        assert refused.returncode == 2
        assert "is in use still: process 5 of alice on n9; waiting for its end, 0.1 s at most" in refused.stderr
        assert f"somebody trains in {script.run_dir} now: process 5 of alice on n9" in refused.stderr
        assert read_history(script.run_dir) == []
        assert (script.run_dir / "slurm" / "try").read_text() == "7.0\n"  # by which the rank knows that it is to stop
    assert script.begin(ADEPT_DS_LOCK_SECONDS="0.1").returncode == 0


def test_a_node_that_hangs_is_a_node_failure_and_the_older_script_leaves_the_newer_line_alone(tmp_path: Path) -> None:
    first, second = Script(tmp_path), Script(tmp_path, restarts=1)
    first.begin()
    # SLURM has started the job anew and the script of the first try, which no signal has reached, sees its step end.
    ended = first.end(facts="JobId=7 Restarts=1 JobState=PENDING")
    assert ended.returncode not in (0, REQUEUE)
    assert first.ended() == [(0, "node failure", True)]
    second.begin()
    again = first.end(facts="JobId=7 Restarts=1 JobState=RUNNING")
    assert again.returncode not in (0, REQUEUE)
    assert "try 1, has" in again.stderr
    assert second.ended() == [(0, "node failure", True), (1, None, None)]


def test_ranks_that_were_stopped_without_their_job_end_it_in_failure(tmp_path: Path) -> None:
    script = Script(tmp_path)
    script.begin()
    (script.run_dir / "status.json").write_text('{"state": "interrupted", "step": 5, "signal": "SIGTERM"}')
    ended = script.end()
    assert ended.returncode == 1  # or what waits for the job would start
    assert script.ended() == [(0, "interrupted", False)]
    assert "a signal reached the ranks and not the job (SIGTERM)" in ended.stderr
    assert "submit it again to go on" in ended.stderr


def test_a_refused_requeue_is_recorded_as_refused(tmp_path: Path) -> None:
    script = Script(tmp_path)
    script.begin()
    (script.run_dir / "status.json").write_text('{"state": "interrupted", "step": 5}')
    assert script.end(warned=1).returncode == REQUEUE
    assert script.ended() == [(0, "time limit", True)]
    said = script.call("refused", "--run_dir", script.run_dir, "--message", "presently disabled").stderr
    assert script.ended() == [(0, "time limit", False)]
    assert "SLURM refused to requeue the job (presently disabled)" in said
    assert "submit it again to go on" in said


def test_tasks_that_never_began_are_tried_again_and_a_bad_rank_is_not(tmp_path: Path) -> None:
    script = Script(tmp_path)
    script.begin()
    logs = script.run_dir / "slurm" / "ranks" / "7-0"
    assert script.end(status=1).returncode == REQUEUE
    assert script.ended() == [(0, "launch failure", True)]
    (logs / "rank-0.log").touch()
    leave(logs, 0, 10.0, 143)  # ended by SLURM, since the other one was not started
    assert "started 1 of 2 tasks" in (never_started(logs, "rank", 2) or "")
    leave(logs, 0, 10.0, 1)
    assert never_started(logs, "rank", 2) is None
    leave(logs, 0, 10.0, 143)
    (logs / "rank-1.log").touch()
    assert never_started(logs, "rank", 2) is None


def test_an_evaluation_that_never_began_is_tried_again_a_few_times(tmp_path: Path) -> None:
    for restarts, status in ((0, REQUEUE), (1, REQUEUE), (2, 1)):
        done = Script(tmp_path, restarts=restarts).call("failure", tmp_path / "logs", "2")
        assert (done.returncode, "SLURM started 0 of 2 tasks" in done.stderr) == (status, True)
    (tmp_path / "logs").mkdir()
    for rank in (0, 1):
        (tmp_path / "logs" / f"rank-{rank}.log").touch()
    leave(tmp_path / "logs", 1, 10.0, 7)
    done = Script(tmp_path).call("failure", tmp_path / "logs", "2")
    assert (done.returncode, "ended with exit status 7" in done.stderr) == (1, True)


def test_a_damaged_checkpoint_is_none_to_start_from(tmp_path: Path) -> None:
    script = Script(tmp_path)
    for step in (5, 10):
        folder = script.run_dir / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        for name in (STATE_NAME, RNG_NAME):
            (folder / name).write_text("{}")
        proofs = {name: file_proof(folder, name) for name in (STATE_NAME, RNG_NAME)}
        (folder / MANIFEST).write_text(json.dumps(proofs))
    (script.run_dir / "checkpoints" / "step-notes.txt").touch()
    assert "from step 10" in script.begin().stderr
    (folder / "state.json").write_text("")
    assert "from step 5" in Script(tmp_path, "8").begin(queue="8 me\n").stderr
    assert [one.to_step for one in read_history(script.run_dir)] == [5, None]


def test_a_try_that_was_killed_ended_when_it_was_last_heard_of(tmp_path: Path) -> None:
    script = Script(tmp_path)
    script.begin()
    (tries,) = read_history(script.run_dir)
    long_ago = {**json.loads((script.run_dir / "history.jsonl").read_text()), "started": "2026-01-01T00:00:00+00:00"}
    (script.run_dir / "history.jsonl").write_text(json.dumps(long_ago) + "\n")
    log = script.run_dir / "slurm" / "ranks" / "7-0" / "rank-0.log"
    log.touch()
    os.utime(log, (time.time() - 3600, time.time() - 3600))
    Script(tmp_path, "8").begin(queue="8 me\n")
    first, _ = read_history(script.run_dir)
    assert first.ended is not None
    assert datetime.fromisoformat(first.ended).timestamp() == pytest.approx(time.time() - 3600, abs=60)
    assert tries.gpus == 2
