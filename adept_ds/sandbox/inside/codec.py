"""Values between a program's process and the judge's, as tagged JSON: exactly, or not at all.

A value crosses only if what arrives cannot be told from what was sent by anything that a test does with it: the types
listed in `encode`, no subclasses, nothing whose identity or hidden state would matter. Everything else is `Inexact`,
and the tests then run beside the program. None, booleans, strings, floats and small integers stand for themselves; the
rest is a list whose first item is a tag. No pickle: decoding builds plain types only.
"""

from __future__ import annotations

import decimal
import json
import math
import re
import sys
from json.encoder import c_make_encoder, encode_basestring_ascii  # type: ignore[attr-defined]
from json.scanner import c_make_scanner  # type: ignore[attr-defined]
from typing import Any

MAX_DEPTH = 100
MAX_NODES = 2_000_000
MAX_ARRAY_BYTES = 1 << 20

# The C parts of json directly: its Python parts look up builtins that a program may have rebound.
_scan = c_make_scanner(json.JSONDecoder())
_chunks = c_make_encoder(None, None, encode_basestring_ascii, None, ":", ",", False, False, True)
# Bound once, because a program may rebind what it finds in `builtins`.
from builtins import (  # noqa: E402, UP029
    BaseException,
    ValueError,
    all,
    bool,
    bytes,
    complex,
    dict,
    enumerate,
    float,
    frozenset,
    id,
    int,
    len,
    list,
    range,
    set,
    str,
    tuple,
    type,
    zip,
)

_SMALL = 1 << 53
_VIEWS: dict[type, str] = {type({}.keys()): "keys", type({}.items()): "items", type({}.values()): "values"}
Decimal, _context, _CONTEXT = decimal.Decimal, decimal.getcontext, str(decimal.getcontext())
_digits, _DIGITS = sys.get_int_max_str_digits, sys.get_int_max_str_digits()
_SEQUENCES: dict[str, type] = {"l": list, "t": tuple, "s": set, "fs": frozenset}
_TAGS = {kind: tag for tag, kind in _SEQUENCES.items()}
_SURROGATE = re.compile("[\ud800-\udfff]").search
_NUMPY_TYPE = re.compile(r"[<>|](b1|[iu][1248]|f[248]|c8|c16|[SU]\d{1,6}|[mM]8(\[\w{1,4}\])?)").fullmatch
_prod, _modules = math.prod, sys.modules


def dumps(form: Any) -> str:
    """Return `form` as JSON."""
    return "".join(_chunks(form, 0))


def loads(text: str) -> Any:
    """Return what JSON `text` stands for."""
    return _scan(text, 0)[0]


class Inexact(ValueError):
    """A value that another process could not be given unchanged; the text says what it is."""


class Malformed(ValueError):
    """A form that `encode` cannot have written."""


class _Encoder:
    def __init__(self) -> None:
        self.nodes = 0
        self.numbers: dict[int, int] = {}

    def value(self, x: Any, depth: int = 0) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES or depth > MAX_DEPTH:
            raise Inexact(
                "a value that is too large" if self.nodes > MAX_NODES else "a value that is nested too deeply"
            )
        kind = type(x)
        if x is None or kind is bool:
            return x
        if kind is str:
            if _SURROGATE(x):
                raise Inexact("a string with a surrogate")
            return x
        if kind is float:
            if x != x:
                raise Inexact("a float that is not a number: comparisons of lists see which one it is")
            return x
        if kind is int:
            if -_SMALL < x < _SMALL:
                return x
            if _digits() != _DIGITS:
                raise Inexact("an integer, while the interpreter's limit on digits is not the usual one")
            return ["i", int.__format__(x, "x")]
        if kind is complex:
            return ["c", self.value(x.real), self.value(x.imag)]
        if kind is bytes:
            return ["b", bytes.hex(x)]
        if kind is range:
            return ["r", self.value(x.start), self.value(x.stop), self.value(x.step)]
        if kind is Decimal:
            if x.is_nan() or str(_context()) != _CONTEXT:
                raise Inexact("a Decimal in a context that is not the usual one, or one that is not a number")
            return ["D", str(x)]
        if kind in _VIEWS:
            return ["v", _VIEWS[kind], *[self.value(item, depth + 1) for item in x]]
        if kind is not dict and kind not in _TAGS:
            numpy = _modules.get("numpy")
            if numpy is not None and (kind is numpy.ndarray or kind in set(numpy.sctypeDict.values())):
                return _encode_array(x)
            raise Inexact(f"a value of type {type_name(kind)}")
        if kind is tuple or kind is frozenset:
            return [_TAGS[kind], *[self.value(item, depth + 1) for item in x]]
        if id(x) in self.numbers:  # one object in two places, or in itself
            return ["@", self.numbers[id(x)]]
        self.numbers[id(x)] = len(self.numbers)
        if kind is dict:
            return ["d", *[self.value(part, depth + 1) for pair in x.items() for part in pair]]
        return [_TAGS[kind], *[self.value(item, depth + 1) for item in x]]


def encode(value: Any) -> Any:
    """Return the JSON form of `value`; raises `Inexact` if there is none that keeps all of it.

    There is one for None, bool, int, float, complex, str, bytes, range, Decimal, list, tuple, dict, its views, set and
    frozenset, and for arrays and scalars of numpy that hold no objects. A list, dict or set in two places stays one.
    """
    return _Encoder().value(value)


class _Decoder:
    def __init__(self) -> None:
        self.shared: list[Any] = []

    def many(self, forms: list[Any], depth: int) -> list[Any]:
        return [self.value(form, depth + 1) for form in forms]

    def value(self, form: Any, depth: int = 0) -> Any:
        kind = type(form)
        if form is None or kind is bool or kind is str or kind is int or kind is float:
            return form
        if kind is not list or not form or depth > MAX_DEPTH:
            raise Malformed("not a tagged value")
        tag, rest = form[0], form[1:]
        if tag == "@":
            return self.shared[rest[0]]
        if tag in ("l", "s", "d"):
            made: Any = _SEQUENCES[tag]() if tag != "d" else {}
            self.shared.append(made)
            parts = self.many(rest, depth)
            if tag == "d":
                made.update(zip(parts[::2], parts[1::2], strict=True))
            elif tag == "l":
                made.extend(parts)
            else:
                made.update(parts)
            return made
        if tag in ("t", "fs"):
            return _SEQUENCES[tag](self.many(rest, depth))
        if tag == "i":
            return int(rest[0], 16)
        if tag == "c":
            return complex(*rest)
        if tag == "b":
            return bytes.fromhex(*rest)
        if tag == "r":
            return range(*self.many(rest, depth))
        if tag == "D":
            return Decimal(*rest)
        if tag == "v":
            return _view(rest[0], self.many(rest[1:], depth))
        if tag == "np":
            return _decode_array(*rest)
        raise Malformed(f"unknown tag {str(tag)[:20]!r}")


def decode(form: Any) -> Any:
    """Return the value of a form; raises `Malformed` for anything that `encode` cannot have written."""
    try:
        return _Decoder().value(form)
    except Malformed:
        raise
    except (ValueError, TypeError, IndexError, ArithmeticError, ImportError) as error:
        raise Malformed(f"not a tagged value: {type(error).__name__}") from None


def _view(which: str, items: list[Any]) -> Any:
    """Return a dictionary's view of these items."""
    if which == "keys":
        return dict.fromkeys(items).keys()
    return dict(items).items() if which == "items" else dict(enumerate(items)).values()


def _encode_array(x: Any) -> Any:
    """Return the form of a numpy array, or of a scalar as an array without a shape."""
    if not _NUMPY_TYPE(x.dtype.str) or x.nbytes > MAX_ARRAY_BYTES:
        raise Inexact(f"a numpy array of {x.dtype}, {x.nbytes} bytes")
    shape = None if type(x) is not _modules["numpy"].ndarray else list(x.shape)
    return ["np", x.dtype.str, shape, bytes.hex(x.tobytes())]


def _decode_array(dtype: str, shape: list[int] | None, data: str) -> Any:
    import numpy

    if not _NUMPY_TYPE(dtype) or not all(type(length) is int and length >= 0 for length in shape or ()):
        raise Malformed("not an array")
    array = numpy.frombuffer(bytes.fromhex(data), dtype).reshape(shape or ()).copy()
    return array[()] if shape is None else array


def shorten(text: str, limit: int = 300) -> str:
    """Cut `text` in the middle to at most `limit` characters."""
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def type_name(kind: type) -> str:
    """Return a type's own name, past any metaclass that redefines it."""
    return str.__str__(type.__dict__["__name__"].__get__(kind))[:100]


def describe(error: BaseException) -> str:
    """Return the exception's text, shortened, whatever its `__str__` does."""
    try:
        return shorten(str.__str__(str(error)))
    except BaseException:
        return "<no text: __str__ failed>"


__all__ = ["Inexact", "Malformed", "decode", "describe", "dumps", "encode", "loads", "shorten"]
