"""Real ZeRO-3 training as SLURM jobs on two nodes: against other launchers, and against itself after interruptions."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from adept_ds.storage.checkpoint import load_checkpoint
from adept_ds.storage.run_folder import CHECKPOINTS_NAME, list_checkpoints
from tests.conftest import Launch, losses, run_settings
from tests.ranks import free_port

from .conftest import REPOSITORY, Cluster, Run, root_with

pytestmark = [pytest.mark.slurm, pytest.mark.root, pytest.mark.slow]
TRAIN = "launchers/train.py"
STEPS = 40


@pytest.fixture(scope="module")
def settings(tiny_llama: Path) -> dict[str, Any]:
    """Steps enough for four interruptions; checkpoints of the schedule are rare."""
    return run_settings(tiny_llama, Path("unused"), max_steps=STEPS, save_every=20, keep_checkpoints=2)


@dataclass(frozen=True)
class Uninterrupted:
    """The run that all others are compared with."""

    run: Run
    job: dict[str, str]
    peers: str
    """Addresses that n2's connections to the rendezvous port went to."""

    @property
    def losses(self) -> list[float]:
        return losses(self.run.run_dir)


@pytest.fixture(scope="module")
def uninterrupted(
    whole_cluster: Cluster, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Uninterrupted:
    """A run on a rank of each node, from its beginning to its end, with the node check ahead of it."""
    run = Run(whole_cluster, tmp_path_factory.mktemp("whole"), settings)
    job = run.submit(ADEPT_DS_NODE_CHECK="1")
    run.wait_for_step(1)
    port = 12_000 + int(job)
    peers = whole_cluster.execute("n2", "ss", "-tnH", "state", "established", "dport", f"= :{port}")
    facts = whole_cluster.wait(job)
    assert facts["JobState"] == "COMPLETED", run.last_words()
    return Uninterrupted(run, facts, peers)


def test_two_nodes_train_to_the_end_by_way_of_the_first_ones_address(uninterrupted: Uninterrupted) -> None:
    assert uninterrupted.run.status()["state"] == "finished"
    assert len(uninterrupted.losses) == STEPS
    assert uninterrupted.losses[-1] < uninterrupted.losses[0]
    assert f"{uninterrupted.run.cluster.environment['LOCAL_SLURM_SUBNET']}.11]" in uninterrupted.peers
    assert "127.0.0.1" not in uninterrupted.peers


def test_the_node_check_says_that_all_is_well(uninterrupted: Uninterrupted) -> None:
    assert "node check: n1 n2 are good, 2 ranks reach each other" in uninterrupted.run.last_words()


def test_deepspeed_and_torchrun_give_the_same_losses(
    uninterrupted: Uninterrupted,
    settings: dict[str, Any],
    launch: Launch,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    settings["logging"]["run_dir"] = str(tmp_path / "deepspeed")
    result = launch(2, TRAIN, settings)
    assert result.returncode == 0, result.stdout
    assert losses(tmp_path / "deepspeed") == uninterrupted.losses

    command = ["torchrun", "--nproc_per_node=2", f"--master_port={free_port()}", TRAIN]
    flags = ["--config", str(uninterrupted.run.config), "--logging.run_dir", str(tmp_path / "torchrun")]
    done = subprocess.run([*command, *flags], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "torchrun") == uninterrupted.losses


@pytest.fixture(scope="module")
def interrupted(whole_cluster: Cluster, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One job that is warned twice, preempted, and loses a node, with an evaluation that waits for its end."""
    cluster = whole_cluster
    run = Run(cluster, tmp_path_factory.mktemp("interrupted"), settings)
    job = run.submit()
    after = run.run_dir.with_name("evaluated")
    evaluation = cluster.sbatch(
        *(f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes", "--output=/dev/null"),
        f"--wrap=cp {run.run_dir}/status.json {after}",
    )

    def step() -> int:
        return len(losses(run.run_dir)) if (run.run_dir / "metrics.jsonl").exists() else 0

    for restarts in (0, 1):
        cluster.wait(job, "RUNNING", restarts=restarts)
        run.wait_for_step(step() + 2)
        cluster.run("scancel", "--signal=USR1", "--batch", job)
    cluster.wait(job, "RUNNING", restarts=2)
    run.wait_for_step(step() + 2)
    cluster.sbatch("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    cluster.wait(job, "RUNNING", restarts=3)
    run.wait_for_step(step() + 2)
    cluster.run(cluster.tool, "node-down", "n2")
    try:
        cluster.wait(job, "PENDING", restarts=4)
    finally:
        cluster.run(cluster.tool, "node-up", "n2")
    assert cluster.wait(job, timeout=180)["JobState"] == "COMPLETED", run.last_words()
    assert cluster.wait(evaluation)["JobState"] == "COMPLETED"
    assert json.loads(after.read_text())["state"] == "finished"
    return run


def test_warned_preempted_and_without_a_node_a_run_ends_as_if_nothing_had_been(
    interrupted: Run, uninterrupted: Uninterrupted
) -> None:
    assert losses(interrupted.run_dir) == uninterrupted.losses
    ours, theirs = interrupted.status(), uninterrupted.run.status()
    assert ours["best_value"] == theirs["best_value"]


def test_its_history_tells_each_try(interrupted: Run) -> None:
    history = interrupted.history()
    assert [line["try"] for line in history] == list(range(len(history)))
    # On a busy machine a node that has just come back may not start a rank, and SLURM is asked to try once more.
    history = [line for line in history if line["ended_by"] != "launch failure"]
    reasons = [line["ended_by"] for line in history]
    assert reasons == ["time limit", "time limit", "preempted", "node failure", "finished"]
    assert [line["requeued"] for line in history] == [True] * 4 + [False]
    assert {tuple(line["nodes"]) for line in history} == {("n1", "n2")}
    for earlier, later in pairwise(history):
        assert earlier["to_step"] == later["from_step"]
    assert history[-1]["to_step"] == STEPS
    # A warned run loses nothing, one that lost a node what it had done since its last checkpoint.
    assert all(line["from_step"] < line["to_step"] for line in history[:3])


def test_a_cancelled_run_goes_on_on_another_number_of_nodes(
    cluster: Cluster, uninterrupted: Uninterrupted, settings: dict[str, Any], tmp_path: Path
) -> None:
    run = Run(cluster, tmp_path, settings)
    job = run.submit()
    run.wait_for_step(3)
    cluster.run("scancel", job)
    assert cluster.wait(job)["JobState"] == "CANCELLED"
    assert [cluster.processes(node, str(run.config)) for node in ("n1", "n2")] == [[], []]
    assert run.history()[0]["ended_by"] == "cancelled"
    newest = list_checkpoints(run.run_dir / CHECKPOINTS_NAME)[-1]
    assert load_checkpoint(newest).state.step >= 3

    job = run.submit("--nodes=1")
    assert cluster.wait(job)["JobState"] == "COMPLETED", run.last_words()
    assert f"going on from {newest}" in run.last_words()
    assert losses(run.run_dir) == pytest.approx(uninterrupted.losses, rel=1e-5)
    assert [line["world_size"] for line in run.history()] == [2, 1]


def test_after_a_kill_within_a_save_the_checkpoint_before_it_is_taken(
    cluster: Cluster, uninterrupted: Uninterrupted, settings: dict[str, Any], tmp_path: Path
) -> None:
    root = root_with(tmp_path / "repository", "dying_train.py")
    run = Run(cluster, tmp_path, {**settings, "train": {**settings["train"], "save_every": 5}}, root)
    job = run.submit("--nodes=1")
    assert cluster.wait(job)["JobState"] == "FAILED"
    assert "killed by signal 9" in run.history()[0]["error"]

    job = run.submit("--nodes=1", SPARED="1")
    assert cluster.wait(job)["JobState"] == "COMPLETED", run.last_words()
    log = run.last_words()
    assert ".step-00000010.tmp: the save was cut short" in log
    assert "step-00000005" in log[log.index("going on from") :].splitlines()[0]
    assert losses(run.run_dir) == pytest.approx(uninterrupted.losses, rel=1e-5)


def test_an_evaluation_decodes_on_both_nodes_and_scores_and_a_report_follows(
    cluster: Cluster, uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    run = uninterrupted.run
    out = run.run_dir / "eval" / "tuned"
    scripts = REPOSITORY / "launchers" / "slurm"
    small = ["--eval.max_examples", "3", "--eval.generation.max_new_tokens", "4", "--eval.sandbox.isolation", "none"]
    job = cluster.sbatch(
        *(*Run.HEADERS, "--output=eval.log", scripts / "eval_mbpp.sbatch", run.config),
        *("--adapter", run.run_dir / "best", "--out", out, *small),
        cwd=tmp_path,
    )
    report = cluster.sbatch(
        *(f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes", "--output=report.log"),
        *(scripts / "report.sbatch", run.run_dir),
        cwd=tmp_path,
    )
    assert cluster.wait(job)["JobState"] == "COMPLETED", (tmp_path / "eval.log").read_text()
    assert json.loads((out / "summary.json").read_text())["problems"] == 3
    assert "rank-1.log" in os.listdir(tmp_path / "eval.ranks")
    assert cluster.wait(report)["JobState"] == "COMPLETED", (tmp_path / "report.log").read_text()
    assert (run.run_dir / "report.html").is_file()
