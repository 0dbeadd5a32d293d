"""What the jobs decide by: ranks, histories, nodes' reports, failures. No SLURM is needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adept_ds.config.run import RunConfig
from adept_ds.errors import UserError
from adept_ds.rank_environment import expand_counts, first_host, take_slurm_ranks
from adept_ds.slurm.node_check import NodeReport, compare, inspect_node, verdict
from adept_ds.slurm.tries import Try, config_of_task, first_failure, read_history, why_no_more, write_history

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
