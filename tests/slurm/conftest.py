"""A real SLURM of two nodes on this machine, and a trainer that needs no model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged", "ip")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")


@dataclass(frozen=True)
class Cluster:
    """The local SLURM: nodes n1 and n2, 8 GPUs and 128 CPUs each by their own account."""

    tool: Path
    environment: dict[str, str]
    jobs: list[str] = field(default_factory=list)

    def run(self, *command: str | Path, check: bool = True, **variables: str) -> str:
        """Run a client program; return its standard output."""
        done = subprocess.run(
            [str(word) for word in command],
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done.stdout

    def sbatch(self, *arguments: str | Path, cwd: Path = REPOSITORY, user: str | None = None, **variables: str) -> str:
        """Submit; return the job's id."""
        as_user = ["runuser", "-u", user, "--"] if user else []
        done = subprocess.run(
            [*as_user, "sbatch", "--parsable", *map(str, arguments)],
            cwd=cwd,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        self.jobs.append(done.stdout.strip())
        return self.jobs[-1]

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says; of an array's members, the first."""
        lines = self.run("scontrol", "-o", "show", "job", job_id).splitlines()
        return dict(re.findall(r"(\w+)=(\S*)", lines[0]))

    def wait(self, job_id: str, *states: str, timeout: float = 90, restarts: int = 0) -> dict[str, str]:
        """Wait until the job is in one of the states (ended, if none is given) after so many restarts."""
        wanted = states or ENDED
        return wait_for(
            lambda: (job := self.job(job_id))["JobState"] in wanted and int(job["Restarts"]) >= restarts and job,
            timeout,
            lambda: f"job {job_id} is not {' or '.join(wanted)}: {self.job(job_id)}",
        )

    def execute(self, node: str, *command: str, check: bool = True) -> str:
        """Run a command inside a node."""
        return self.run(self.tool, "exec", node, *command, check=check)

    def processes(self, node: str, text: str) -> list[int]:
        """Process ids, as the node counts them, whose command lines hold `text`."""
        # At full width, which ps does not take where COLUMNS is set, as it is in pytest-xdist's workers.
        lines = self.execute(node, "ps", "-wweo", "pid=,args=").splitlines()
        return [int(line.split()[0]) for line in lines if text in line and "ps -wweo" not in line]

    def cancel_all(self) -> None:
        """Cancel what is left of the jobs that were submitted here, and wait until the nodes are free."""
        if self.jobs:
            jobs = ",".join(self.jobs)
            self.run("scancel", *self.jobs, check=False)
            wait_for(lambda: not self.run("squeue", "-h", "-j", jobs), 60, lambda: self.run("squeue"))
            self.jobs.clear()


def wait_for(condition: Callable[[], Any], timeout: float, describe: Callable[[], str]) -> Any:
    """Poll until `condition` returns something true, and return that."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"after {timeout} s: {describe()}")


def worker_number() -> int:
    """Which of pytest-xdist's workers this is; each has a cluster of its own."""
    return int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))


@pytest.fixture(scope="session")
def whole_cluster(shared_dir: Path) -> Iterator[Cluster]:
    """The cluster, for the whole session."""
    if os.geteuid() != 0:
        pytest.skip("a SLURM on one machine wants root")
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge iproute2)")
    tool = shared_dir / "tools" / "local_slurm.sh"
    if not tool.is_file():
        pytest.skip(f"no {tool}")
    number = worker_number()
    folder = os.environ.get("LOCAL_SLURM_DIR", "/tmp/local_slurm") + (f"_{number}" if number else "")
    subnet, _, last = os.environ.get("LOCAL_SLURM_SUBNET", "198.51.100").rpartition(".")
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "SBATCH_")) and name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment = {
        **inherited,
        "LOCAL_SLURM_DIR": folder,
        "LOCAL_SLURM_PORT": str(int(os.environ.get("LOCAL_SLURM_PORT", "17700")) + 2 * number),
        "LOCAL_SLURM_SUBNET": f"{subnet}.{int(last) + 16 * number}",
        "SLURM_CONF": f"{folder}/slurm.conf",
        "ADEPT_DS_PYTHON": sys.executable,
        "ADEPT_DS_SCRATCH": "/mnt/scratch",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    cluster = Cluster(tool, environment)
    was_up = subprocess.run([tool, "status"], env=environment, capture_output=True).returncode == 0
    if not was_up:
        started = subprocess.run([tool, "start"], env=environment, capture_output=True, text=True)
        if started.returncode != 0:
            pytest.skip(f"the local SLURM does not start: {started.stderr.strip()}")
    yield cluster
    cluster.cancel_all()
    if not was_up:
        cluster.run(tool, "stop")


@pytest.fixture
def cluster(whole_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster; a test's jobs end with it."""
    yield whole_cluster
    whole_cluster.cancel_all()


class Run:
    """A run folder, a config and a log, beside one another in a folder.

    Args:
        cluster: Where it runs.
        folder: Where all of it is.
        settings: The config, without its run folder.
        root: The repository.
        name: Of the run folder, the config and the log.
    """

    HEADERS = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=1", "--time=10")

    def __init__(
        self, cluster: Cluster, folder: Path, settings: dict[str, Any], root: Path = REPOSITORY, name: str = "run"
    ) -> None:
        self.cluster = cluster
        self.root = root
        self.run_dir = folder / name
        self.config = folder / f"{name}.json"
        self.log = folder / f"{name}.log"
        logging = {**settings.get("logging", {}), "run_dir": str(self.run_dir)}
        self.config.write_text(json.dumps({**settings, "logging": logging}))

    def submit(self, *headers: str, arguments: tuple[str, ...] = (), user: str | None = None, **variables: str) -> str:
        """Submit `train.sbatch`, without the node check unless it is asked for; return the job's id."""
        return self.cluster.sbatch(
            *self.HEADERS,
            f"--output={self.log}",
            *headers,
            self.root / "launchers" / "slurm" / "train.sbatch",
            self.config,
            *arguments,
            cwd=self.root,
            user=user,
            **{"ADEPT_DS_NODE_CHECK": "0", **variables},
        )

    def history(self) -> list[dict[str, Any]]:
        """The lines of history.jsonl."""
        return [json.loads(line) for line in (self.run_dir / "history.jsonl").read_text().splitlines()]

    def status(self) -> dict[str, Any]:
        """status.json."""
        return json.loads((self.run_dir / "status.json").read_text())

    def wait_for_step(self, step: int, timeout: float = 120) -> None:
        """Wait until the run has taken so many steps."""
        path = self.run_dir / "metrics.jsonl"
        wait_for(lambda: path.exists() and f'"step": {step},' in path.read_text(), timeout, self.last_words)

    def last_words(self) -> str:
        """The job's log."""
        return self.log.read_text() if self.log.exists() else "no log"


class StubRun(Run):
    """A run whose trainer is `stub_train.py`, in a repository made of links to the rest of ours."""

    def __init__(self, cluster: Cluster, folder: Path, name: str = "run", **sections: dict[str, Any]) -> None:
        super().__init__(cluster, folder, stub_settings() | sections, stub_root(folder / "repository"), name)

    def seen(self, restarts: int = 0) -> list[dict[str, Any]]:
        """The environment that each rank saw in a try, with its arguments and its model."""
        return [json.loads(path.read_text()) for path in sorted((self.run_dir / "seen").glob(f"*-{restarts}-*.json"))]


@pytest.fixture
def stub(cluster: Cluster, tmp_path: Path) -> StubRun:
    """A run whose trainer is the stub."""
    return StubRun(cluster, tmp_path)


def stub_root(folder: Path) -> Path:
    """A repository with our batch scripts and package, and the stub in the trainer's place."""
    return root_with(folder, "stub_train.py")


def root_with(folder: Path, trainer: str) -> Path:
    """A repository of links to ours, but for `adept_ds/cli/train.py`, which is a file of this folder."""
    if not folder.exists():
        package = folder / "adept_ds"
        (folder / "launchers").mkdir(parents=True)
        (package / "cli").mkdir(parents=True)
        (folder / "launchers" / "slurm").symlink_to(REPOSITORY / "launchers" / "slurm")
        for ours in [*(REPOSITORY / "adept_ds").iterdir(), *(REPOSITORY / "adept_ds" / "cli").iterdir()]:
            link = folder / ours.relative_to(REPOSITORY)
            if not link.exists() and ours.name not in ("train.py", "__pycache__"):
                link.symlink_to(ours)
        (package / "cli" / "train.py").symlink_to(Path(__file__).with_name(trainer))
    return folder


def stub_settings(**train: Any) -> dict[str, Any]:
    """A config of which the stub takes the number of steps and when to save."""
    return {
        "model": {"name_or_path": "stub/model"},
        "train": {"max_steps": 20, "warmup_steps": 1, "save_every": 5, **train},
    }


def write_config(path: Path, run_dir: Path, **train: Any) -> Path:
    """Write a config for the stub."""
    path.write_text(json.dumps({**stub_settings(**train), "logging": {"run_dir": str(run_dir)}}))
    return path
