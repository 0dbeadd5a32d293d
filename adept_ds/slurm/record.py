"""The record of a submission in the run folder, or the sweep's, and what is done by it later: find jobs, stop them.

RUN/slurm/submission.json    {"jobs": {"train": "12", "eval": "13"}, "members": [], "scripts": [], "submitted": ""}
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from adept_ds.errors import UserError
from adept_ds.files import read_json, write_json
from adept_ds.slurm import queue
from adept_ds.slurm.tries import STOP_NAME

SLURM_FOLDER = "slurm"
SUBMISSION_NAME = Path(SLURM_FOLDER) / "submission.json"


@dataclass(frozen=True)
class Submission:
    """What `submission.json` says."""

    folder: Path
    """Run folder, or folder of the sweep."""
    jobs: dict[str, str]
    """Kind to id."""
    members: tuple[str, ...]
    """Of a sweep, names of the run folders in the order of the array's tasks."""


def write_record(folder: Path, ids: Mapping[str, str], members: Sequence[str], scripts: Sequence[Path]) -> Submission:
    """Record the ids of jobs by kind. What followed an earlier training is forgotten with it, or else added to."""
    before = None if "train" in ids else read_submission(folder)
    submission = Submission(folder, {**(before.jobs if before else {}), **ids}, tuple(members))
    write_json(
        folder / SUBMISSION_NAME,
        {
            "jobs": submission.jobs,
            "members": list(members),
            "scripts": [str(script) for script in scripts],
            "submitted": datetime.now().astimezone().isoformat(timespec="seconds"),
        },
    )
    return submission


def read_submission(folder: Path) -> Submission | None:
    """The record in a run folder or in a sweep's; None if nothing was submitted from here."""
    path = folder / SUBMISSION_NAME
    if not path.is_file():
        return None
    values = read_json(path)
    return Submission(folder, values["jobs"], tuple(values["members"]))


def find_task(run_dir: Path) -> tuple[Submission | None, int | None]:
    """The submission that a run is part of, and its task if that is a job array: its own, or its sweep's."""
    submission = read_submission(run_dir)
    if submission is None:
        submission = read_submission(run_dir.parent)
        if submission is None or run_dir.name not in submission.members:
            return None, None
        return submission, submission.members.index(run_dir.name)
    return submission, None


def stop(run_dir: Path) -> str:
    """Make a run save, end, and not come back, and take what would follow it out of the queue; of a sweep all runs.

    Returns:
        What was done, for people.

    Raises:
        UserError: No job of the run is in the queue, or another user has submitted it.
    """
    submission, task = find_task(run_dir)
    if submission is None:
        raise UserError(
            f"{run_dir}: there is no {SUBMISSION_NAME}; expected a run that launchers/submit.py has submitted"
        )
    owner = (submission.folder / SUBMISSION_NAME).stat().st_uid
    mine = [
        job
        for job in queue.queued_jobs([owner])
        if job.id in submission.jobs.values() and (task is None or job.array_task == task)
    ]
    if mine and os.getuid() not in (0, owner):
        raise UserError(f"{run_dir}: its jobs belong to {mine[0].user}, who can stop them")
    training = [job for job in mine if job.id == submission.jobs.get("train")]
    others = [job for job in mine if job not in training]
    # First what waits for the training: a run that has stopped ends without an error.
    if others:
        queue.cancel(*(job.label for job in others))
    done = [f"job {job.label} cancelled" for job in others]
    for job in training:
        name = submission.members[job.array_task] if job.array_task is not None else "."
        folder = submission.folder / name
        folder.mkdir(exist_ok=True)
        (folder / STOP_NAME).touch()
        if job.state == "PENDING":
            queue.cancel(job.label)
            done.append(f"job {job.label} was waiting and is cancelled")
        else:
            queue.cancel("--batch", "--signal=USR1", job.label)
            done.append(f"job {job.label} saves after its step and ends; {folder} goes on by submitting it again")
    if not done:
        raise UserError(f"{run_dir}: none of its jobs ({', '.join(submission.jobs.values())}) is in the queue")
    return "\n".join(done)
