"""One program on its way through two fork servers, one for the program and one for the judge of its tests.

The caller hands both processes their jobs and one end each of a channel, and waits. What the program returns, and what
the tests make of it, never comes here; a verdict in a few words does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .inside.channel import HEADER
from .inside.codec import shorten
from .inside.supervisor import PROTOCOL_EXIT
from .program import ERROR_KINDS, Limits, Program, Status, Verdict
from .split import Plan, modules_named, plan
from .worker import Worker

_MOST = 1 << 16
_SHOWN = 200
_JUDGE_SECONDS = 5.0
"""A judge outlives the program's time limit by this: what ended the program is told by the program's own end."""


@dataclass(frozen=True)
class Judgement:
    """What came of a program: a verdict, or the reason why its tests have to run beside it."""

    verdict: Verdict
    inexact: str = ""
    distrusted: bool = False
    """It would pass there by what it says itself that its values equal."""
    used_its_time: bool = False
    """It ran out of CPU time, which it would again."""


class ProgramRun:
    """A program that runs: its processes are started at once; `take_report` is called at each end, until `ended`.

    `beside` says why the tests run in the program's process; empty if they are to be judged apart if they can. Raises
    OSError if a worker is gone.
    """

    def __init__(
        self, program: Program, limits: Limits, worker: Worker, judge: Worker, numpy: bool = False, beside: str = ""
    ) -> None:
        self.program, self.worker, self.judge = program, worker, judge
        self.limits = limits = limits.of(program)
        self.numpy = numpy
        self.plan: Plan = plan(program.tests, numpy)
        self.beside = beside or self.plan.reason
        self.said: Any = None
        self.reports: dict[Worker, dict[str, Any]] = {}
        self.desk, theirs = socket.socketpair()
        with contextlib.ExitStack() as stack:
            stack.enter_context(theirs)
            if self.beside:
                self.running = {worker}
                start(worker, limits, [theirs.fileno()], self._job())
                return
            self.running = {worker, judge}
            ends = [stack.enter_context(end) for end in socket.socketpair()]
            job = {**(self.plan.judge or {}), "answer_bytes": limits.answer_bytes}
            start(worker, limits, [ends[0].fileno()], self._job())
            patient = replace(limits, wall_seconds=limits.wall_seconds + _JUDGE_SECONDS)
            start(judge, patient, [theirs.fileno(), ends[1].fileno()], job, alone=not self.plan.leaves_nothing)

    def _job(self) -> dict[str, Any]:
        """Return the program's job; it holds tests only if they have to run there."""
        given = self.program.tests
        job: dict[str, Any] = {"source": self.program.source}
        if not self.beside:
            return job | {"setup": given.setup, "names": self.plan.names}
        asserts = [source.strip() for source in given.asserts]
        tests: dict[str, Any] = {"setup": given.setup, "asserts": asserts, "check": given.check}
        tests |= {"entry_point": given.entry_point, "modules": modules_named(given, self.numpy)}
        return job | {"tests": tests}

    @property
    def ended(self) -> bool:
        """Whether no process of it is left."""
        return not self.running

    def take_report(self, worker: Worker, report: dict[str, Any]) -> None:
        """Note how one of its processes ended; ends the other one where its work is in vain."""
        self.reports[worker] = report
        self.running.discard(worker)
        if worker is self.judge or self.beside:
            self.said = last_message(self.desk)
        # After these it ends by itself, or by its limits, and how it ends is part of the verdict.
        awaited = self.said in ({"passed": True}, {"gone": True})
        if worker is self.judge and not awaited and self.worker in self.running:
            self.worker.stop_program()

    def close(self) -> None:
        """Forget it."""
        self.desk.close()

    def judgement(self) -> Judgement:
        """Return the verdict, once all has ended."""
        report = self.reports[self.worker]
        seconds = round(report.get("seconds", 0.0), 4)
        used = report.get("cpu_seconds", 0.0) >= self.limits.cpu_seconds
        status, kind, detail, inexact = self._outcome(report)
        distrusted = bool(inexact) and self.said.get("distrusted") is True
        detail = detail.encode("utf-8", "backslashreplace").decode()
        verdict = Verdict(self.program.id, status, kind, detail, seconds, bool(self.beside), self.beside)
        return Judgement(verdict, inexact, distrusted, used)

    def _outcome(self, report: dict[str, Any]) -> tuple[Status, str | None, str, str]:
        """Return status, kind, detail and, if there is no verdict, why."""
        for one in self.reports.values():
            if "failure" in one:
                return "sandbox_error", None, shorten(str(one["failure"])), ""
        try:
            said = self._in_tests(self.said) if self.beside else self.said
            if said is None:
                if self.beside:
                    return *self._end_of(report, False), ""
                _, _, detail = self._end_of(self.reports[self.judge], False)
                return "failed", None, f"a test of the returned value did not come to an end: {detail}", ""
            if "inexact" in said:
                return "sandbox_error", None, "no exact verdict", str(said["inexact"])
            if said in ({"gone": True}, {"passed": True}) or report["reason"] == "violation":
                return *self._end_of(report, said == {"passed": True}), ""
            if "error" in said and said["error"] in ERROR_KINDS:
                return "error", said["error"], str(said["detail"]), ""
            if said["failed"] in (None, "exception"):
                return "failed", said["failed"], str(said["detail"]), ""
            raise ValueError
        except (TypeError, KeyError, ValueError, AttributeError):
            return "error", "protocol", "the program's process sent something that is not a verdict", ""

    def _in_tests(self, answer: Any) -> dict[str, Any] | None:
        """Return what the program's process said of the tests that ran there, in the judge's words."""
        if answer is None:
            return None
        if answer == {"done": True}:
            return {"passed": True}
        kind, name, text = (shorten(str(answer[key])) for key in ("raised", "type", "text"))
        what = f"{name}: {text}" if text else name
        if "where" not in answer or kind != "exception":
            return {"error": kind, "detail": what}
        where = answer["where"]
        known = type(where) is int and 0 <= where < len(self.plan.sources)
        source = shorten(self.plan.sources[where].strip() if known else "tests", _SHOWN)
        if answer["assertion"] is True:
            return {"failed": None, "detail": source}
        return {"failed": "exception", "detail": f"{source}: raised {what}"}

    def _end_of(self, report: dict[str, Any], passed: bool) -> tuple[Status, str | None, str]:
        """Return the outcome of a process that ended before, or with, its last word."""
        reason, status, limits = report["reason"], report["status"], self.limits
        if reason == "timeout":
            return "timeout", None, f"over {limits.wall_seconds:g} s, or {limits.cpu_seconds:g} s of CPU time"
        if reason == "memory":
            return "error", "memory", f"its processes used more than {limits.memory_mb} MB"
        if reason == "output":
            return "error", "output", f"wrote more than {limits.output_bytes} bytes"
        if reason == "violation":
            return "error", "violation", "started too many processes or made too many files"
        if passed:
            return "passed", None, ""
        if status is None:
            return "sandbox_error", None, f"stopped unasked ({reason})"
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            if number == signal.SIGXCPU:
                return "timeout", None, "CPU time"
            name = signal.Signals(number).name if number in signal.valid_signals() else str(number)
            if number == signal.SIGSYS:
                name += " (a forbidden system call)"
            return "error", "signal", f"ended by {name}"
        code = os.WEXITSTATUS(status)
        if code == PROTOCOL_EXIT:
            return "error", "protocol", "closed its channel to the judge"
        return "error", "exit", f"exit status {code} before the last test"


def start(worker: Worker, limits: Limits, descriptors: Sequence[int], job: dict[str, Any], alone: bool = True) -> None:
    """Start a process with, as the first of its descriptors, its job in a file of no name; see `Worker.start`."""
    with os.fdopen(os.memfd_create("job"), "wb", buffering=0) as file:
        file.write(json.dumps(job).encode("ascii"))
        file.seek(0)
        worker.start(limits, [file.fileno(), *descriptors], alone)


def last_message(desk: socket.socket) -> Any:
    """Return the message that a process left when it ended, or None if there is no whole one."""
    desk.setblocking(False)
    data = b""
    with contextlib.suppress(OSError):
        while len(data) < _MOST and (part := desk.recv(_MOST)):
            data += part
    try:
        (length,) = HEADER.unpack_from(data)
        return json.loads(data[HEADER.size : HEADER.size + length])
    except (struct.error, ValueError, RecursionError):
        return None
