"""Runs one program in the process that is already isolated, and answers the judge's calls of its functions.

The tests' calls of the program arrive as code, one at a time, and are evaluated among the program's names, as plain
Python would; each answer is a value or what was raised. What a value is compared with is never known
here, except in the stamped mode in which a problem's own tests have to run beside the program.
"""

from __future__ import annotations

import builtins
import contextlib
import dis
import importlib
import linecache
import marshal
import os
import sys
import types
from builtins import (  # noqa: UP029
    AssertionError,
    BaseException,
    EOFError,
    ImportError,
    MemoryError,
    RecursionError,
    SyntaxError,
    SystemExit,
    ValueError,
    compile,
    dict,
    enumerate,
    eval,
    exec,
    isinstance,
    len,
    list,
    set,
    sorted,
    type,
)
from typing import Any

from . import channel, codec
from .supervisor import PROTOCOL_EXIT

_exit, _getpid = os._exit, os.getpid
_receive, _send, _read_job = channel.receive, channel.send, channel.read_job
_encode, _decode, _describe, _type_name = codec.encode, codec.decode, codec.describe, codec.type_name
_Inexact, _suppress = codec.Inexact, contextlib.suppress
_loads_code, _from_hex = marshal.loads, bytes.fromhex
_settrace, _setprofile, _modules, _Module = sys.settrace, sys.setprofile, sys.modules, types.ModuleType
_get_instructions, _import_module = dis.get_instructions, importlib.import_module
_Code, _GENUINE = types.CodeType, dict(vars(builtins))
_PLAIN_ERRORS = {
    *(Exception, ArithmeticError, AssertionError, EOFError, IndexError, KeyError, LookupError, NotImplementedError),
    *(OverflowError, RecursionError, RuntimeError, TypeError, ValueError, ZeroDivisionError),
    *(UnicodeDecodeError, UnicodeEncodeError),
}
MODULE, FILE = "candidate", "candidate.py"
_SETUP = -1


def _raised(error: BaseException, may_be_caught: bool = False) -> dict[str, Any]:
    """Return the answer for a raised exception: its kind in the verdict's closed set, its type and its text.

    If tests may catch it, `args` are there if another process could raise the very same: an exception that has nothing
    but plain arguments.
    """
    kind = "exception"
    if isinstance(error, SystemExit):
        kind = "exit"
    elif isinstance(error, MemoryError):
        kind = "memory"
    elif isinstance(error, ImportError):
        kind = "import"
    answer = {"raised": kind, "type": _type_name(type(error)), "text": _describe(error)}
    if may_be_caught and type(error) in _PLAIN_ERRORS and not error.__dict__:
        with _suppress(_Inexact):
            answer["args"] = _encode(list(error.args))
    return answer


def _load(source: str) -> tuple[Any, Any, dict[str, Any] | None]:
    """Run the program as a module of its own; returns the module, its code and, if that failed, the answer for it."""
    module = _Module(MODULE)
    module.__file__ = FILE
    _modules[MODULE] = module
    linecache.cache[FILE] = (len(source), None, source.splitlines(True), FILE)  # for tracebacks and `inspect`
    try:
        code = compile(source.removeprefix("\ufeff"), FILE, "exec", 0, True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return module, None, {"raised": "syntax", "type": _type_name(type(error)), "text": _describe(error)}
    try:
        exec(code, module.__dict__)
    except BaseException as error:
        return module, code, _raised(error)
    return module, code, None


def _run(source: str, name: str, space: dict[str, Any]) -> None:
    exec(compile(source, name, "exec", 0, True), space)


def _names_of(code: Any) -> set[str]:
    """Return the names of its module that code, or a function in it, reads or binds."""
    names, rest = set(), [code]
    for one in rest:
        names.update([step.argval for step in _get_instructions(one) if step.opname.endswith(("_NAME", "_GLOBAL"))])
        rest += [part for part in one.co_consts if type(part) is _Code]
    return names


def _differing(code: Any, space: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return the names of the tests that mean something else beside this program than they do apart from it.

    The program must not redefine `builtins`, must bind the names of `modules` to nothing but these modules, and must
    not use what the tests bind (`bound`).
    """
    found = _names_of(code) & set(expected["bound"]) if expected["bound"] else set()
    for name in expected["builtins"]:
        if name in space and space[name] is not _GENUINE[name]:
            found.add(name)
    for name, module in expected["modules"].items():
        if name in space and space[name] is not _modules.get(module):
            found.add(name)
    return sorted(found)


def _has_own_equality(value: Any) -> bool:
    """Tell whether the program itself says what the value equals."""
    for base in type.__dict__["__mro__"].__get__(type(value)):
        names = type.__dict__["__dict__"].__get__(base)
        if "__eq__" in names:
            return names.get("__module__") == MODULE
    return False


def _answer(module: Any, request: dict[str, Any]) -> dict[str, Any]:
    value = None
    try:
        if "run" in request:
            _run(request["run"], "<test>", module.__dict__)
            return {"value": None}
        function = eval(_loads_code(_from_hex(request["call"])), module.__dict__)
        values = [_decode(form) for form in request["values"]]
        value = function(*values)
        _settrace(None)
        _setprofile(None)
        return {"value": _encode(value)}
    except _Inexact as reason:
        return {"inexact": str(reason), "own_equality": _has_own_equality(value)}
    except BaseException as error:
        _settrace(None)
        _setprofile(None)
        return _raised(error, request["catches"])


def _run_tests(space: dict[str, Any], tests: dict[str, Any]) -> dict[str, Any]:
    """Run the problem's own tests here; returns the answer of the last one that ran."""
    where = _SETUP
    try:
        for name, module in tests["modules"].items():
            space.setdefault(name, _import_module(module))
        _run(tests["setup"], "<setup>", space)
        for where, source in enumerate(tests["asserts"]):  # noqa: B007
            _run(source, "<test>", space)
        if tests["check"]:
            # The function under test may itself be called `check`: the test's names stay apart from the program's.
            apart = dict(space)
            _run(tests["check"], "<check>", apart)
            apart["check"](*([space[tests["entry_point"]]] if tests["entry_point"] else []))
    except BaseException as error:
        return _raised(error) | {"where": where, "assertion": isinstance(error, AssertionError)}
    return {"done": True}


def _set_up(space: dict[str, Any], code: Any, job: dict[str, Any]) -> dict[str, Any]:
    try:
        _run(job["setup"], "<setup>", space)
    except BaseException as error:
        return _raised(error) | {"where": _SETUP}
    return {"loaded": _differing(code, space, job["names"])}


def serve(descriptors: list[int]) -> None:
    """Answer the judge until it closes the channel; ends the process, never returns.

    `descriptors` are the job (the program, and its tests only if they have to run here) and the channel.
    """
    job_file, talk = descriptors
    pid = _getpid()
    try:
        job = _read_job(job_file)
        module, code, failed = _load(job["source"])
        if _getpid() != pid:
            _exit(0)  # a child that the program forked and let run on
        _settrace(None)
        _setprofile(None)
        if failed is None:
            space = module.__dict__
            failed = _run_tests(space, job["tests"]) if "tests" in job else _set_up(space, code, job)
        _send(talk, failed)
        if "tests" in job:
            _exit(0)
        while True:
            answer = _answer(module, _receive(talk))
            if _getpid() != pid:
                _exit(0)
            _send(talk, answer)
    except EOFError:
        _exit(0)
    except BaseException:
        _exit(PROTOCOL_EXIT)
