"""`launchers/submit.py` on the local SLURM: chains, arrays, stopping, doing things twice."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from adept_ds.slurm.tries import read_history

from .conftest import REPOSITORY, Cluster, stub_root, wait_for, write_config

pytestmark = [pytest.mark.slurm, pytest.mark.root]

SUBMIT = REPOSITORY / "launchers" / "submit.py"
PACKAGES = f"{REPOSITORY}:{Path(pytest.__file__).resolve().parents[1]}"
SMALL = ("--nodes", "1", "--gpus-per-node", "2", "--cpus-per-task", "1", "--score-cpus", "1")
"""Ranks of the stub, two on one node."""


class Submitter:
    """submit.py in a folder, with the stub in the trainer's place."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.root = stub_root(folder / "repository")

    def call(
        self, *arguments: str | Path, user: int | None = None, interpreter: str = sys.executable, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        environment = {**self.cluster.environment, "ADEPT_DS_ROOT": str(self.root), "ADEPT_DS_NODE_CHECK": "0"}
        done = subprocess.run(
            [interpreter, SUBMIT, *map(str, arguments)],
            cwd=self.folder,
            env={**environment, "PWD": str(self.folder), **variables},
            user=user,
            group=user,
            extra_groups=None if user is None else [],
            capture_output=True,
            text=True,
            timeout=120,
        )
        self.cluster.jobs.extend(self.ids(done.stdout).values())
        return done

    def submit(self, *arguments: str | Path, **variables: str) -> dict[str, str]:
        """Submit; return ids by kind."""
        done = self.call(*arguments, **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        return self.ids(done.stdout)

    @staticmethod
    def ids(output: str) -> dict[str, str]:
        line = next((line for line in output.splitlines() if line.startswith("submitted")), "")
        return dict(re.findall(r"(\w+) (\d+)", line))

    def status(self, run: str) -> list[dict[str, Any]]:
        """The rows of status.py."""
        done = subprocess.run(
            [sys.executable, REPOSITORY / "launchers" / "status.py", run, "--json"],
            cwd=self.folder,
            env=self.cluster.environment,
            capture_output=True,
            text=True,
        )
        rows = json.loads(done.stdout)
        assert done.returncode == any(row["state"] == "failed" for row in rows), done.stderr
        return rows

    def log(self, run: str, job: str) -> str:
        path = self.folder / run / "slurm" / f"{job}.log"
        return path.read_text() if path.exists() else "no log"


@pytest.fixture
def submitter(cluster: Cluster, tmp_path: Path) -> Submitter:
    """In a folder with a space in its name."""
    folder = tmp_path / "my work"
    folder.mkdir()
    return Submitter(cluster, folder)


def wait_for_step(run_dir: Path, step: int) -> None:
    path = run_dir / "step"
    wait_for(lambda: path.exists() and int(path.read_text() or 0) >= step, 60, lambda: f"no step {step} in {run_dir}")


def fake_evaluation(root: Path, fail: str = "") -> None:
    """Put modules in the places of the evaluation's that note when they ran, and what the training's state was."""
    for name in ("mbpp", "score", "report"):
        path = root / "adept_ds" / "cli" / f"{name}.py"
        path.unlink()
        path.write_text(
            "import json, os, pathlib\n"
            "def main(arguments):\n"
            "    status = json.loads(pathlib.Path('runs/x y/status.json').read_text())\n"
            f"    line = json.dumps(['{name}', arguments, status['state']])\n"
            "    if os.environ.get('SLURM_PROCID', '0') == '0':\n"
            "        open('order', 'a').write(line + '\\n')\n"
            f"    return {int(name == fail)}\n"
        )


def test_a_chain_runs_in_order_after_the_last_try(submitter: Submitter) -> None:
    fake_evaluation(submitter.root)
    config = write_config(submitter.folder / "c.json", Path("runs/x y"), max_steps=120)
    flags = ("train", "--config", "c.json", "--then-eval", "mbpp", *SMALL)
    shown = submitter.call(*flags, "--dry-run").stdout
    ids = submitter.submit(*flags)
    assert list(ids) == ["train", "eval", "score", "report"]
    for kind in ids:
        assert (submitter.folder / "runs" / "x y" / "slurm" / f"{kind}.sbatch").read_text() in shown

    refused = submitter.call("train", "--config", "c.json", *SMALL)
    assert refused.returncode == 2
    assert f"is in the queue already: job {ids['train']}" in refused.stderr
    config.unlink()  # the job has its own copy

    run_dir = submitter.folder / "runs" / "x y"
    wait_for_step(run_dir, 30)
    submitter.cluster.run("scancel", "--batch", "--signal=USR1", ids["train"])
    submitter.cluster.wait(ids["train"], restarts=1)
    for job in ids.values():
        assert submitter.cluster.wait(job)["JobState"] == "COMPLETED", submitter.log("runs/x y", job)
    assert [one.ended_by for one in read_history(run_dir)] == ["time limit", "finished"]
    order = [json.loads(line) for line in (submitter.folder / "order").read_text().splitlines()]
    out = "runs/x y/eval/adept"
    config_copy = str(run_dir / "slurm" / "config.json")
    assert order == [
        ["mbpp", ["--config", config_copy, "--adapter", "runs/x y/best", "--out", out, "--samples_only"], "finished"],
        ["score", [out], "finished"],
        ["report", ["runs/x y"], "finished"],
    ]
    again = submitter.call("train", "--config", config_copy, *SMALL)
    assert again.stdout == "runs/x y is finished; nothing to do\n"


@pytest.mark.parametrize("failing", ["train", "mbpp"])
def test_a_failed_parent_leaves_nothing_in_the_queue(failing: str, submitter: Submitter) -> None:
    fake_evaluation(submitter.root, failing)
    # Long enough, and without checkpoints that a late rank would start from, that it is not over before one fails.
    steps = 400 if failing == "train" else 5
    write_config(submitter.folder / "c.json", Path("runs/x y"), max_steps=steps, save_every=steps)
    stub = {"STUB_FAIL": "1 raise 3"} if failing == "train" else {}
    ids = submitter.submit("train", "--config", "c.json", "--then-eval", "mbpp", *SMALL, **stub)
    wait_for(lambda: not submitter.cluster.run("squeue", "-h"), 60, lambda: submitter.cluster.run("squeue"))
    states = {kind: submitter.cluster.job(job)["JobState"] for kind, job in ids.items()}
    ran = 1 if failing == "train" else 2
    assert list(states.values()) == [*["COMPLETED"] * (ran - 1), "FAILED", *["CANCELLED"] * (4 - ran)]


def test_a_stopped_run_saves_and_goes_on_when_it_is_submitted_again(submitter: Submitter) -> None:
    fake_evaluation(submitter.root)
    write_config(submitter.folder / "c.json", Path("runs/x y"), max_steps=400)
    flags = ("train", "--config", "c.json", *SMALL)
    ids = submitter.submit(*flags, "--then-eval", "mbpp")
    run_dir = submitter.folder / "runs" / "x y"
    wait_for_step(run_dir, 10)
    done = submitter.call("stop", "runs/x y")
    assert done.returncode == 0, done.stderr
    assert f"job {ids['train']} saves after its step and ends" in done.stdout
    assert submitter.cluster.wait(ids["train"])["Restarts"] == "0"
    assert [submitter.cluster.job(ids[kind])["JobState"] for kind in ("eval", "score", "report")] == ["CANCELLED"] * 3
    assert not submitter.cluster.run("squeue", "-h")
    (line,) = read_history(run_dir)
    assert line.ended_by == "stopped"
    step = line.to_step
    assert step is not None
    assert step >= 10
    assert submitter.call("stop", "runs/x y").returncode == 2

    job = submitter.submit(*flags, STUB_STEP_SECONDS="0.001")["train"]
    assert submitter.cluster.wait(job)["JobState"] == "COMPLETED", submitter.log("runs/x y", job)
    assert [(one.from_step, one.ended_by) for one in read_history(run_dir)] == [(0, "stopped"), (step, "finished")]
    assert not (run_dir / "stop").exists()
    shown = submitter.status("runs/x y")
    assert [(row["state"], row["job"]) for row in shown] == [("finished", job)]


def test_a_waiting_run_that_is_stopped_is_cancelled(submitter: Submitter) -> None:
    write_config(submitter.folder / "c.json", Path("runs/x"))
    job = submitter.submit("train", "--config", "c.json", *SMALL, "--extra=--hold")["train"]
    assert "was waiting and is cancelled" in submitter.call("stop", "runs/x").stdout
    assert submitter.cluster.wait(job)["JobState"] == "CANCELLED"


def test_a_sweep_goes_on_with_what_is_left(submitter: Submitter) -> None:
    write_config(submitter.folder / "c.json", Path("sweep"), max_steps=100, save_every=100)
    flags = ("sweep", "--config", "c.json", "--grid", "train.seed=[1, 2, 3]", "--concurrent", "2", *SMALL)
    # Which of the members fails is in the environment of all of them: rank 1 of the task whose seed is 2.
    stub = submitter.root / "adept_ds" / "cli" / "train.py"
    real = stub.resolve()
    stub.unlink()
    stub.write_text(
        "import os, runpy, sys\n"
        f"sys.path.insert(0, {str(real.parent)!r})\n"
        "if os.environ.get('FAILING') and os.environ['SLURM_ARRAY_TASK_ID'] == os.environ['FAILING']:\n"
        "    os.environ['STUB_FAIL'] = '1 raise 3'\n"
        f"main = runpy.run_path({str(real)!r})['main']\n"
    )
    job = submitter.submit(*flags, FAILING="1")["train"]
    most = 0
    while listed := submitter.cluster.run("squeue", "-h", "-r", "-o", "%T"):
        most = max(most, listed.split().count("RUNNING"))
    assert most == 2
    members = json.loads((submitter.folder / "sweep" / "slurm" / "submission.json").read_text())["members"]
    states = [json.loads((submitter.folder / "sweep" / name / "status.json").read_text())["state"] for name in members]
    assert len(members) == 3
    assert [state == "finished" for state in states] == [True, False, True]
    assert "first to fail: rank 1 on" in (submitter.folder / "sweep" / "slurm" / f"{job}_1.log").read_text()
    rows = submitter.status("sweep")
    assert [row["state"] for row in rows] == ["finished", "failed", "finished"]
    assert "the stub raises" in rows[1]["note"]

    again = submitter.submit(*flags, STUB_STEP_SECONDS="0.001")["train"]
    submitter.cluster.wait(again)
    left = json.loads((submitter.folder / "sweep" / "slurm" / "submission.json").read_text())["members"]
    assert left == [members[1]]
    assert [one.ended_by for one in read_history(submitter.folder / "sweep" / members[1])] == ["failed", "finished"]
    assert len(read_history(submitter.folder / "sweep" / members[0])) == 1
    assert "nothing to do" in submitter.call(*flags).stdout


def test_slurms_own_objections_come_before_anything_is_submitted(submitter: Submitter) -> None:
    write_config(submitter.folder / "c.json", Path("runs/x"))
    done = submitter.call("train", "--config", "c.json", *SMALL, "--partition", "mian", "--cpu-partition", "urgnt")
    assert done.returncode == 2
    assert "partition is 'mian', and the partitions are main, urgent; did you mean 'main'?" in done.stderr
    assert "cpu_partition is 'urgnt'" in done.stderr
    done = submitter.call("train", "--config", "c.json", *SMALL[2:], "--nodes", "4", "--partition", "main")
    assert done.returncode == 2
    assert "SLURM refuses train.sbatch: allocation failure" in done.stderr
    assert not submitter.cluster.run("squeue", "-h")
    assert not (submitter.folder / "runs").exists()


def test_a_script_that_was_submitted_can_be_submitted_by_hand(submitter: Submitter) -> None:
    """Every value can be changed on sbatch's command line; the script needs nothing but itself."""
    name = '50%j it\'s "x" $(touch y) `touch y` # ä'
    write_config(submitter.folder / "c.json", Path("runs", name))
    job = submitter.submit("train", "--config", "c.json", *SMALL)["train"]
    submitter.cluster.wait(job)
    run_dir = submitter.folder / "runs" / name
    assert "finished, step 0 to 20" in (run_dir / "slurm" / f"{job}.log").read_text()
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "status.json").unlink()
    script = run_dir / "slurm" / "train.sbatch"
    flags = ("--nodes=2", "--partition=urgent", "--time=5")
    again = submitter.cluster.sbatch(*flags, script, cwd=Path("/"), ADEPT_DS_NODE_CHECK="0")
    facts = submitter.cluster.wait(again)
    assert (facts["JobState"], facts["Partition"], facts["TimeLimit"]) == ("COMPLETED", "urgent", "00:05:00")
    assert read_history(run_dir)[-1].world_size == 4
    assert not [*submitter.folder.rglob("y")]


def test_a_production_request_is_accepted(submitter: Submitter) -> None:
    write_config(submitter.folder / "c.json", Path("runs/x"), global_batch_size=16)
    flags = ("--nodes", "2", "--gpus-per-node", "8", "--cpus-per-task", "12", "--exclusive", "--extra=--hold")
    for request in ("gpus-per-node", "gres"):
        job = submitter.submit("train", "--config", "c.json", *flags, "--gpu-request", request)["train"]
        facts = submitter.cluster.job(job)
        assert (facts["NumNodes"], facts["NumTasks"]) == ("2-2", "16")
        assert "gpu:8" in facts["TresPerNode"].replace("gres:", "")
        submitter.call("stop", "runs/x")


def test_the_sites_variables_reach_the_ranks_on_all_nodes(submitter: Submitter) -> None:
    write_config(submitter.folder / "c.json", Path("runs/x"))
    flags = ("--nodes", "2", "--gpus-per-node", "2", "--cpus-per-task", "1", "--scratch", "/mnt/$USER x")
    # A container is what stands in front of the interpreter; here it only leaves a mark.
    flags += ("--container-command", "env IN_CONTAINER=1", "--container", "/usr/bin/nice", "--python", sys.executable)
    job = submitter.submit(
        "train", "--config", "c.json", *flags, "--env", "NCCL_SOCKET_IFNAME=ib 0", "MINE=of $USER", USER="me"
    )["train"]
    assert submitter.cluster.wait(job)["JobState"] == "COMPLETED", submitter.log("runs/x", job)
    seen = [json.loads(path.read_text()) for path in (submitter.folder / "runs" / "x" / "seen").glob("*.json")]
    assert {one["SLURMD_NODENAME"] for one in seen} == {"n1", "n2"}
    for one in seen:
        assert (one["NCCL_SOCKET_IFNAME"], one["MINE"], one["ADEPT_DS_SCRATCH"]) == ("ib 0", "of me", "/mnt/me x")
        assert (one["IN_CONTAINER"], str(submitter.folder) in one["APPTAINER_BINDPATH"]) == ("1", True)


def test_a_user_who_is_not_root_submits(submitter: Submitter) -> None:
    nobody = 65534
    interpreter, variables = interpreter_for(nobody)
    # pytest's folders are for root alone.
    shared = Path(tempfile.mkdtemp())
    shared.chmod(0o755)
    try:
        mine = Submitter(submitter.cluster, shared)
        write_config(shared / "c.json", Path("runs/x"))
        os.chown(shared, nobody, nobody)
        flags = ("train", "--config", "c.json", *SMALL, "--python", interpreter)
        done = mine.call(*flags, user=nobody, interpreter=interpreter, HOME=str(shared), USER="nobody", **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        job = mine.ids(done.stdout)["train"]
        facts = mine.cluster.wait(job)
        assert (facts["JobState"], facts["UserId"]) == ("COMPLETED", "nobody(65534)"), mine.log("runs/x", job)
        assert (shared / "runs" / "x" / "status.json").stat().st_uid == nobody
    finally:
        shutil.rmtree(shared)


def interpreter_for(user: int) -> tuple[str, dict[str, str]]:
    """An interpreter that the user may run, and what it needs to find the packages of this one."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for interpreter, variables in ((sys.executable, {}), (f"/usr/bin/python{version}", {"PYTHONPATH": PACKAGES})):
        try:
            subprocess.run(
                [interpreter, "-c", "import pydantic"],
                env=variables,
                user=user,
                group=user,
                extra_groups=[],
                check=True,
            )
            return interpreter, variables
        except (OSError, subprocess.CalledProcessError):
            continue
    pytest.skip("no interpreter that another user may run")
