"""Where the logs of a run's jobs and ranks are.

RUN/slurm/JOB.log                     all ranks of a job, with labels; of a sweep SWEEP/slurm/JOB_TASK.log
RUN/slurm/ranks/JOB-TRY/rank-N.log    one rank of a try of the training
RUN/slurm/JOB.ranks/rank-N.log        one rank of an evaluation; of its next tries JOB.ranks-TRY
"""

from __future__ import annotations

from pathlib import Path

from adept_ds.errors import UserError
from adept_ds.slurm.record import SLURM_FOLDER, find_task
from adept_ds.slurm.submission import Kind
from adept_ds.slurm.tries import read_history, this_logs


def find_log(run_dir: Path, kind: Kind, rank: int | None) -> Path:
    """The log of a run's job, or of one rank of it, newest try first.

    Raises:
        UserError: There is none; says what there is.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such folder")
    submission, task = find_task(run_dir)
    folders = [this_logs(run_dir, one) for one in reversed(read_history(run_dir))]
    # A job that was submitted by hand has its own log wherever sbatch was told.
    if kind == "train" and (rank is not None or (submission is None and folders)):
        return _rank_log(run_dir, folders, rank or 0)
    job = submission.jobs.get(kind) if submission else None
    if submission is None or job is None:
        known = f"; it has {', '.join(submission.jobs)}" if submission else ", which adept-ds submit would have noted"
        raise UserError(f"{run_dir}: no {kind} job is known{known}")
    name = job if task is None or kind != "train" else f"{job}_{task}"
    path = submission.folder / SLURM_FOLDER / f"{name}.log"
    if rank is not None:
        return _rank_log(run_dir, sorted(path.parent.glob(f"{name}.ranks*"), key=_age, reverse=True), rank)
    if not path.is_file():
        raise UserError(f"{path} is not there: job {name} has not begun, or SLURM could not write it (adept-ds status)")
    return path


def _age(path: Path) -> float:
    return path.stat().st_mtime


def _rank_log(run_dir: Path, folders: list[Path], rank: int) -> Path:
    for folder in folders:
        if (path := folder / f"rank-{rank}.log").is_file():
            return path
    found = sorted({int(path.stem.removeprefix("rank-")) for folder in folders for path in folder.glob("rank-*.log")})
    there = f"; there are ranks {found[0]} to {found[-1]}" if found else ", nor any other rank's"
    raise UserError(f"{run_dir}: there is no log of rank {rank}{there}")
