"""Faults of a cluster and of its users, on the local SLURM with the stub trainer."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

import pytest

from .conftest import Cluster, StubRun, wait_for
from .test_job_signals import SLOWLY, warn

pytestmark = [pytest.mark.slurm, pytest.mark.root]


def test_rank_variables_of_the_login_shell_do_not_reach_the_ranks(cluster: Cluster, stub: StubRun) -> None:
    left_over = {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "8"}
    left_over |= {"MASTER_ADDR": "elsewhere", "MASTER_PORT": "29500", "PMI_RANK": "3", "SLURM_STEP_NUM_TASKS": "4"}
    job = stub.submit(STUB_STEP_SECONDS="0", **left_over)
    assert cluster.wait(job)["JobState"] == "COMPLETED", stub.last_words()
    seen = stub.seen()
    assert [rank["RANK"] for rank in seen] == ["0", "1"]
    for rank in seen:
        assert (rank["WORLD_SIZE"], rank["LOCAL_WORLD_SIZE"], rank["MASTER_ADDR"]) == ("2", "1", "n1")
        assert rank["MASTER_PORT"] != "29500"
        assert "PMI_RANK" not in rank or rank["PMI_RANK"] != "3"


def test_what_waits_for_a_run_does_not_start_where_its_ranks_alone_were_stopped(
    cluster: Cluster, stub: StubRun, tmp_path: Path
) -> None:
    job = stub.submit(STUB_STEP_SECONDS=SLOWLY)
    after = cluster.sbatch(
        f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes", "--output=/dev/null", f"--wrap=touch {tmp_path}/ran"
    )
    stub.wait_for_step(2)
    cluster.run("scancel", "--signal=TERM", job)  # not to the batch script
    assert cluster.wait(job)["JobState"] == "FAILED"
    assert cluster.wait(after)["JobState"] == "CANCELLED"
    assert not (tmp_path / "ran").exists()
    (line,) = stub.history()
    assert (line["ended_by"], line["requeued"]) == ("interrupted", False)
    assert stub.status()["state"] == "interrupted"


def test_a_requeue_that_slurm_refuses_is_told(cluster: Cluster, stub: StubRun) -> None:
    job = stub.submit("--no-requeue", STUB_STEP_SECONDS=SLOWLY)
    stub.wait_for_step(2)
    warn(cluster, job)
    assert cluster.wait(job)["JobState"] == "FAILED"
    (line,) = stub.history()
    assert (line["ended_by"], line["requeued"]) == ("time limit", False)
    assert line["to_step"] >= 2
    assert "SLURM refused to requeue the job" in stub.last_words()
    assert "submit it again to go on" in stub.last_words().splitlines()[-1]


def test_a_short_limit_by_hand_does_not_warn_at_the_start(cluster: Cluster, stub: StubRun) -> None:
    job = stub.submit("--time=1", STUB_STEP_SECONDS="3")
    cluster.wait(job, "PENDING", "RUNNING", restarts=1)
    assert "is early; the run is told 15 s before it" in stub.last_words()
    (first, *_) = stub.history()
    assert (first["ended_by"], first["requeued"]) == ("time limit", True)
    assert first["to_step"] >= 8


def test_a_step_that_slurm_cannot_start_is_tried_again(cluster: Cluster, stub: StubRun, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "srun"
    program.parent.mkdir()
    program.write_text(
        "#!/bin/bash\n"
        f'if [[ "$*" == *"adept_ds train"* ]] && mkdir "{tmp_path}/once" 2>/dev/null; then\n'
        "    echo 'srun: error: Unable to create step for job: Job credential expired' >&2; exit 1\n"
        "fi\n"
        f'exec {shutil.which("srun")} "$@"\n'
    )
    program.chmod(0o755)
    job = stub.submit(PATH=f"{program.parent}:{cluster.environment['PATH']}")
    assert cluster.wait(job, restarts=1)["JobState"] == "COMPLETED", stub.last_words()
    assert [line["ended_by"] for line in stub.history()] == ["launch failure", "finished"]
    assert "SLURM started 0 of 2 tasks" in stub.last_words()


def test_a_try_waits_for_ranks_that_still_hold_the_folder(cluster: Cluster, stub: StubRun) -> None:
    stub.run_dir.mkdir()
    with (stub.run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        job = stub.submit()
        wait_for(lambda: "waiting for its end" in stub.last_words(), 30, stub.last_words)
        assert cluster.job(job)["JobState"] == "RUNNING"
    assert cluster.wait(job)["JobState"] == "COMPLETED", stub.last_words()
    assert [line["ended_by"] for line in stub.history()] == ["finished"]


@pytest.mark.slow
def test_a_node_that_hangs_is_a_node_failure(cluster: Cluster, stub: StubRun) -> None:
    job = stub.submit("--nodes=1", "--ntasks-per-node=2", arguments=("--train.max_steps", "200"), STUB_STEP_SECONDS="1")
    stub.wait_for_step(1)
    node = cluster.job(job)["BatchHost"]
    (daemon,) = cluster.processes(node, "slurmd -D")
    cluster.execute(node, "kill", "-STOP", str(daemon))
    try:
        cluster.wait(job, "RUNNING", "COMPLETED", restarts=1, timeout=180)
        wait_for(lambda: len(stub.history()) == 2, 60, stub.last_words)
    finally:
        cluster.execute(node, "kill", "-CONT", str(daemon))
    first, second = stub.history()
    assert (first["ended_by"], first["requeued"]) == ("node failure", True)
    assert (second["try"], second["nodes"]) == (1, ["n2" if node == "n1" else "n1"])
    cluster.cancel_all()
    idle = ("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N")
    wait_for(lambda: len(cluster.run(*idle).split()) == 2, 60, lambda: cluster.run("sinfo"))
