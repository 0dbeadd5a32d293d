"""What a program returns, brought out of the sandbox as data: the expected outputs of problems that come without them.

The caller stands in the judge's place: the program's process evaluates one expression after the other and answers in
the codec's forms, which are lists, numbers and texts whatever the program does.
"""

from __future__ import annotations

import ast
import contextlib
import marshal
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adept_ds.errors import UserError

from .inside import channel
from .inside.codec import shorten
from .program import Limits, SandboxFailure
from .run import start
from .worker import Worker

_GRACE_SECONDS = 20.0
_SUBCLASSES = "a value of type "
"""So begins what the codec says of a value that is not of a plain type."""


class NoValue(UserError):
    """A program that gave no value for an expression; the text says which expression, counted from 0, and why."""

    def __init__(self, number: int, why: str) -> None:
        super().__init__(f"{number}: {why}")
        self.number, self.why = number, why


@dataclass(frozen=True)
class Values:
    """What a program returned."""

    forms: list[Any]
    """One for each expression, as `adept_ds.sandbox.decode` takes it."""
    cpu_seconds: float
    """CPU time of the program's process, for all of them."""


def returned_values(worker: Worker, limits: Limits, source: str, expressions: Sequence[str]) -> Values:
    """Run a program and evaluate expressions among its names, in order; a Counter or the like comes as a dict.

    Raises:
        NoValue: The program fails, takes too long, or returns what is no plain value.
        SandboxFailure: The process could not be had, or was lost.
    """
    job = {"source": source, "setup": "", "names": {"builtins": [], "modules": {}, "bound": []}}
    ours, theirs = socket.socketpair()
    forms: list[Any] = []
    missing: NoValue | None = None
    with ours:
        patience = struct.pack("ll", int(limits.wall_seconds + _GRACE_SECONDS), 0)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
        with theirs:
            start(worker, limits, [theirs.fileno()], job)
        try:
            _answer(0, channel.receive(ours.fileno(), limits.answer_bytes), "loaded")
            for number, expression in enumerate(expressions):
                forms.append(_evaluated(ours.fileno(), limits, number, expression))
        except NoValue as reason:
            missing = reason
        except (OSError, EOFError, ValueError, RecursionError) as error:
            missing = NoValue(len(forms), f"no answer ({type(error).__name__})")
    if missing is not None:
        worker.stop_program()
    report = worker.report()
    if "failure" in report:
        raise SandboxFailure(str(report["failure"]))
    if report["reason"] in ("timeout", "memory", "output", "violation"):
        raise NoValue(len(forms), f"over the limit ({report['reason']}, {report['cpu_seconds']:g} s of CPU time)")
    if missing is not None:
        raise missing
    return Values(forms, report["cpu_seconds"])


def _evaluated(talk: int, limits: Limits, number: int, expression: str) -> Any:
    answer = _asked(talk, limits, expression)
    if isinstance(answer, dict) and str(answer.get("inexact")).startswith(_SUBCLASSES):
        as_dict = _asked(talk, limits, f"dict({expression})")
        answer = as_dict if isinstance(as_dict, dict) and "value" in as_dict else answer
    return _answer(number, answer, "value")


def _asked(talk: int, limits: Limits, expression: str) -> Any:
    function = compile(ast.parse(f"lambda: {expression}", mode="eval"), "<expression>", "eval", 0, True, 0)
    channel.send(talk, {"call": marshal.dumps(function).hex(), "values": [], "catches": False})
    return channel.receive(talk, limits.answer_bytes)


def _answer(number: int, answer: Any, wanted: str) -> Any:
    if isinstance(answer, dict) and wanted in answer:
        return answer[wanted]
    with contextlib.suppress(TypeError, KeyError):
        if "raised" in answer:
            raise NoValue(number, shorten(f"raised {answer['type']}: {answer['text']}"))
        raise NoValue(number, shorten(str(answer["inexact"])))
    raise NoValue(number, "an answer that is none")
