"""What SLURM says and does: its commands, asked once for all jobs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from adept_ds.errors import UserError

TIMEOUT_SECONDS = 60
_FIELDS = ("ArrayJobID", "ArrayTaskID", "State", "Reason", "RestartCnt", "TimeLeft", "NodeList", "UserName", "Name")


@dataclass(frozen=True)
class QueuedJob:
    """A job in the queue, or one task of a job array."""

    id: str
    """Id of the job, or of the whole array."""
    array_task: int | None
    name: str
    state: str
    """PENDING, RUNNING, COMPLETING, ..."""
    reason: str
    """Why it waits."""
    restarts: int
    """Times that it was requeued."""
    time_left: str
    """Until its time limit, in SLURM's form."""
    nodes: str
    """Its nodes in SLURM's short form."""
    user: str = ""
    """Whose it is."""

    @property
    def label(self) -> str:
        """The id as SLURM's commands take it."""
        return self.id if self.array_task is None else f"{self.id}_{self.array_task}"


def is_available() -> bool:
    """Whether SLURM's commands are installed here."""
    return shutil.which("sbatch") is not None and shutil.which("squeue") is not None


def queued_jobs(users: Iterable[int] = (), names: Iterable[str] = ()) -> list[QueuedJob]:
    """All jobs in the queue of some users (by number; this one if none is given), or of some names, whosever they are.

    Pending tasks of an array are a job each.

    Raises:
        UserError: SLURM does not answer.
    """
    form = ",".join(f"{field}:|" for field in _FIELDS)
    which = f"--name={','.join(names)}" if names else f"--user={','.join(map(str, users)) or os.getuid()}"
    jobs = []
    for line in call("squeue", "--noheader", "--array", which, f"--Format={form}").splitlines():
        # The name comes last: it alone may have the separator in it.
        job, task, state, reason, restarts, left, nodes, user, name = line.split("|", len(_FIELDS) - 1)
        jobs.append(
            QueuedJob(
                id=job,
                array_task=int(task) if task.isdecimal() else None,
                name=name.removesuffix("|"),
                state=state,
                reason=reason,
                restarts=int(restarts or 0),
                time_left=left,
                nodes=nodes,
                user=user,
            )
        )
    return jobs


def partitions() -> list[str]:
    """Names of all partitions. UserError if SLURM does not answer."""
    return list(dict.fromkeys(call("sinfo", "--noheader", "--format=%R").split()))


def last_state(job: str) -> str | None:
    """How SLURM says that a job ended (`FAILED`, `TIMEOUT`, `NODE_FAIL`, ...); None where it has forgotten it.

    The controller remembers a job for some minutes; longer only where there is an accounting database.
    """
    for command, pattern in (
        (("scontrol", "--oneliner", "show", "job", job), r"\bJobState=(\w+)"),
        (("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}", "--format=State"), r"^(\w+)"),
    ):
        done = _run(command)
        found = re.search(pattern, done.stdout) if done.returncode == 0 else None
        if found:
            return found[1]
    return None


def submit(script: str, *options: str) -> str:
    """Hand a batch script to SLURM and return the job's id.

    Raises:
        UserError: SLURM refuses it.
    """
    return call("sbatch", "--parsable", *options, script).strip().partition(";")[0]


def check_script(text: str) -> str | None:
    """What SLURM has against a batch script, which is not submitted; None if nothing."""
    done = _run(("sbatch", "--test-only"), text)
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.strip().splitlines() if line]
    return "; ".join(dict.fromkeys(line.removeprefix("sbatch: error: ") for line in lines))


def cancel(*arguments: str) -> None:
    """`scancel`; jobs that have ended in the meantime are no mistake."""
    _run(("scancel", *arguments))


def call(*command: str) -> str:
    """Run one of SLURM's commands and return what it prints.

    Raises:
        UserError: It is not there or fails, with what it says.
    """
    done = _run(command)
    if done.returncode != 0:
        raise UserError(f"{command[0]} failed: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout


def _run(command: Sequence[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    # A submission from within a job must not inherit that job's sizes, and SBATCH_* would beat the script's own lines.
    foreign = re.compile(r"SBATCH_|SLURM_(?!CONF$|CLUSTERS$)|SRUN_|SQUEUE_|SINFO_|SACCT_|SCANCEL_")
    environment = {name: value for name, value in os.environ.items() if not foreign.match(name)}
    try:
        return subprocess.run(
            command, env=environment, input=text, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not installed here")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer within {TIMEOUT_SECONDS} s")
