"""Tries of a run under SLURM: one line each in its `history.jsonl`, and whether another one follows.

    squeue -h -r -o '%i %u' | python -m adept_ds.slurm.tries begin --nodes "n1 n2" -- CONFIG [--section.key VALUE ..]
    python -m adept_ds.slurm.tries end --run_dir RUN --part rank --status 0 --warned 1 --preempted 0 --cancelled 0 ..
    python -m adept_ds.slurm.tries refused --run_dir RUN --message TEXT

The batch script calls `begin` before it starts anything, `end` when it is over, and `refused` where SLURM does not
requeue it. `begin` takes the run folder for this try, waits for ranks of an earlier one that live on, and prints the
config, the run folder, the folder of the ranks' logs, and how many numbers of steps are not to be used again. A job
that SLURM starts again has the same id and one restart more.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from adept_ds.config.command_line import parse_command_line
from adept_ds.entry_point import USER_ERROR_STATUS, run_entry_point
from adept_ds.errors import UserError
from adept_ds.files import atomic_write, read_end
from adept_ds.storage.run_folder import (
    CONFIG_NAME,
    TRY_NAME,
    check_same_run,
    lock_holder,
    newest_step,
    read_status,
)

HISTORY_NAME = "history.jsonl"
STOP_NAME = "stop"
"""Marker in a run folder: end at the next warning, and do not come back."""
RANK_LOGS = Path("slurm") / "ranks"

NOTHING_TO_DO = 3
"""Exit status of `begin` for a run that is finished, or stopped while it waited for its next try."""
STOPPED = 1
"""Exit status of a job that may not go on: the restart cap, or no progress."""
REQUEUE = 75
"""Exit status of `end` when the job is to be requeued (EX_TEMPFAIL)."""
DEFAULT_MAX_RESTARTS = 20
TOO_LATE = (
    "the time limit came before the run had saved, so it was not requeued; a new submission goes on from the last "
    "checkpoint. Give it more seconds of warning (sbatch --signal=B:USR1@SECONDS): twice a step and a save"
)
RANKS_ALONE = (
    "a signal reached the ranks and not the job ({signal}): a node's shutdown, a watch over its memory, or scancel "
    "--signal. The run has saved; submit it again to go on"
)
STEPS_OF_A_TRY = 4
"""Most calls of srun in a try: node check, staging, ranks, and the question for nodes that are gone."""
NETWORK_ERROR = re.compile(r"Connection (closed|reset|refused)|[Tt]imed out|Broken pipe|NCCL|gloo|Dist\w+Error")
TERMINATED = 128 + signal.SIGTERM
IDLE_TRIES = 2
"""So many tries one after another that gain no step end a run: one alone may have been bad luck."""
LAUNCH_TRIES = 3
"""As above, for tries whose ranks SLURM could not start."""
LOCK_SECONDS = 600.0
"""Longest wait for ranks of an earlier try; those that can be told to stop do so after their step and a save."""


@dataclass(frozen=True)
class Try:
    """One line of the history."""

    job: str
    """Id of the job; that of the whole array for its members."""
    array_task: int | None
    number: int
    """Times that SLURM had restarted the job; `try` in the file."""
    nodes: tuple[str, ...]
    world_size: int
    started: str
    """ISO 8601, as `ended`."""
    from_step: int
    """Step of the newest checkpoint at the start; `to_step` is that at the end."""
    ended: str | None = None
    to_step: int | None = None
    ended_by: str | None = None
    """finished, time limit, preempted, node failure, launch failure, requeued, cancelled, stopped, interrupted, failed,
    killed, no progress, restart cap; None while it runs."""
    requeued: bool | None = None
    error: str | None = None
    """Of the rank that failed first, or why the run does not go on."""
    gpus: int = 0
    """Of all nodes."""

    @property
    def key(self) -> tuple[str, int | None]:
        """What SLURM restarts: a job, or a member of an array."""
        return self.job, self.array_task


def read_history(run_dir: Path) -> list[Try]:
    """All tries of a run, oldest first."""
    path = run_dir / HISTORY_NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    tries = []
    for number, line in enumerate(lines, 1):
        try:
            fields = json.loads(line)
            fields["number"] = fields.pop("try")
            tries.append(Try(**{**fields, "nodes": tuple(fields["nodes"])}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}:{number}: expected a try of the run ({error})") from None
    return tries


def write_history(run_dir: Path, tries: Sequence[Try]) -> None:
    """Write all tries anew: the last one's line is completed when it ends."""
    with atomic_write(run_dir / HISTORY_NAME) as file:
        for one in tries:
            fields = {"try" if name == "number" else name: value for name, value in asdict(one).items()}
            file.write(json.dumps(fields) + "\n")


def now() -> str:
    """The time as it stands in the history."""
    return _text(datetime.now())


def _text(moment: datetime) -> str:
    return moment.astimezone().isoformat(timespec="seconds")


def config_of_task(path: Path, environment: Mapping[str, str]) -> Path:
    """The config of this job: `path` itself, or in a job array the line of that file for this member.

    Raises:
        UserError: The file has no such line.
    """
    task = environment.get("SLURM_ARRAY_TASK_ID")
    if task is None:
        return path
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a text file with one config path a line") from None
    if int(task) >= len(lines):
        raise UserError(f"{path} has {len(lines)} lines, and none for the array's task {task} (the first is 0)")
    return Path(lines[int(task)])


def why_no_more(tries: Sequence[Try], restarts: int, max_restarts: int) -> tuple[str, str] | None:
    """Why a job may not start once more, as the history has it and as people are told; None if it may.

    Args:
        tries: All tries, the last of them ended.
        restarts: Restarts of the job, the one in question included.
        max_restarts: Most of them.
    """
    if restarts > max_restarts:
        return "restart cap", f"it was restarted {max_restarts} times, the most that ADEPT_DS_MAX_RESTARTS allows"
    own = [one for one in tries if one.key == tries[-1].key] if tries else []
    if len(own) >= LAUNCH_TRIES and all(one.ended_by == "launch failure" for one in own[-LAUNCH_TRIES:]):
        return "launch failure", f"SLURM could not start its ranks {LAUNCH_TRIES} times one after another"
    recent = [one for one in own if one.ended_by != "launch failure"][-IDLE_TRIES:]
    if len(recent) == IDLE_TRIES and all(one.to_step == one.from_step for one in recent):
        return "no progress", (
            f"{IDLE_TRIES} tries one after another gained no step (both began and ended at {recent[-1].from_step}). "
            "Give it more time (sbatch --time, and seconds of warning in --signal), or a smaller train.save_every"
        )
    return None


def begin(flags: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Start a try: complete the history, decide whether the run goes on, and print what the batch script needs."""
    if not flags.arguments:
        raise UserError("a config is needed: sbatch launchers/slurm/train.sbatch CONFIG [--section.key VALUE ..]")
    config = config_of_task(Path(flags.arguments[0]), environment)
    _, loaded = parse_command_line(["--config", str(config), *flags.arguments[1:]], "train.sbatch", "")
    run_dir = Path(loaded.run.logging.run_dir).absolute()
    if (run_dir / CONFIG_NAME).is_file():
        check_same_run(run_dir, loaded.run.model_dump(mode="json", by_alias=True))
    status = read_status(run_dir)
    if status.get("state") == "finished":
        _say(f"{run_dir} is finished ({status['step']} steps); nothing to do")
        return NOTHING_TO_DO

    restarts = _restarts(environment)
    task = environment.get("SLURM_ARRAY_TASK_ID")
    this = Try(
        job=environment.get("SLURM_ARRAY_JOB_ID") or environment["SLURM_JOB_ID"],
        array_task=None if task is None else int(task),
        number=restarts,
        nodes=tuple(flags.nodes.split()),
        world_size=int(environment.get("SLURM_NTASKS", "1")),
        started=now(),
        from_step=0,
        gpus=int(environment.get("SLURM_GPUS_ON_NODE") or 0) * len(flags.nodes.split()),
    )
    tries = read_history(run_dir)
    last = tries[-1] if tries and tries[-1].ended is None else None
    owners = dict(line.split() for line in sys.stdin)
    if last and last.key != this.key and (owner := owners.get(_name(last))):
        raise UserError(
            f"job {_name(last)} is training in {run_dir} now, submitted by {owner}; one run folder has one writer"
        )
    if last and last.key != this.key and _name(this) not in owners:
        raise UserError(f"SLURM does not say whether job {_name(last)} is still training in {run_dir}; submit it again")
    _take_over(run_dir, this, float(environment.get("ADEPT_DS_LOCK_SECONDS", LOCK_SECONDS)))
    this = replace(this, from_step=newest_step(run_dir))
    if last:
        tries[-1] = _completed(last, this, run_dir)
    marker = run_dir / STOP_NAME
    stopped = marker.exists() and restarts > 0
    if marker.exists() and restarts == 0:
        marker.unlink()  # of an earlier job
    reason = ("stopped", f"{marker} is there") if stopped else why_no_more(tries, restarts, _max_restarts(environment))
    if reason:
        done = replace(this, ended=now(), to_step=this.from_step, ended_by=reason[0], requeued=False)
        write_history(run_dir, [*tries, done])
        _say(f"{run_dir} does not go on: {reason[1]}")
        return NOTHING_TO_DO if stopped else STOPPED

    logs = this_logs(run_dir, this)
    logs.mkdir(parents=True, exist_ok=True)
    write_history(run_dir, [*tries, this])
    _say(
        f"job {_name(this)}, try {restarts}, on {flags.nodes}: {run_dir} from step {this.from_step}; "
        f"a log for each rank in {logs}"
    )
    broken = sum(one.key == this.key and one.ended_by in ("node failure", "requeued") for one in tries)
    print(config.absolute(), run_dir, logs, STEPS_OF_A_TRY * broken, sep="\n")
    return 0


def _take_over(run_dir: Path, this: Try, patience: float) -> None:
    """Make a run folder this try's: ranks of an earlier try that live on, on a node that SLURM has given up, are told
    to stop, and are waited for.

    Raises:
        UserError: Somebody holds the folder and does not leave it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / TRY_NAME
    is_ours = not path.exists() or path.stat().st_uid == os.getuid()
    deadline = time.monotonic() + (patience if is_ours else 0)
    if is_ours:  # those of another user are not told to stop
        _write_try(path, this)
    told = False
    while holder := lock_holder(run_dir, _say):
        if time.monotonic() >= deadline:
            raise UserError(f"somebody trains in {run_dir} now: {holder}; one run folder has one writer")
        if not told:
            _say(f"{run_dir} is in use still: {holder}; waiting for its end, {patience:g} s at most")
            told = True
        time.sleep(2)
    _write_try(path, this)


def _write_try(path: Path, this: Try) -> None:
    with atomic_write(path) as file:
        file.write(f"{_name(this)}.{this.number}\n")


def _completed(last: Try, this: Try, run_dir: Path) -> Try:
    """The line of a try whose batch script could not write how it ended, with the time when it was last heard of."""
    heard = [path.stat().st_mtime for path in this_logs(run_dir, last).glob("*")]
    ended = max([datetime.fromisoformat(last.started).timestamp(), *heard])
    last = replace(last, ended=_text(datetime.fromtimestamp(ended)), to_step=this.from_step)
    if last.key == this.key:
        return replace(last, ended_by="node failure", requeued=True)
    return replace(last, ended_by="killed", requeued=False)


def _restarts(environment: Mapping[str, str]) -> int:
    return int(environment.get("SLURM_RESTART_COUNT") or 0)


def _name(one: Try) -> str:
    return one.job if one.array_task is None else f"{one.job}_{one.array_task}"


def _max_restarts(environment: Mapping[str, str]) -> int:
    return int(environment.get("ADEPT_DS_MAX_RESTARTS", DEFAULT_MAX_RESTARTS))


def end(flags: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """End a try: write why, name the rank that failed first, and return the script's exit status (or `REQUEUE`)."""
    run_dir = flags.run_dir
    tries = read_history(run_dir)
    before = tries[-1]
    if not _is_own(before, environment):
        _say(f"job {_name(before)}, try {before.number}, has {run_dir} now; this one's line was completed by it")
        return TERMINATED
    this = replace(before, ended=now(), to_step=newest_step(run_dir))
    status = read_status(run_dir) if flags.part == "rank" else {}
    this, exit_status = _judge(this, status, flags)
    if this.requeued and exit_status == REQUEUE:
        reason = why_no_more([*tries[:-1], this], this.number + 1, _max_restarts(environment))
        if reason:
            _say(f"{run_dir} does not go on: {reason[1]}")
            this, exit_status = replace(this, ended_by=reason[0], requeued=False), STOPPED
    if (this.ended_by, this.to_step) == (before.ended_by, before.to_step):
        return exit_status  # told already, when the signal came
    write_history(run_dir, [*tries[:-1], this])
    what = f"job {_name(this)}, try {this.number}: {this.ended_by}, step {this.from_step} to {this.to_step}"
    asks = "; SLURM is asked to requeue it" if exit_status == REQUEUE else "; requeued"
    _say(f"{what}{asks if this.requeued else ''}")
    if this.error:
        _say(this.error)
    return exit_status


def refused(flags: argparse.Namespace, environment: Mapping[str, str]) -> None:
    """Correct the last line of the history where SLURM does not start the job again, and say what to do."""
    tries = read_history(flags.run_dir)
    if not _is_own(tries[-1], environment):
        return
    error = (
        f"SLURM refused to requeue the job ({' '.join(flags.message.split())}). Its newest checkpoint is of step "
        f"{tries[-1].to_step}; submit it again to go on"
    )
    write_history(flags.run_dir, [*tries[:-1], replace(tries[-1], requeued=False, error=error)])
    _say(error)


def _is_own(one: Try, environment: Mapping[str, str]) -> bool:
    """Whether a try is the one that this batch script belongs to: SLURM may have started another one elsewhere."""
    job = environment.get("SLURM_ARRAY_JOB_ID") or environment["SLURM_JOB_ID"]
    return (one.job, one.number) == (job, _restarts(environment))


def _judge(this: Try, status: Mapping[str, Any], flags: argparse.Namespace) -> tuple[Try, int]:
    """Why the try ended, and the exit status that follows, before any cap."""
    job = dict(re.findall(r"(\w+)=(\S+)", flags.facts))
    if not flags.cancelled and not flags.status and status.get("state") == "finished":
        return replace(this, ended_by="finished", requeued=False), 0
    # SLURM counts a restart as soon as it ends a job for one. It tells the script so, unless it has lost the node.
    if int(job.get("Restarts", "0")) > this.number:
        is_lost = flags.lost or not flags.cancelled
        preempted = flags.preempted or _log_tells_preemption(flags.facts, this)
        why = "preempted" if preempted else "node failure" if is_lost else "requeued"
        return replace(this, ended_by=why, requeued=True), TERMINATED
    if flags.cancelled:
        if job.get("Reason") == "TimeLimit":
            return replace(this, ended_by="time limit", requeued=False, error=TOO_LATE), TERMINATED
        return replace(this, ended_by="cancelled", requeued=False), TERMINATED
    if flags.status and flags.lost:
        error = f"no answer from {flags.lost}"
        return replace(this, ended_by="node failure", requeued=True, error=error), REQUEUE
    if flags.status:
        logs = this_logs(flags.run_dir, this)
        missing = never_started(logs, flags.part, len(this.nodes) if flags.part == "staging" else this.world_size)
        if missing:
            return replace(this, ended_by="launch failure", requeued=True, error=missing), REQUEUE
        return replace(this, ended_by="failed", requeued=False, error=first_failure(logs, flags.part)), flags.status
    # A cluster that warns of preemption by TERM sends it to the ranks alone.
    preempted = flags.preempted or job.get("PreemptTime", "None") != "None"
    if (flags.run_dir / STOP_NAME).exists():
        return replace(this, ended_by="stopped", requeued=False), 0
    if not (flags.warned or preempted):
        # What follows the job must not take an unfinished run for a finished one.
        error = RANKS_ALONE.format(signal=status.get("signal") or "unknown")
        return replace(this, ended_by="interrupted", requeued=False, error=error), STOPPED
    return replace(this, ended_by="preempted" if preempted else "time limit", requeued=True), REQUEUE


def _log_tells_preemption(facts: str, this: Try) -> bool:
    """Whether SLURM has written into the job's log that it ended this try to make room for another job. It does not
    tell the batch script so where that has had its warning of the time limit before, however early."""
    job, path = (re.search(rf"\b{key}=(.+?)(?= \w+=|\n|$)", facts) for key in ("JobId", "StdErr"))
    if not (job and path and Path(path[1]).is_file()):
        return False
    line = rf"\*\*\* (?:JOB|STEP) {job[1]}\b.* CANCELLED AT (\S+) DUE TO PREEMPTION"
    told = re.findall(line, read_end(Path(path[1])))
    return bool(told) and datetime.fromisoformat(told[-1]).astimezone() >= datetime.fromisoformat(this.started)


def this_logs(run_dir: Path, one: Try) -> Path:
    """Folder of the ranks' logs of a try."""
    return run_dir / RANK_LOGS / f"{_name(one)}-{one.number}"


def never_started(logs: Path, part: str, tasks: int) -> str | None:
    """Say that SLURM did not start all tasks of a step, as where a node's prolog fails; None if a task has failed.

    Every task begins with its log, and leaves its status if it ends in an error. Those that SLURM ends because of the
    others leave TERM.
    """
    started = len(list(logs.glob(f"{part}-*.log")))
    statuses = {int(path.read_text().split()[1]) for path in logs.glob(f"{part}-*.exit")}
    if started >= tasks or statuses - {TERMINATED}:
        return None
    return f"SLURM started {started} of {tasks} tasks, and srun says why above"


def first_failure(logs: Path, part: str) -> str:
    """Say what ended a step: the rank that failed first, with its node, error and log.

    Python errors are timed when they are raised; a bare exit status or a signal when the rank has ended. Where one rank
    dies the others' collectives fail at once, so errors of the network come last, as does the end that SLURM makes of
    the other ranks.
    """
    failures: list[tuple[bool, float, str]] = []
    for path in sorted(logs.glob(f"{part}-*.exit")):
        rank = path.stem.removeprefix(f"{part}-")
        ended, status, node = path.read_text().split()
        record = path.with_suffix(".error")
        facts: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
        error = facts.get("error") or _status_text(int(status))
        is_consequence = bool(NETWORK_ERROR.search(error)) or (
            not facts and int(status) in (TERMINATED, USER_ERROR_STATUS)
        )
        where = f"first to fail: rank {rank} on {node}: " if facts.get("of_rank", True) else ""
        text = f"{where}{error} (log: {logs / f'{part}-{rank}.log'})"
        failures.append((is_consequence, float(facts.get("time", ended)), text))
    if not failures:
        return f"no rank has left an error; all there is stands above, and in {logs}"
    return min(failures)[-1]


def _status_text(status: int) -> str:
    if status == 137:
        return "killed by signal 9 (SIGKILL; by the system where memory is short)"
    return f"killed by signal {status - 128}" if status > 128 else f"ended with exit status {status}"


def failure(flags: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Say what ended a step that is no training; return `REQUEUE` if it has not begun, and may be tried once more."""
    missing = never_started(flags.logs, "rank", flags.tasks)
    _say(missing or first_failure(flags.logs, "rank"))
    return REQUEUE if missing and _restarts(environment) + 1 < LAUNCH_TRIES else STOPPED


def _say(text: str) -> None:
    """For the log; standard output is the batch script's."""
    print(f"adept_ds: {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> int | None:
    """Parse and call."""
    parser = argparse.ArgumentParser(prog="python -m adept_ds.slurm.tries", allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("begin")
    first.add_argument("--nodes", default="")
    first.add_argument("arguments", nargs="*")
    first.set_defaults(call=begin)
    last = commands.add_parser("end")
    last.add_argument("--run_dir", type=Path)
    last.add_argument("--part", help="what ran last")
    last.add_argument("--status", type=int, help="its exit status")
    last.add_argument("--warned", type=int)
    last.add_argument("--preempted", type=int)
    last.add_argument("--cancelled", type=int)
    last.add_argument("--facts", help="the line of `scontrol -o show job`")
    last.add_argument("--lost", default="", help="nodes of the job that do not answer")
    last.set_defaults(call=end)
    no = commands.add_parser("refused")
    no.add_argument("--run_dir", type=Path)
    no.add_argument("--message", help="what SLURM says")
    no.set_defaults(call=refused)
    failed = commands.add_parser("failure")
    failed.add_argument("logs", type=Path)
    failed.add_argument("tasks", type=int)
    failed.set_defaults(call=failure)
    flags = parser.parse_args(arguments)
    return flags.call(flags, os.environ)


if __name__ == "__main__":
    run_entry_point(main)
