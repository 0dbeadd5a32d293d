"""Where runs stand, from SLURM's queue and from what they have written; without SLURM from the latter alone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from adept_ds.errors import UserError
from adept_ds.evaluation.results import SUMMARY_NAME, adapter_digest
from adept_ds.files import read_end, read_json
from adept_ds.slurm import queue
from adept_ds.slurm.queue import QueuedJob
from adept_ds.slurm.record import find_task, read_submission
from adept_ds.slurm.submission import KINDS
from adept_ds.slurm.tries import Try, read_history
from adept_ds.storage.run_folder import CONFIG_NAME, METRICS_NAME, STATUS_NAME, read_status

SILENCE_SECONDS = 600
"""A run outside SLURM that has written nothing for so long is taken for dead."""
FAILED = "failed"
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT")
"""SLURM's states of a job that has no nodes."""


@dataclass(frozen=True)
class RunState:
    """One run at one moment."""

    run: str
    """Its folder."""
    state: str
    """waiting (not submitted), pending, starting, running, suspended, interrupted, cancelled, failed, evaluating,
    finished."""
    job: str | None = None
    """Job of the training, or of what follows it and is in the queue now."""
    requeued: int = 0
    """Times that the training was requeued."""
    step: int = 0
    total_steps: int | None = None
    steps_per_second: float | None = None
    """As of the last line of metrics."""
    seconds_left: float | None = None
    """Of training at that rate."""
    loss: float | None = None
    """Training loss of that line."""
    gpu_hours: float = 0.0
    """Of all tries of the training, GPUs times hours."""
    score: str | None = None
    """Figures of the evaluations."""
    note: str = ""
    """Why it waits, the first line of the error, what is still to come, or why it ended before its last step."""


def run_folders(paths: Iterable[Path]) -> list[Path]:
    """The run folders that are meant; a sweep's folder stands for its members.

    Raises:
        UserError: A folder is not there, or holds neither a run nor runs.
    """
    folders: list[Path] = []
    for path in paths:
        submission = read_submission(path)
        if submission and submission.members:
            sweep = path / "sweep.json"
            listed = [member["name"] for member in read_json(sweep)["members"]] if sweep.is_file() else []
            folders += [path / name for name in dict.fromkeys([*listed, *submission.members])]
        elif submission or _is_run(path):
            folders.append(path)
        else:
            inner = sorted(child for child in path.glob("*/") if _is_run(child) or read_submission(child))
            if not inner:
                reason = "holds neither a run nor runs" if path.is_dir() else "no such folder"
                raise UserError(f"{path}: {reason}")
            folders += run_folders(inner)
    return folders


def read_states(folders: Sequence[Path], warn: Callable[[str], Any]) -> list[RunState]:
    """Where each run stands now. SLURM is asked once for all of them.

    Args:
        folders: Run folders.
        warn: Called with a line if SLURM is installed and does not answer; the runs' files then tell what they can.

    Raises:
        UserError: A file is damaged.
    """
    jobs = None
    if queue.is_available():
        owners = {existing.stat().st_uid for folder in folders if (existing := _existing(folder))}
        try:
            jobs = queue.queued_jobs(owners)
        except UserError as error:
            reason = str(error).splitlines()[0]
            warn(f"SLURM does not answer, so that what follows is from the runs' files alone ({reason})")
    return [_read_state(folder, jobs) for folder in folders]


def _is_run(path: Path) -> bool:
    return (path / CONFIG_NAME).is_file() or (path / STATUS_NAME).is_file()


def _existing(folder: Path) -> Path | None:
    return next((path for path in (folder, folder.parent) if path.is_dir()), None)


def _read_state(folder: Path, queued: Sequence[QueuedJob] | None) -> RunState:
    submission, task = find_task(folder)
    history = read_history(folder)
    status = read_status(folder)
    ids = dict(submission.jobs) if submission else {}
    last = history[-1] if history else None
    # The newest of the jobs that train it: submitted by submit.py, or by hand and then known once it has started.
    if submission is None and last:
        task = last.array_task
    if last and last.array_task == task:
        ids["train"] = max(last.job, ids.get("train", "0"), key=int)
    mine = {
        kind: job
        for job in queued or ()
        for kind in KINDS
        if job.id == ids.get(kind) and (kind != "train" or job.array_task == task)
    }
    train_id = ids.get("train")
    state = RunState(
        run=str(folder),
        state="waiting",
        job=train_id if task is None or train_id is None else f"{train_id}_{task}",
        requeued=sum(bool(one.requeued) for one in history if one.job == train_id),
        step=status.get("step", 0),
        total_steps=status.get("total_steps"),
        gpu_hours=sum(map(_gpu_hours, history)),
        score=_scores(folder),
        note=status.get("reason") or "",
    )
    state = _with_metrics(state, folder)
    training = mine.pop("train", None)
    if training:
        return _in_queue(state, training, status)
    state = replace(state, steps_per_second=None, seconds_left=None)
    if status.get("state") == "finished":
        return _trained(state, ids, mine, queued is not None)
    ended = _ended(state, folder, status, last, train_id, queued is not None)
    return replace(ended, steps_per_second=None, seconds_left=None) if ended.state != "running" else ended


def _in_queue(state: RunState, job: QueuedJob, status: dict[str, Any]) -> RunState:
    state = replace(state, job=job.label, requeued=max(state.requeued, job.restarts))
    still = replace(state, steps_per_second=None, seconds_left=None)
    if job.state in WAITING:
        held = f"; `scontrol release {job.label}` lets it go on" if "held" in job.reason.lower() else ""
        return replace(still, state="pending", note=f"{job.reason}{held}")
    where = f"on {job.nodes}, {job.time_left} to its time limit"
    if job.state in ("SUSPENDED", "STOPPED"):
        return replace(still, state="suspended", note=f"{job.state} {where}")
    if job.state not in ("RUNNING", "CONFIGURING"):
        where = f"{job.state} {where}"
    if status.get("state") in ("running", "finished") and job.state != "CONFIGURING":
        return replace(state, state="running", note=where)
    return replace(still, state="starting", note=where)


def _gpu_hours(one: Try) -> float:
    """GPUs that a try had, times the hours until it ended, or until now."""
    end = datetime.fromisoformat(one.ended) if one.ended else datetime.now().astimezone()
    return one.gpus * (end - datetime.fromisoformat(one.started)) / timedelta(hours=1)


def _trained(state: RunState, ids: dict[str, str], mine: dict[Any, QueuedJob], has_slurm: bool) -> RunState:
    """A run that has taken all its steps, with what was submitted to follow."""
    for kind, job in mine.items():
        what = f"{kind} is {job.state}" + (f" ({job.reason})" if job.state == "PENDING" else "")
        return replace(state, state="evaluating", job=job.label, note=what)
    for kind in ("eval", "score"):
        if kind in ids and state.score is None and has_slurm:
            ending = queue.last_state(ids[kind])
            if ending not in (None, "COMPLETED", "PENDING", "RUNNING"):
                return replace(state, state=FAILED, job=ids[kind], note=f"trained, but {kind} ended as {ending}")
    return replace(state, state="finished")


def _ended(
    state: RunState,
    folder: Path,
    status: dict[str, Any],
    last: Try | None,
    train_id: str | None,
    has_slurm: bool,
) -> RunState:
    """A run that is not finished and not in the queue."""
    if last and last.job != train_id:
        last = None  # of an earlier job
    if last and last.ended_by in ("stopped", "cancelled"):
        return replace(state, state="interrupted" if last.ended_by == "stopped" else "cancelled")
    if last and last.ended_by not in (None, "finished"):
        return replace(state, state=FAILED, note=_first_line(last.error or status.get("error") or last.ended_by))
    if status.get("state") == "failed":
        return replace(state, state=FAILED, note=_first_line(status.get("error")))
    if last and has_slurm:
        # The batch script had no time to say how the try ended. What the ranks have written is older.
        ending = queue.last_state(state.job or last.job)
        if ending == "CANCELLED":
            return replace(state, state="cancelled")
        said = f"; SLURM says {ending}" if ending else ""
        return replace(state, state=FAILED, note=f"the batch script was killed{said}; submit the run again to go on")
    if status.get("state") == "interrupted":
        return replace(state, state="interrupted")
    if train_id and has_slurm:
        ending = queue.last_state(train_id if state.job is None else state.job)
        if ending == "CANCELLED":
            return replace(state, state="cancelled")
        return replace(state, state=FAILED, note=f"the job is gone{f', {ending}' if ending else ''}; see its log")
    if status.get("state") == "running":
        silence = time.time() - max(path.stat().st_mtime for path in folder.glob("*.json*"))
        if silence < SILENCE_SECONDS:
            return replace(_with_metrics(state, folder), state="running")
        return replace(state, state=FAILED, note=f"has written nothing for {timedelta(seconds=round(silence))}")
    return replace(state, state="pending", note="its job is not known here") if train_id else state


def _with_metrics(state: RunState, folder: Path) -> RunState:
    """The state with step, rate and loss of the last line of metrics that has a loss."""
    line = _last_metrics(folder / METRICS_NAME)
    if line is None:
        return state
    state = replace(state, step=max(state.step, line["step"]), loss=line["loss"])
    settings = read_json(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else {}
    size = settings.get("train", {}).get("global_batch_size")
    if not size or not line.get("examples_per_second") or state.total_steps is None:
        return state
    rate = line["examples_per_second"] / size
    return replace(state, steps_per_second=rate, seconds_left=(state.total_steps - state.step) / rate)


def _last_metrics(path: Path) -> dict[str, Any] | None:
    """The last whole line that is of a training step; the file is read from its end."""
    if not path.is_file():
        return None
    for text in reversed(read_end(path).splitlines()):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "loss" in line:
            return line
    return None


def _scores(folder: Path) -> str | None:
    """pass@1, or each task's first metric, of every evaluation in the folder."""
    figures = []
    for path in sorted(folder.glob(f"eval/**/{SUMMARY_NAME}")):
        summary = read_json(path)
        if "pass@1" in summary:
            name, value = "pass@1", summary["pass@1"]["mean"]
        else:
            name, value = next((name, one["value"]) for name, one in summary["metrics"].items())
        stale = " (of an earlier adapter)" if _is_stale(summary, folder) else ""
        figures.append(f"{path.parent.relative_to(folder / 'eval')} {name} {100 * value:.1f} %{stale}")
    return ", ".join(figures) or None


def _is_stale(summary: dict[str, Any], folder: Path) -> bool:
    """Whether a summary is of what the run's `best` held before."""
    adapter, digest = summary.get("adapter"), adapter_digest(folder / "best")
    is_of_best = adapter is not None and Path(adapter).parts[-2:] == (folder.absolute().name, "best")
    return is_of_best and digest is not None and summary.get("adapter_sha256") != digest


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]
