"""Tries of a run under SLURM: one line each in its `history.jsonl`, and whether another one follows.

    python -m adept_ds.slurm.tries begin --nodes "n1 n2" --alive "11 12" -- CONFIG [--section.key VALUE ..]
    python -m adept_ds.slurm.tries end --run_dir RUN --part rank --status 0 --warned 1 --preempted 0 --cancelled 0 ..

The batch script calls `begin` before it starts anything, and `end` when it is over. `begin` prints the config, the run
folder, the folder of the ranks' logs, and how many numbers of steps are not to be used again. A job that SLURM starts
again has the same id and one restart more.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from adept_ds.config.command_line import parse_command_line
from adept_ds.entry_point import USER_ERROR_STATUS, run_entry_point
from adept_ds.errors import UserError
from adept_ds.files import atomic_write
from adept_ds.storage.run_folder import CONFIG_NAME, check_same_run, newest_step, read_status

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
STEPS_OF_A_TRY = 4
"""Most calls of srun in a try: node check, staging, ranks, and the question for nodes that are gone."""
NETWORK_ERROR = re.compile(r"Connection (closed|reset|refused)|[Tt]imed out|Broken pipe|NCCL|gloo|Dist\w+Error")
TERMINATED = 128 + signal.SIGTERM
IDLE_TRIES = 2
"""So many tries one after another that gain no step end a run: one alone may have been bad luck."""


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
    """finished, time limit, preempted, node failure, requeued, cancelled, stopped, failed, killed, no progress, restart
    cap; None while it runs."""
    requeued: bool | None = None
    error: str | None = None
    """Of the rank that failed first."""

    @property
    def key(self) -> tuple[str, int | None]:
        """What SLURM restarts: a job, or a member of an array."""
        return self.job, self.array_task


def read_history(run_dir: Path) -> list[Try]:
    """All tries of a run, oldest first."""
    path = run_dir / HISTORY_NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    tries = []
    for line in lines:
        fields = json.loads(line)
        fields["number"] = fields.pop("try")
        tries.append(Try(**{**fields, "nodes": tuple(fields["nodes"])}))
    return tries


def write_history(run_dir: Path, tries: Sequence[Try]) -> None:
    """Write all tries anew: the last one's line is completed when it ends."""
    with atomic_write(run_dir / HISTORY_NAME) as file:
        for one in tries:
            fields = {"try" if name == "number" else name: value for name, value in asdict(one).items()}
            file.write(json.dumps(fields) + "\n")


def now() -> str:
    """The time as it stands in the history."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


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
    recent = [one for one in tries if one.key == tries[-1].key][-IDLE_TRIES:] if tries else []
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

    restarts = int(environment.get("SLURM_RESTART_COUNT", "0"))
    task = environment.get("SLURM_ARRAY_TASK_ID")
    job = environment.get("SLURM_ARRAY_JOB_ID") or environment["SLURM_JOB_ID"]
    this = Try(
        job=job,
        array_task=None if task is None else int(task),
        number=restarts,
        nodes=tuple(flags.nodes.split()),
        world_size=int(environment.get("SLURM_NTASKS", "1")),
        started=now(),
        from_step=newest_step(run_dir),
    )
    tries = read_history(run_dir)
    if tries and tries[-1].ended is None:
        tries[-1] = _completed(tries[-1], this, flags.alive.split(), run_dir)
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

    logs = run_dir / RANK_LOGS / f"{_name(this)}-{restarts}"
    logs.mkdir(parents=True, exist_ok=True)
    write_history(run_dir, [*tries, this])
    _say(
        f"job {_name(this)}, try {restarts}, on {flags.nodes}: {run_dir} from step {this.from_step}; "
        f"a log for each rank in {logs}"
    )
    broken = sum(one.key == this.key and one.ended_by in ("node failure", "requeued") for one in tries)
    print(config.absolute(), run_dir, logs, STEPS_OF_A_TRY * broken, sep="\n")
    return 0


def _completed(last: Try, this: Try, alive: Sequence[str], run_dir: Path) -> Try:
    """The line of a try whose batch script could not write how it ended."""
    if last.key == this.key:
        return replace(last, ended=now(), to_step=this.from_step, ended_by="node failure", requeued=True)
    if _name(last) in alive:
        raise UserError(f"job {_name(last)} is training in {run_dir} now; one run folder has one writer")
    return replace(last, ended=now(), to_step=this.from_step, ended_by="killed", requeued=False)


def _name(one: Try) -> str:
    return one.job if one.array_task is None else f"{one.job}_{one.array_task}"


def _max_restarts(environment: Mapping[str, str]) -> int:
    return int(environment.get("ADEPT_DS_MAX_RESTARTS", DEFAULT_MAX_RESTARTS))


def end(flags: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """End a try: write why, name the rank that failed first, and return the script's exit status (or `REQUEUE`)."""
    run_dir = flags.run_dir
    tries = read_history(run_dir)
    this = replace(tries[-1], ended=now(), to_step=newest_step(run_dir))
    state = read_status(run_dir).get("state") if flags.part == "rank" else None
    this, exit_status = _judge(this, state, flags)
    if this.requeued and exit_status == REQUEUE:
        reason = why_no_more([*tries[:-1], this], this.number + 1, _max_restarts(environment))
        if reason:
            _say(f"{run_dir} does not go on: {reason[1]}")
            this, exit_status = replace(this, ended_by=reason[0], requeued=False), STOPPED
    if (this.ended_by, this.to_step) == (tries[-1].ended_by, tries[-1].to_step):
        return exit_status  # told already, when the signal came
    write_history(run_dir, [*tries[:-1], this])
    what = f"job {_name(this)}, try {this.number}: {this.ended_by}, step {this.from_step} to {this.to_step}"
    _say(f"{what}{'; requeued' if this.requeued else ''}")
    if this.error:
        _say(this.error)
    return exit_status


def _judge(this: Try, state: str | None, flags: argparse.Namespace) -> tuple[Try, int]:
    """Why the try ended, and the exit status that follows, before any cap."""
    job = dict(re.findall(r"(\w+)=(\S+)", flags.facts))
    if flags.cancelled:
        # SLURM counts a restart as soon as it ends a job for one.
        if int(job.get("Restarts", "0")) > this.number:
            why = "node failure" if flags.lost else "preempted" if flags.preempted else "requeued"
            return replace(this, ended_by=why, requeued=True), TERMINATED
        if job.get("Reason") == "TimeLimit":
            return replace(this, ended_by="time limit", requeued=False, error=TOO_LATE), TERMINATED
        return replace(this, ended_by="cancelled", requeued=False), TERMINATED
    if flags.status and flags.lost:
        error = f"no answer from {flags.lost}"
        return replace(this, ended_by="node failure", requeued=True, error=error), REQUEUE
    if flags.status:
        logs = this_logs(flags.run_dir, this)
        return replace(this, ended_by="failed", requeued=False, error=first_failure(logs, flags.part)), flags.status
    if state == "finished":
        return replace(this, ended_by="finished", requeued=False), 0
    # A cluster that warns of preemption by TERM sends it to the ranks alone.
    preempted = flags.preempted or job.get("PreemptTime", "None") != "None"
    if (flags.run_dir / STOP_NAME).exists() or not (flags.warned or preempted):
        return replace(this, ended_by="stopped", requeued=False), 0
    return replace(this, ended_by="preempted" if preempted else "time limit", requeued=True), REQUEUE


def this_logs(run_dir: Path, one: Try) -> Path:
    """Folder of the ranks' logs of a try."""
    return run_dir / RANK_LOGS / f"{_name(one)}-{one.number}"


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


def _say(text: str) -> None:
    """For the log; standard output is the batch script's."""
    print(f"adept_ds: {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> int | None:
    """Parse and call."""
    parser = argparse.ArgumentParser(prog="python -m adept_ds.slurm.tries", allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("begin")
    first.add_argument("--nodes", default="")
    first.add_argument("--alive", default="", help="ids of the user's jobs in the queue")
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
    failure = commands.add_parser("failure")
    failure.add_argument("logs", type=Path)
    failure.set_defaults(call=lambda flags, environment: _say(first_failure(flags.logs, "rank")))
    flags = parser.parse_args(arguments)
    return flags.call(flags, os.environ)


if __name__ == "__main__":
    run_entry_point(main)
