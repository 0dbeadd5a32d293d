"""Runs one program in the process that is already isolated, and answers the grader's calls of its functions.

Frames on the channel are a 4-byte length and JSON. The grader sends the program, then one call after another; each
answer is a tagged value or what was raised. Nothing that decides a verdict is known here, except in the stamped mode in
which a problem's own tests have to run beside the program.
"""

from __future__ import annotations

import os
import struct
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
    exec,
    int,
    isinstance,
    len,
    str,
    type,
)
from typing import Any

from . import codec
from .supervisor import PROTOCOL_EXIT

_read, _write, _exit, _getpid = os.read, os.write, os._exit, os.getpid
_pack, _unpack = struct.Struct("!I").pack, struct.Struct("!I").unpack
_encode, _decoder, _describe, _type_name = codec.encode, codec.Decoder, codec.describe, codec.type_name
_dumps, _loads, _shorten = codec.dumps, codec.loads, codec.shorten
_settrace, _setprofile, _modules, _Module = sys.settrace, sys.setprofile, sys.modules, types.ModuleType
MODULE = "candidate"


def _receive(channel: int) -> Any:
    (length,) = _unpack(_exactly(channel, 4))
    return _loads(_exactly(channel, length).decode("ascii"))


def _exactly(channel: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = _read(channel, count - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def _send(channel: int, message: Any) -> None:
    data = _dumps(message).encode("ascii")
    data = _pack(len(data)) + data
    while data:
        data = data[_write(channel, data) :]


def _raised(error: BaseException) -> dict[str, Any]:
    """Return the answer for a raised exception: its kind in the verdict's closed set, its type and its text."""
    kind = "exception"
    if isinstance(error, SystemExit):
        kind = "exit"
    elif isinstance(error, MemoryError):
        kind = "memory"
    elif isinstance(error, ImportError):
        kind = "import"
    return {"raised": kind, "type": _type_name(type(error)), "text": _describe(error)}


def _load(source: str) -> tuple[Any, dict[str, Any] | None]:
    """Run the program as a module of its own; returns the module and, if that failed, the answer that says so."""
    module = _Module(MODULE)
    _modules[MODULE] = module
    try:
        code = compile(source.removeprefix("\ufeff"), "<candidate>", "exec", 0, True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return module, {"raised": "syntax", "type": _type_name(type(error)), "text": _describe(error)}
    try:
        exec(code, module.__dict__)
    except BaseException as error:
        return module, _raised(error)
    return module, None


def _call(module: Any, name: str, args: Any, kwargs: Any) -> Any:
    try:
        function = module.__dict__[name]
    except KeyError:
        raise NameError(f"name {name!r} is not defined") from None
    return function(*args, **kwargs)


def _answer(module: Any, request: dict[str, Any]) -> dict[str, Any]:
    decoder = _decoder(lambda name, args, kwargs: _call(module, name, args, kwargs), numpy=True)
    try:
        form = ["call", *request["call"]]
        value = decoder.tagged(form[0], form[1:], 0)
        _settrace(None)
        _setprofile(None)
        return {"value": _encode(value)}
    except BaseException as error:
        _settrace(None)
        _setprofile(None)
        return _raised(error)


def _run_tests(module: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Run the problem's own tests here; returns the answer of the last one that ran."""
    space = module.__dict__
    where = -1
    try:
        if job["setup"]:
            exec(compile(job["setup"], "<setup>", "exec", 0, True), space)
        for where, source in enumerate(job["asserts"]):  # noqa: B007
            exec(compile(source, "<test>", "exec", 0, True), space)
        if job["check"]:
            # A program may itself define `check`: the test's names stay apart from the program's.
            apart = dict(space)
            exec(compile(job["check"], "<check>", "exec", 0, True), apart)
            apart["check"](*([space[job["entry_point"]]] if job["entry_point"] else []))
    except BaseException as error:
        return _raised(error) | {"where": where, "assertion": isinstance(error, AssertionError)}
    return {"done": True}


def serve(channel: int) -> None:
    """Answer the grader until it closes the channel; ends the process, never returns."""
    pid = _getpid()
    try:
        job = _receive(channel)
        module, failed = _load(job["source"])
        if _getpid() != pid:
            _exit(0)  # a child that the program forked and let run on
        _settrace(None)
        _setprofile(None)
        if failed is None and job["tests"] is not None:
            failed = _run_tests(module, job["tests"])
        _send(channel, failed or {"loaded": True})
        while True:
            answer = _answer(module, _receive(channel))
            if _getpid() != pid:
                _exit(0)
            _send(channel, answer)
    except EOFError:
        _exit(0)
    except BaseException:
        _exit(PROTOCOL_EXIT)
