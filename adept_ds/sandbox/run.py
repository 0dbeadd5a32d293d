"""One program on its way through a worker: carries the plan's calls to the candidate's process, ends with a verdict."""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import signal
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .inside.codec import Limit, decode, encode, shorten
from .inside.supervisor import PROTOCOL_EXIT
from .program import ERROR_KINDS, Limits, Program, Status, Verdict
from .split import Call, Plan, Steps, plan

_HEADER = struct.Struct("!I")
_SHOWN = 200


class CandidateError(Exception):
    """An exception of the candidate's own type that reached the tests."""


@dataclass
class _Outcome:
    status: Status
    kind: str | None
    detail: str


class ProgramRun:
    """The grader's side of one program. `outcome` is set as soon as the verdict no longer depends on what comes."""

    def __init__(self, program: Program, limits: Limits, numpy: bool = False) -> None:
        self.program, self.limits, self.numpy = program, limits, numpy
        self.plan: Plan = plan(program.tests, numpy)
        self.outcome: _Outcome | None = None
        self.all_passed = False
        self.loaded = False
        self.at = 0
        self.got: list[str] = []
        self.steps = self.plan.start() if self.plan.start is not None else None
        self.outgoing = bytearray()
        self.incoming = bytearray()
        self.send(self.job())

    def job(self) -> dict[str, Any]:
        """Return the first message to the candidate's process; it holds tests only if they have to run there."""
        if self.steps is not None:
            return {"source": self.program.source, "tests": None}
        given = self.program.tests
        tests: dict[str, Any] = {"setup": given.setup, "asserts": [source.strip() for source in given.asserts]}
        tests |= {"check": given.check, "entry_point": given.entry_point}
        return {"source": self.program.source, "tests": tests}

    def send(self, message: Any) -> None:
        """Queue a frame for the candidate's process."""
        data = json.dumps(message).encode("ascii")
        self.outgoing += _HEADER.pack(len(data)) + data

    @property
    def settled(self) -> bool:
        """Whether nothing more is wanted from the candidate's process."""
        return self.outcome is not None or self.all_passed

    def flush(self, channel: socket.socket) -> None:
        """Send what the channel takes now."""
        try:
            while self.outgoing:
                del self.outgoing[: channel.send(self.outgoing, socket.MSG_NOSIGNAL)]
        except BlockingIOError:
            pass
        except OSError:
            self.outgoing.clear()  # the process is gone; its report tells why

    def receive(self, channel: socket.socket) -> bool:
        """Take what has arrived and act on whole frames; returns False at the end of the channel."""
        while not self.settled:
            try:
                data = channel.recv(1 << 18)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            self.incoming += data
            while len(self.incoming) >= _HEADER.size and not self.settled:
                (length,) = _HEADER.unpack_from(self.incoming)
                if length > self.limits.answer_bytes:
                    self.violation(f"an answer of {length} bytes")
                    break
                end = _HEADER.size + length
                if len(self.incoming) < end:
                    break
                frame = bytes(self.incoming[_HEADER.size : end])
                del self.incoming[:end]
                self.act(frame)
        return True

    def violation(self, what: str) -> None:
        """Set the outcome for a process that does not keep to the protocol."""
        self.outcome = _Outcome("error", "protocol", f"the program's process sent {what}")

    def act(self, frame: bytes) -> None:
        """Judge one answer and ask for the next call."""
        try:
            answer = json.loads(frame)
            if "raised" in answer:
                kind, name, text = (shorten(str(answer[key])) for key in ("raised", "type", "text"))
                what = f"{name}: {text}" if text else name
                if kind not in ERROR_KINDS:
                    raise ValueError(kind)
                if self.steps is None and "where" in answer:
                    self.raised_in_tests(kind, what, answer["where"], answer["assertion"] is True)
                elif self.loaded and kind == "exception":
                    self.raised(name, text, what)
                else:
                    self.outcome = _Outcome("error", kind, what)
            elif self.steps is None:
                if answer != {"done": True}:
                    raise ValueError("no verdict of its tests")
                self.all_passed = True
            elif self.loaded:
                value = decode(answer["value"], self.numpy)
                self.got.append(_show(value))
                self.advance(self.steps, lambda steps: steps.send(value))
            elif answer == {"loaded": True}:
                self.loaded = True
                self.advance(self.steps, next)
            else:
                raise ValueError("neither loaded nor failed")
        except (Limit, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self.violation(f"something that is not an answer ({shorten(str(error), 80)})")

    def raised_in_tests(self, kind: str, what: str, where: int, assertion: bool) -> None:
        """Act on an exception of tests that run in the candidate's process; `where` counts their asserts."""
        if kind != "exception":
            self.outcome = _Outcome("error", kind, what)
            return
        known = isinstance(where, int) and 0 <= where < len(self.plan.sources)
        source = shorten(self.plan.sources[where].strip() if known else "tests", _SHOWN)
        detail = source if assertion else f"{source}: raised {what}"
        self.outcome = _Outcome("failed", None if assertion else "exception", detail)

    def raised(self, name: str, text: str, what: str) -> None:
        """Raise in the tests what a tested call raised: the builtin exception of that name, or a stand-in."""
        self.got.append(f"raised {what}")
        known = getattr(builtins, name, None)
        error: Exception = CandidateError(what)
        if isinstance(known, type) and issubclass(known, Exception):
            with contextlib.suppress(TypeError):  # some need more than a text
                error = known(text)
        assert self.steps is not None
        self.advance(self.steps, lambda steps: steps.throw(error), error)

    def advance(self, steps: Steps, resume: Callable[[Steps], Call | int], error: Exception | None = None) -> None:
        """Resume the plan up to its next call; sets the outcome if it ends. `error` is what is raised in it, if any."""
        try:
            step = resume(steps)
            while isinstance(step, int):
                self.at, self.got = step, []
                step = next(steps)
        except StopIteration:
            self.all_passed = True
        except Exception as caught:
            if error is not None and error in (caught, caught.__cause__):  # a StopIteration arrives as a cause
                self.fail("exception", "")
            else:
                self.fail(None, "" if isinstance(caught, AssertionError) else f" ({_show_error(caught)})")
        else:
            pairs = [[key, encode(argument)] for key, argument in step.kwargs.items()]
            self.send({"call": [step.name, [encode(argument) for argument in step.args], pairs]})

    def fail(self, kind: str | None, why: str) -> None:
        """Set the outcome: the statement that the plan is at, what came back for it, and why that is wrong."""
        source = self.plan.sources[self.at] if self.plan.sources else "tests"
        got = ", ".join(self.got)
        got = got if got.startswith("raised") else f"got {got}" if got else ""
        self.outcome = _Outcome("failed", kind, shorten(source, _SHOWN) + (f": {shorten(got)}" if got else "") + why)

    def verdict(self, report: dict[str, Any]) -> Verdict:
        """Return the verdict, given how the program's processes ended."""
        if "failure" in report:
            outcome = _Outcome("sandbox_error", None, shorten(str(report["failure"])))
        elif self.outcome is not None and report["reason"] != "violation":
            outcome = self.outcome
        else:
            outcome = self.ended(report["reason"], report["status"])
        seconds = round(report.get("seconds", 0.0), 4)
        in_process = self.plan.start is None
        detail = outcome.detail.encode("utf-8", "backslashreplace").decode()
        return Verdict(self.program.id, outcome.status, outcome.kind, detail, seconds, in_process)

    def ended(self, reason: str | None, status: int | None) -> _Outcome:
        """Return the outcome of a program whose end came before, or with, its last answer."""
        if reason == "timeout":
            limits = self.limits
            return _Outcome("timeout", None, f"over {limits.wall_seconds:g} s, or {limits.cpu_seconds:g} s of CPU time")
        if reason == "memory":
            return _Outcome("error", "memory", f"its processes used more than {self.limits.memory_mb} MB")
        if reason == "output":
            return _Outcome("error", "output", f"wrote more than {self.limits.output_bytes} bytes")
        if reason == "violation":
            return _Outcome("error", "violation", "started too many processes or made too many files")
        if self.all_passed:
            return _Outcome("passed", None, "")
        if status is None:
            return _Outcome("sandbox_error", None, f"stopped unasked ({reason})")
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            if number == signal.SIGXCPU:
                return _Outcome("timeout", None, "CPU time")
            name = signal.Signals(number).name if number in signal.valid_signals() else str(number)
            if number == signal.SIGSYS:
                name += " (a forbidden system call)"
            return _Outcome("error", "signal", f"ended by {name}")
        code = os.WEXITSTATUS(status)
        if code == PROTOCOL_EXIT:
            return _Outcome("error", "protocol", "closed its channel to the grader")
        return _Outcome("error", "exit", f"exit status {code} before the last test")


def _show(value: Any) -> str:
    try:
        return shorten(repr(value), _SHOWN)
    except ValueError:  # an integer beyond the interpreter's limit on digits
        return f"<{type(value).__name__} too long to show>"


def _show_error(error: Exception) -> str:
    return shorten(f"{type(error).__name__}: {error}", _SHOWN)
