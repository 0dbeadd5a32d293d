"""Runs the tests of problems, in a process that is isolated like a program's, and asks the programs' for calls.

It serves program after program as long as their tests can leave nothing behind; the caller says after which one it is
to be replaced. The tests are plain Python here, but for the calls of the program: each has become
`__call__(number, ...)`, which sends the call's code and waits for the value. Whatever value comes, and whatever a test
does with it, costs this process alone. If something is met that would not be exactly what one interpreter would give,
the verdict is only that, and the tests run beside the program instead.
"""

from __future__ import annotations

import builtins
import contextlib
import decimal
import importlib
import marshal
import os
import random
import resource
import socket
import sys
import types
from typing import Any, NoReturn

from . import channel
from .codec import Inexact, Malformed, decode, encode, shorten

_SHOWN = 200
MODULES = (
    *("bisect", "cmath", "collections", "collections.abc", "copy", "functools", "heapq", "itertools", "json", "math"),
    *("numbers", "operator", "random", "re", "statistics", "string", "sys", "textwrap", "typing"),
)
"""Modules whose functions give the same in any process; `random` does so as long as nobody seeds it."""
_GROWN_KB = 1 << 16
"""A process that has grown by more is replaced, so that the memory limit means the same for the next program."""
_GENUINE = dict(vars(builtins))
_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, range, decimal.Decimal})


def is_frozen(value: Any) -> bool:
    """Tell whether nothing in the value can be changed."""
    kind = type(value)
    if kind is tuple or kind is frozenset:
        return all(is_frozen(item) for item in value)
    return kind in _PLAIN or ("numpy" in sys.modules and isinstance(value, sys.modules["numpy"].generic))


def is_held(values: Any, index: Any, more: int = 0) -> bool:
    """Tell whether `values[index]`, or anything changeable in it, is referred to from anywhere but `values`.

    `more` is the number of other references that are known. Only the reference count can tell.
    """
    if is_frozen(values[index]):
        return False
    if sys.getrefcount(values[index]) > 2 + more:  # of `values`, and of this very call
        return True
    inner = values[index]
    if type(inner) is list or type(inner) is tuple:
        return any(is_held(inner, number) for number in range(len(inner)))
    if type(inner) is dict:
        return any(is_held(inner, key) for key in inner)
    return False


def has_order(value: Any) -> bool:
    """Tell whether the value holds a set whose order, which is hidden state, may differ from the original's."""
    kind = type(value)
    if kind is set or kind is frozenset:
        return len(value) > 1
    if kind is list or kind is tuple:
        return any(has_order(item) for item in value)
    return kind is dict and any(has_order(key) or has_order(item) for key, item in value.items())


def _form(value: Any) -> Any:
    try:
        return encode(value)
    except Inexact:
        return None


def _show(value: Any) -> str:
    try:
        return shorten(repr(value), _SHOWN)
    except Exception:  # too long an integer, too deep
        return f"<{type(value).__name__} that cannot be shown>"


class Ended(BaseException):
    """The verdict is out."""


class Judge:
    """The tests of one program on their way to a verdict, which is sent on `desk`; every way to it raises `Ended`."""

    def __init__(self, talk: int, desk: int, job: dict[str, Any]) -> None:
        self.talk, self.desk, self.job = talk, desk, job
        self.sites = job["sites"]
        self.space: dict[str, Any] = {"__name__": "tests", "__call__": self.call}
        self.results: list[Any] = []
        self.form: Any = None
        self.forms: list[Any] = []
        self.shown: list[str] = []
        self.shown_at: Any = None
        self.shown_from = 0
        self.passed_on: BaseException | None = None

    def end(self, verdict: dict[str, Any]) -> NoReturn:
        """Send the verdict and end; with the process, if what ran might catch an exception."""
        channel.send(self.desk, verdict)
        if self.job["alone"]:
            os._exit(0)
        raise Ended

    def inexact(self, reason: str, distrusted: bool = False) -> NoReturn:
        """End without a verdict: the tests have to run beside the program, where passing may prove nothing."""
        self.end({"inexact": reason, "distrusted": distrusted})

    def receive(self) -> dict[str, Any]:
        """Return the program's answer."""
        try:
            answer = channel.receive(self.talk, self.job["answer_bytes"])
        except (EOFError, ConnectionError):
            self.end({"gone": True})
        except channel.TooLong:
            self.inexact("a value that is too large")
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            self.violation("no answer")
        return answer

    def violation(self, what: str) -> NoReturn:
        """End for a program's process that does not keep to the protocol."""
        self.end({"error": "protocol", "detail": f"the program's process sent {shorten(what, 80)}"})

    def raised(self, answer: dict[str, Any]) -> tuple[str, str]:
        """Return the kind of what was raised, and its text; ends if they are not of the closed set."""
        kind, name, text = (shorten(str(answer.get(key))) for key in ("raised", "type", "text"))
        if kind not in self.job["kinds"]:
            self.violation(f"an exception of kind {kind}")
        return kind, f"{name}: {text}" if text else name

    def ask(self, request: dict[str, Any], against: bool = False) -> Any:
        """Send a call and return its value; raises what it raised if the tests might catch that.

        `against` says that the value is compared with one that is not the program's.
        """
        try:
            channel.send(self.talk, request | {"catches": self.job["catches"]})
        except OSError:
            self.end({"gone": True})
        answer = self.receive()
        if "inexact" in answer:
            self.inexact(shorten(str(answer["inexact"])), against and answer.get("own_equality") is True)
        if "raised" in answer:
            kind, what = self.raised(answer)
            if not self.job["catches"]:
                if kind != "exception":
                    self.end({"error": kind, "detail": what})
                self.shown.append(f"raised {what}")
                self.fail("exception", "", sys._getframe(2).f_lineno)
            error = _GENUINE.get(str(answer["type"]))
            if "args" not in answer or not (isinstance(error, type) and issubclass(error, BaseException)):
                self.inexact(f"an exception {what}")
            self.shown.append(f"raised {what}")
            self.passed_on = error(*decode(answer["args"]))
            raise self.passed_on
        try:
            self.form = answer["value"]
            return decode(self.form)
        except (Malformed, KeyError, RecursionError) as problem:
            self.violation(f"something that is not an answer ({problem})")

    def call(self, number: int, *values: Any) -> Any:
        """Make the call of site `number` with these values of the tests' own variables."""
        site = self.sites[number]
        statement = self.statement(sys._getframe(1).f_lineno)
        if statement != self.shown_at or (site["repeats"] and number == self.shown_from):
            self.shown_at, self.shown_from, self.shown = statement, number, []
        while self.results:
            if is_held(self.results, -1):
                self.inexact("a returned value that is still in use at the next call, which might change it")
            if _form(self.results.pop()) != self.forms.pop():
                self.inexact("a returned value that the tests have changed, which the next call might see")
        if "run" in site:
            return self.ask({"run": site["run"]})
        forms = []
        for index, name in enumerate(site["names"]):
            # The variable itself is the other reference.
            if not is_frozen(values[index]) and (name not in site["moved"] or is_held(values, index, 1)):
                self.inexact(f"variable {name}, which the tests may look at after a call has changed it")
            if has_order(values[index]):
                self.inexact(f"variable {name}, a set, whose order the program would see")
            try:
                forms.append(encode(values[index]))
            except Inexact as reason:
                self.inexact(f"variable {name}, {reason}")
        value = self.ask({"call": site["call"], "values": forms}, site["against"])
        if not site["orderless"] and has_order(value):
            self.inexact("a returned set whose order the tests may see")
        self.shown.append(_show(value))
        if not is_frozen(value):
            self.results.append(value)
            # What arrived is what `encode` would make of it again, but for sets.
            self.forms.append(encode(value) if has_order(value) else self.form)
        return value

    def statement(self, line: int | None) -> Any:
        """Return the first and the last line of the statement of the tests that a line belongs to."""
        return self.job["spans"].get(str(line))

    def fail(self, kind: str | None, why: str, line: int | None) -> NoReturn:
        """End with a failed statement: its source, what came back for it, and why that is wrong."""
        statement = self.statement(line)
        first, last = statement or (1, 0)
        source = "\n".join(self.job["text"].split("\n")[first - 1 : last]).strip() or "tests"
        got = ", ".join(self.shown) if statement is not None and self.shown_at == statement else ""
        got = got if got.startswith("raised") else f"got {got}" if got else ""
        detail = shorten(source, _SHOWN) + (f": {shorten(got)}" if got else "") + why
        self.end({"failed": kind, "detail": detail})

    def is_constant(self, value: Any) -> bool:
        """Tell whether a value of the tests' setup is the same in the program's process whatever the program does."""
        if isinstance(value, types.ModuleType):
            return value.__name__ in self.job["modules"]
        return is_frozen(value) or (isinstance(value, types.FunctionType) and not vars(value))

    def run(self) -> NoReturn:
        """Judge the program."""
        answer = self.receive()
        if "raised" in answer:
            kind, what = self.raised(answer)
            if "where" in answer and kind == "exception":  # in the setup of the tests
                self.end({"failed": "exception", "detail": f"the tests' setup: raised {what}"})
            self.end({"error": kind, "detail": what})
        if not isinstance(answer.get("loaded"), list):
            self.violation("neither loaded nor failed")
        if answer["loaded"]:
            self.inexact(f"names that the program and the tests share: {shorten(str(answer['loaded']), _SHOWN)}")
        space = self.space
        space |= {name: importlib.import_module(module) for name, module in self.job["visible"].items()}
        try:
            for source in self.job["before"]:
                exec(compile(source, "<before>", "exec", 0, True), space)
        except BaseException as error:
            self.inexact(f"what the tests need beforehand raised {type(error).__name__}")
        if changeable := [name for name in self.job["setup_names"] if not self.is_constant(space.get(name))]:
            self.inexact(f"{', '.join(changeable)} of the tests' setup, which the program might change")
        try:
            exec(marshal.loads(bytes.fromhex(self.job["code"])), space)
        except Ended:
            raise
        except MemoryError:
            channel.send(self.desk, {"failed": None, "detail": "a test of the returned value ran out of memory"})
            os._exit(0)
        except BaseException as error:
            line = _line_of(error)
            if error is self.passed_on:
                self.fail("exception", "", line)
            if isinstance(error, (ImportError, OSError)) or type(error) is LookupError:  # such as a rare encoding's
                self.inexact(f"{type(error).__name__} in the tests, perhaps for want of a file that this process lacks")
            why = _error_text(error)
            if isinstance(error, AssertionError):
                why = why.removeprefix("AssertionError: ")
                why = "" if why in self.job["text"] else why  # a message that is quoted with its statement
            self.fail(None, f" ({why})" if why else "", line)
        self.end({"passed": True})


def _error_text(error: BaseException) -> str:
    try:
        return shorten(f"{type(error).__name__}: {error}", _SHOWN)
    except Exception:
        return type(error).__name__


def _line_of(error: BaseException) -> int | None:
    """Return the line of the tests that an exception passed last."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<tests>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _peak_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _judge_one(given: list[int]) -> None:
    """Judge a program with the state that a fresh interpreter has."""
    job_file, desk, talk = given
    random.seed(0)
    decimal.setcontext(decimal.Context())
    judge = Judge(talk, desk, channel.read_job(job_file))
    with contextlib.suppress(Ended):
        judge.run()
    judge.space.clear()  # else functions of the tests would keep it
    os.close(desk)
    os.close(talk)


def serve(descriptors: list[int]) -> None:
    """Judge programs until the socket that brings them is closed; ends the process, never returns.

    With each come the job, the channel on which the verdict is sent, and that to the program's process; a byte goes
    back when it is done with and the next may come.
    """
    usual = _peak_kb()
    with socket.socket(fileno=descriptors[0]) as station:
        while given := socket.recv_fds(station, 1, 3)[1]:
            _judge_one(given)
            if _peak_kb() - usual > _GROWN_KB:
                break
            station.send(b".")
    os._exit(0)
