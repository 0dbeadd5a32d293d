"""Warnings, requeues, cancelling and caps of a job, on the local SLURM with the stub trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest

from .conftest import Cluster, StubRun, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.root]
SLOWLY = "0.2"
"""Seconds of a step, for tests that want the run to be there still."""


def warn(cluster: Cluster, job: str) -> None:
    """As SLURM does ahead of the time limit: the batch script alone gets the signal."""
    cluster.run("scancel", "--signal=USR1", "--batch", job)


@pytest.fixture(scope="module")
def at_their_limit(
    whole_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[StubRun, str]]]:
    """Jobs that are warned 40 s after their start, or up to a minute later by SLURM, whose signals may be so early.
    Other tests need not wait for them; those that preempt what runs stand after the one that does."""
    jobs = {}
    for warned_by, signal, seconds in (("SLURM", "USR1@80", "20"), ("the job itself", "CONT@60", "280")):
        run = StubRun(whole_cluster, tmp_path_factory.mktemp("limit"))
        limit = ("--time=3", f"--signal=B:{signal}")
        job = run.submit(*limit, STUB_STEP_SECONDS="8", ADEPT_DS_WARNING_SECONDS=seconds)
        whole_cluster.jobs.remove(job)
        jobs[warned_by] = run, job
    yield jobs
    whole_cluster.jobs.extend(job for _, job in jobs.values())
    whole_cluster.cancel_all()


@pytest.mark.usefixtures("at_their_limit")
def test_a_run_ends_and_its_history_has_one_line(cluster: Cluster, stub: StubRun) -> None:
    job = stub.submit()
    assert cluster.wait(job)["JobState"] == "COMPLETED", stub.last_words()
    wait_for(lambda: not cluster.processes("n1", str(stub.config)), 10, lambda: "processes of the job are left")
    (line,) = stub.history()
    assert line["started"] <= line["ended"]
    del line["started"], line["ended"]
    assert line == {
        "job": job,
        "array_task": None,
        "try": 0,
        "nodes": ["n1", "n2"],
        "world_size": 2,
        "from_step": 0,
        "to_step": 20,
        "ended_by": "finished",
        "requeued": False,
        "error": None,
        "gpus": 2,
    }


def test_a_finished_run_is_left_alone(cluster: Cluster, stub: StubRun) -> None:
    cluster.wait(stub.submit(STUB_STEP_SECONDS="0"))
    again = cluster.wait(stub.submit())
    assert again["JobState"] == "COMPLETED"
    assert "is finished (20 steps); nothing to do" in stub.last_words()
    assert len(stub.history()) == 1


def test_a_warned_run_saves_requeues_itself_and_goes_on_in_the_same_log_up_to_the_restart_cap(
    cluster: Cluster, stub: StubRun
) -> None:
    job = stub.submit(STUB_STEP_SECONDS=SLOWLY, ADEPT_DS_MAX_RESTARTS="1")
    for restarts, step in ((0, 2), (1, 8)):
        cluster.wait(job, "RUNNING", restarts=restarts)
        stub.wait_for_step(step)
        warn(cluster, job)
    assert cluster.wait(job)["JobState"] == "FAILED"
    first, second = stub.history()
    assert (first["try"], first["ended_by"], first["requeued"]) == (0, "time limit", True)
    assert (second["try"], second["ended_by"], second["requeued"]) == (1, "restart cap", False)
    assert 0 == first["from_step"] < first["to_step"] == second["from_step"] < second["to_step"] < 20
    log = stub.last_words()
    assert "try 0, on n1 n2" in log
    assert "try 1, on n1 n2" in log
    assert "does not go on: it was restarted 1 times" in log


def test_a_warning_while_the_ranks_import_is_not_lost(cluster: Cluster, stub: StubRun) -> None:
    job = stub.submit(STUB_IMPORT_SECONDS="2", STUB_STEP_SECONDS=SLOWLY)
    ranks = f"adept_ds train --resume auto --config {stub.config}"  # other jobs have ranks, too
    wait_for(lambda: all(cluster.processes(node, ranks) for node in ("n1", "n2")), 30, stub.last_words)
    warn(cluster, job)
    cluster.wait(job, "PENDING", "RUNNING", "COMPLETED", restarts=1)
    line = stub.history()[0]
    assert (line["ended_by"], line["requeued"]) == ("time limit", True)
    assert line["to_step"] < 20  # none at all, where the handlers are there just before the warning comes again


def test_a_second_warning_does_not_kill_ranks_that_have_saved(cluster: Cluster, stub: StubRun) -> None:
    job = stub.submit(STUB_STEP_SECONDS="1")
    stub.wait_for_step(1)
    for _ in range(10):
        warn(cluster, job)
    cluster.wait(job, "PENDING", restarts=1)
    line = stub.history()[0]
    assert (line["ended_by"], line["requeued"], line["error"]) == ("time limit", True, None)
    assert line["to_step"] >= 1


def test_scontrol_requeue_goes_on_from_the_last_step(cluster: Cluster, stub: StubRun) -> None:
    job = stub.submit(STUB_STEP_SECONDS=SLOWLY)
    stub.wait_for_step(6)
    cluster.run("scontrol", "requeue", job)
    assert cluster.wait(job, restarts=1)["JobState"] == "COMPLETED", stub.last_words()
    first, second = stub.history()
    assert (first["ended_by"], second["ended_by"]) == ("requeued", "finished")
    assert first["to_step"] == second["from_step"] >= 5


def test_a_cancelled_job_is_gone_and_stays_so(cluster: Cluster, stub: StubRun) -> None:
    job = stub.submit(STUB_STEP_SECONDS=SLOWLY)
    stub.wait_for_step(2)
    cluster.run("scancel", job)
    assert cluster.wait(job)["JobState"] == "CANCELLED"
    (line,) = stub.history()
    assert (line["ended_by"], line["requeued"]) == ("cancelled", False)
    for node in ("n1", "n2"):
        assert cluster.processes(node, str(stub.config)) == []
    assert int(cluster.job(job)["Restarts"]) == 0


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("raise", "RuntimeError: the stub raises"),
        ("exit7", "ended with exit status 7"),
        ("kill", "killed by signal 9"),
    ],
)
def test_a_rank_that_fails_ends_the_job_and_is_named_last_in_its_log(
    what: str, said: str, cluster: Cluster, stub: StubRun
) -> None:
    job = stub.submit(STUB_FAIL=f"1 {what} 4", STUB_STEP_SECONDS=SLOWLY)
    stub.wait_for_step(4)
    assert cluster.wait(job, timeout=15)["JobState"] == "FAILED"
    last = stub.last_words().splitlines()[-1]
    assert f"first to fail: rank 1 on n2: {said}" in last
    log = stub.run_dir / "slurm" / "ranks" / f"{job}-0" / "rank-1.log"
    assert f"(log: {log})" in last
    assert '"RANK": "1"' in log.read_text()
    (line,) = stub.history()
    assert (line["ended_by"], line["requeued"]) == ("failed", False)
    assert said in line["error"]


def test_a_run_that_gains_no_step_stops_with_a_message(cluster: Cluster, stub: StubRun) -> None:
    job = stub.submit(STUB_STEP_SECONDS=SLOWLY, STUB_NO_PROGRESS="1")
    for restarts in (0, 1):
        cluster.wait(job, "RUNNING", restarts=restarts)
        wait_for(lambda restarts=restarts: len(stub.seen(restarts)) == 2, 30, stub.last_words)
        warn(cluster, job)
    assert cluster.wait(job)["JobState"] == "FAILED"
    assert "gained no step" in stub.last_words()
    assert [line["ended_by"] for line in stub.history()] == ["time limit", "no progress"]


def test_a_run_that_is_to_stop_saves_and_does_not_come_back(cluster: Cluster, stub: StubRun) -> None:
    job = stub.submit(STUB_STEP_SECONDS=SLOWLY)
    stub.wait_for_step(2)
    (stub.run_dir / "stop").touch()
    warn(cluster, job)
    assert cluster.wait(job)["JobState"] == "COMPLETED"
    (line,) = stub.history()
    assert (line["ended_by"], line["requeued"]) == ("stopped", False)
    assert stub.status()["state"] == "interrupted"

    job = stub.submit()  # the marker is no obstacle to a new job
    assert cluster.wait(job)["JobState"] == "COMPLETED"
    assert stub.history()[-1]["ended_by"] == "finished"


def test_two_jobs_on_the_same_nodes_keep_apart(cluster: Cluster, tmp_path: Path) -> None:
    runs = [StubRun(cluster, tmp_path, name) for name in ("one", "two")]
    jobs = [run.submit(STUB_STEP_SECONDS=SLOWLY) for run in runs]
    for job in jobs:
        cluster.wait(job, "RUNNING")
    for job in jobs:
        assert cluster.wait(job)["JobState"] == "COMPLETED"
    ports = [{rank["MASTER_PORT"] for rank in run.seen()} for run in runs]
    assert len(ports[0]) == len(ports[1]) == 1
    assert ports[0] != ports[1]


def test_a_second_job_in_the_same_run_folder_is_refused(cluster: Cluster, stub: StubRun) -> None:
    first = stub.submit(STUB_STEP_SECONDS=SLOWLY)
    stub.wait_for_step(1)
    second = stub.submit()
    assert cluster.wait(second)["JobState"] == "FAILED"
    assert f"job {first} is training in {stub.run_dir} now" in stub.last_words()
    assert cluster.wait(first)["JobState"] == "COMPLETED"
    assert [line["job"] for line in stub.history()] == [first]


def test_an_array_trains_a_config_for_each_line(cluster: Cluster, tmp_path: Path) -> None:
    runs = [StubRun(cluster, tmp_path, name) for name in ("zero", "one")]
    configs = tmp_path / "configs.txt"
    configs.write_text("".join(f"{run.config}\n" for run in runs))
    job = cluster.sbatch(
        *("--array=0-1%1", "--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0"),
        f"--output={tmp_path}/%a.log",
        runs[0].root / "launchers" / "slurm" / "train.sbatch",
        configs,
        ADEPT_DS_NODE_CHECK="0",
        ADEPT_DS_ROOT=str(runs[0].root),
        STUB_STEP_SECONDS=SLOWLY,
    )
    runs[1].wait_for_step(1)
    assert runs[0].status()["state"] == "finished"  # one at a time
    cluster.run("scancel", "--signal=USR1", "--batch", f"{job}_1")
    wait_for(lambda: runs[1].status()["state"] == "finished", 60, (tmp_path / "1.log").read_text)
    assert [(line["job"], line["array_task"], line["try"]) for line in runs[0].history()] == [(job, 0, 0)]
    # Its own warning requeued the second member alone.
    assert [(line["array_task"], line["try"]) for line in runs[1].history()] == [(1, 0), (1, 1)]


def seen_by_rank(seen: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {int(rank["RANK"]): rank for rank in seen}


def test_ranks_follow_from_slurm(cluster: Cluster, stub: StubRun) -> None:
    site = {"SITE_VARIABLE": "of the site", "NCCL_SOCKET_IFNAME": "eth0"}
    cluster.wait(stub.submit("--ntasks-per-node=2", STUB_STEP_SECONDS="0", **site))
    ranks = seen_by_rank(stub.seen())
    assert sorted(ranks) == [0, 1, 2, 3]
    for number, rank in ranks.items():
        assert (rank["WORLD_SIZE"], rank["LOCAL_WORLD_SIZE"], rank["LOCAL_RANK"]) == ("4", "2", str(number % 2))
        assert rank["MASTER_ADDR"] == "n1"
        assert rank["SLURMD_NODENAME"] == f"n{1 + number // 2}"
        assert (rank["SITE_VARIABLE"], rank["NCCL_SOCKET_IFNAME"]) == ("of the site", "eth0")
        for cache in ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR"):
            assert rank[cache].startswith("/mnt/scratch/")


def test_folders_with_spaces_relative_paths_and_another_working_directory(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "a folder with spaces"
    folder.mkdir()
    run = StubRun(cluster, folder, "my run")
    settings = json.loads(run.config.read_text())
    settings["logging"]["run_dir"] = "my run"
    run.config.write_text(json.dumps(settings))
    script = os.path.relpath(run.root / "launchers" / "slurm" / "train.sbatch", folder)
    job = cluster.sbatch(
        *(*run.HEADERS, script, "my run.json", "--train.max_steps", "7"), cwd=folder, ADEPT_DS_NODE_CHECK="0"
    )
    log = folder / f"slurm-{job}.log"  # nowhere else, when nothing else is asked for
    assert cluster.wait(job)["JobState"] == "COMPLETED", log.read_text()
    assert run.status()["step"] == 7
    assert (folder / "my run" / "slurm" / "ranks" / f"{job}-0" / "rank-0.log").is_file()


def test_sbatch_values_can_be_given_on_its_command_line(cluster: Cluster, stub: StubRun) -> None:
    job = stub.submit(
        *("--job-name=mine", "--nodes=1", "--ntasks-per-node=3", "--cpus-per-task=2", "--gpus-per-node=3"),
        *("--time=7", "--signal=B:USR1@30", "--no-requeue", f"--output={stub.log}"),
        STUB_STEP_SECONDS="0",
    )
    facts = cluster.wait(job)
    assert facts["JobState"] == "COMPLETED", stub.last_words()
    assert (facts["JobName"], facts["NumNodes"], facts["TimeLimit"]) == ("mine", "1", "00:07:00")
    assert (facts["Requeue"], facts["NumTasks"], facts["TresPerNode"]) == ("0", "3", "gres:gpu:3")
    assert {rank["LOCAL_WORLD_SIZE"] for rank in stub.seen()} == {"3"}
    assert {rank["SLURM_CPUS_PER_TASK"] for rank in stub.seen()} == {"2"}


def test_production_headers_are_accepted(cluster: Cluster, stub: StubRun) -> None:
    headers = ("--gpus-per-node=8", "--ntasks-per-node=8", "--cpus-per-task=12", "--exclusive")
    job = stub.submit(*headers, STUB_STEP_SECONDS="0")
    assert cluster.wait(job)["JobState"] == "COMPLETED", stub.last_words()
    ranks = seen_by_rank(stub.seen())
    assert len(ranks) == 16
    assert ranks[15]["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"
    assert ranks[15]["LOCAL_RANK"] == "7"


def test_another_user_than_root_trains(cluster: Cluster) -> None:
    python = interpreter_for_others()
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are for its user alone
        Path(folder).chmod(0o777)
        run = StubRun(cluster, Path(folder))
        job = run.submit(user="nobody", STUB_STEP_SECONDS="0", ADEPT_DS_SCRATCH="", **python)
        assert cluster.wait(job)["JobState"] == "COMPLETED", run.last_words()
        assert (run.run_dir / "status.json").owner() == "nobody"
        assert {rank["TRITON_CACHE_DIR"] for rank in run.seen()} == {"/tmp/adept_ds.nobody/triton"}


def interpreter_for_others() -> dict[str, str]:
    """Variables for an interpreter that others than root can run; root's own may lie in its home."""
    packages = os.path.dirname(os.path.dirname(pydantic.__file__))
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for python, path in ((sys.executable, ""), (f"/usr/bin/{version}", packages)):
        command = ["runuser", "-u", "nobody", "--", "env", f"PYTHONPATH={path}", python, "-c", "import pydantic"]
        if subprocess.run(command, capture_output=True).returncode == 0:
            return {"ADEPT_DS_PYTHON": python, "PYTHONPATH": path}
    pytest.skip(f"nobody can run neither {sys.executable} nor /usr/bin/{version} with the project's packages")


def test_a_config_with_a_mistake_costs_a_second(cluster: Cluster, stub: StubRun) -> None:
    job = stub.submit(arguments=("--train.max_step", "3"))
    assert cluster.wait(job)["JobState"] == "FAILED"
    log = stub.last_words()
    assert "train.max_step" in log
    assert "did you mean" in log
    assert "Traceback" not in log
    assert not (stub.run_dir / "history.jsonl").exists()


@pytest.mark.parametrize("warned_by", ["SLURM", "the job itself"])
def test_the_time_limit_warns_in_time(
    cluster: Cluster, at_their_limit: dict[str, tuple[StubRun, str]], warned_by: str
) -> None:
    run, job = at_their_limit[warned_by]
    cluster.jobs.append(job)
    cluster.wait(job, "PENDING", "RUNNING", "COMPLETED", restarts=1, timeout=150)
    assert run.history()[0]["ended_by"] == "time limit"
    assert run.history()[0]["to_step"] > 0


def test_preemption_that_is_announced_by_term_is_one_too(cluster: Cluster, stub: StubRun) -> None:
    job = stub.submit("--signal=B:TERM@60", STUB_STEP_SECONDS=SLOWLY)
    stub.wait_for_step(2)
    cluster.sbatch("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    assert cluster.wait(job)["JobState"] == "COMPLETED", stub.last_words()
    assert [line["ended_by"] for line in stub.history()] == ["preempted", "finished"]


def test_a_run_that_cannot_save_before_it_is_preempted_goes_on_from_its_last_checkpoint(
    cluster: Cluster, stub: StubRun
) -> None:
    job = stub.submit("--time=5", STUB_FAIL="0 hang 7", STUB_STEP_SECONDS="0.1")
    stub.wait_for_step(6)
    # SLURM warns a job once: this one gets no signal when it is preempted.
    wait_for(lambda: "limit of 300 s is early" in stub.last_words(), 90, stub.last_words)
    cluster.sbatch("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    cluster.wait(job, "PENDING", "RUNNING", "COMPLETED", restarts=1)
    line = stub.history()[0]
    assert (line["ended_by"], line["requeued"], line["to_step"]) == ("preempted", True, 5)
