"""Plain values as tagged JSON, the only form in which values enter or leave the candidate's process.

`None`, booleans, strings, floats and small integers stand for themselves; everything else is a list whose first item is
a tag. Subclasses are lowered to their base, so an object with a lying `__eq__` arrives as the plain value beneath it.
An object without a plain value arrives as `Opaque`, which equals nothing. No pickle: decoding builds plain types only.
Arrays and scalars of numpy, where it is allowed, travel as their bytes, with a type out of a closed set and a shape.
"""

from __future__ import annotations

import builtins
import collections
import datetime
import decimal
import fractions
import json
import math
import re
import sys
from json.encoder import c_make_encoder, encode_basestring_ascii  # type: ignore[attr-defined]
from json.scanner import c_make_scanner  # type: ignore[attr-defined]
from typing import Any

MAX_DEPTH = 100
MAX_NODES = 300_000
MAX_COLLISIONS = 50
# Two arrays that a comparison broadcasts against one another fill the product of their sizes.
MAX_ARRAY_ITEMS, MAX_ARRAY_BYTES = 1 << 14, 1 << 20

Date, DateTime, Time, Delta = datetime.date, datetime.datetime, datetime.time, datetime.timedelta
Decimal, Fraction, OrderedDict, deque = decimal.Decimal, fractions.Fraction, collections.OrderedDict, collections.deque
# The C parts of json directly: its Python parts look up builtins that a candidate may have rebound.
_scan = c_make_scanner(json.JSONDecoder())
_chunks = c_make_encoder(None, None, encode_basestring_ascii, None, ":", ",", False, False, True)
# Bound once, because a candidate may rebind what it finds in `builtins`.
from builtins import (  # noqa: E402, UP029
    BaseException,
    ValueError,
    bool,
    bytearray,
    bytes,
    complex,
    dict,
    enumerate,
    float,
    frozenset,
    hash,
    id,
    int,
    issubclass,
    iter,
    len,
    list,
    max,
    range,
    set,
    slice,
    str,
    tuple,
    type,
)

_SMALL = 1 << 53
_NUMPY_TYPE = re.compile(r"[<>|](b1|[iu][1248]|f[248]|c8|c16|[SU]\d{1,6}|[mM]8(\[\w{1,4}\])?)").fullmatch
_prod, _modules = math.prod, sys.modules
_VIEWS: dict[type, str] = {type({}.keys()): "keys", type({}.items()): "items", type({}.values()): "values"}
_TYPE_NAMES = {
    value: name for name, value in vars(builtins).items() if isinstance(value, type) and not name.startswith("_")
}
_TYPES = {name: value for value, name in _TYPE_NAMES.items()}


def dumps(form: Any) -> str:
    """Return `form` as JSON."""
    return "".join(_chunks(form, 0))


def loads(text: str) -> Any:
    """Return what JSON `text` stands for."""
    return _scan(text, 0)[0]


class Limit(ValueError):
    """A value is too large, too deep, or not in the codec's form."""


class Opaque:
    """A value that has no plain form; equal to nothing but itself."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name} object>"


class Nested:
    """A call inside the arguments of another one, made in the candidate's process with the other."""

    def __init__(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.name, self.args, self.kwargs = name, args, kwargs


class _Encoder:
    def __init__(self) -> None:
        self.nodes = 0
        self.open: set[int] = set()

    def many(self, values: Any, depth: int) -> list[Any]:
        return [self.value(value, depth) for value in values]

    def value(self, x: Any, depth: int) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES or depth > MAX_DEPTH:
            raise Limit("value too large" if self.nodes > MAX_NODES else "value nested too deeply")
        kind = type(x)
        if x is None or kind is bool or kind is float:
            return x
        if kind is str:
            return x
        if kind is int:
            return x if -_SMALL < x < _SMALL else ["i", hex_of(x)]
        if id(x) in self.open:
            raise Limit("cyclic value")
        self.open.add(id(x))
        try:
            return self.compound(x, kind, depth + 1)
        finally:
            self.open.discard(id(x))

    def compound(self, x: Any, kind: type, depth: int) -> Any:
        numpy = _modules.get("numpy")
        if numpy is not None and issubclass(kind, (numpy.ndarray, numpy.generic)):
            return self.array(x, numpy.generic if issubclass(kind, numpy.generic) else numpy.ndarray)
        if issubclass(kind, list):
            return ["l", *self.many(list.__iter__(x), depth)]
        if issubclass(kind, tuple):
            return ["t", *self.many(tuple.__iter__(x), depth)]
        if issubclass(kind, OrderedDict):
            return ["od", *self.pairs(OrderedDict.items(x), depth)]
        if issubclass(kind, dict):
            return ["d", *self.pairs(dict.items(x), depth)]
        if issubclass(kind, set):
            return ["s", *self.many(set.__iter__(x), depth)]
        if issubclass(kind, frozenset):
            return ["fs", *self.many(frozenset.__iter__(x), depth)]
        if issubclass(kind, int):
            return self.value(int.__pos__(x), depth)
        if issubclass(kind, float):
            return float.__pos__(x)
        if issubclass(kind, str):
            return str.__str__(x)
        if issubclass(kind, (bytes, bytearray)):
            base = bytearray if issubclass(kind, bytearray) else bytes
            return ["ba" if base is bytearray else "b", base.hex(x)]
        if issubclass(kind, complex):
            x = complex.__pos__(x)
            return ["c", x.real, x.imag]
        if kind in _VIEWS:
            tag = _VIEWS[kind]
            return [tag, *(self.pairs(x, depth) if tag == "items" else self.many(x, depth))]
        if issubclass(kind, Decimal):
            return ["D", Decimal.__str__(x)]
        if issubclass(kind, Fraction):
            return ["F", hex_of(x._numerator), hex_of(x._denominator)]
        if kind is range or kind is slice:
            return ["r" if kind is range else "sl", *self.many((x.start, x.stop, x.step), depth)]
        if issubclass(kind, deque):
            return ["q", *self.many(deque.__iter__(x), depth)]
        if issubclass(kind, DateTime):
            return ["dt", DateTime.isoformat(x)]
        if issubclass(kind, Date):
            return ["da", Date.isoformat(x)]
        if issubclass(kind, Time):
            return ["ti", Time.isoformat(x)]
        if issubclass(kind, Delta):
            return ["de", x.days, x.seconds, x.microseconds]
        if kind is type and x in _TYPE_NAMES:
            return ["ty", _TYPE_NAMES[x]]
        if kind is Nested:
            pairs = [[name, self.value(value, depth)] for name, value in x.kwargs.items()]
            return ["call", x.name, self.many(x.args, depth), pairs]
        if x is Ellipsis or x is NotImplemented:
            return ["..." if x is Ellipsis else "ni"]
        if hasattr_of(kind, "__next__"):
            return ["it", *self.many(self.drain(x), depth)]
        return ["o", str.__str__(type.__dict__["__name__"].__get__(kind))[:100]]

    def array(self, x: Any, base: Any) -> list[Any]:
        """Return a numpy scalar (as an array without a shape) or array, by `base`, past what its subclass redefines."""
        dtype, shape = base.dtype.__get__(x).str, base.shape.__get__(x)
        if not _NUMPY_TYPE(dtype):
            raise Limit(f"numpy type {dtype[:20]}")
        _check_size(shape, base.nbytes.__get__(x))
        return ["np", dtype, None if base.__name__ == "generic" else list(shape), bytes.hex(base.tobytes(x))]

    def pairs(self, items: Any, depth: int) -> list[Any]:
        return [self.value(part, depth) for pair in items for part in pair]

    def drain(self, iterator: Any) -> Any:
        """Yield the iterator's items up to the node limit; an endless one is cut there rather than refused."""
        for item in iterator:
            if self.nodes >= MAX_NODES // 2:
                return
            yield item


def hex_of(x: int) -> str:
    """Return `x` in base 16: linear in its length, and free of the interpreter's limit on decimal digits."""
    return int.__format__(x, "x")


def hasattr_of(kind: type, name: str) -> bool:
    """Tell whether the type itself (not the instance, which may lie) has the attribute."""
    for base in type.__dict__["__mro__"].__get__(kind):  # noqa: SIM110  (`any` is within a candidate's reach)
        if name in type.__dict__["__dict__"].__get__(base):
            return True
    return False


def encode(value: Any) -> Any:
    """Return the JSON form of `value`; what cannot be carried is opaque. What its iterators raise passes through."""
    try:
        return _Encoder().value(value, 0)
    except Limit as error:
        return ["o", f"{str.__str__(type.__dict__['__name__'].__get__(type(value)))[:100]} ({error})"]


def _refuse_collisions(items: list[Any]) -> None:
    """Refuse items chosen to share one hash: a set of them, built here or by a test, would take quadratic time."""
    if len(items) <= MAX_COLLISIONS:
        return
    groups: dict[int, list[Any]] = {}
    for item in items:
        try:
            group = groups.setdefault(hash(item), [])
        except TypeError:
            continue
        if item not in group:
            group.append(item)
            if len(group) > MAX_COLLISIONS:
                raise Limit("values with colliding hashes")


def _check_size(shape: Any, size: int) -> None:
    if size > MAX_ARRAY_BYTES or max((_prod(shape), *shape)) > MAX_ARRAY_ITEMS:
        raise Limit("array too large")


class Decoder:
    """Turns the JSON form back into values.

    `call` runs a nested call, `numpy` says whether arrays may come; without them such a form is refused.
    """

    def __init__(self, call: Any = None, numpy: bool = False) -> None:
        self.call, self.numpy = call, numpy
        self.nodes = 0

    def many(self, forms: list[Any], depth: int) -> list[Any]:
        return [self.value(form, depth) for form in forms]

    def value(self, form: Any, depth: int = 0) -> Any:
        """Return the value of `form`; raises `Limit` for anything that `encode` cannot have written."""
        self.nodes += 1
        if self.nodes > MAX_NODES or depth > MAX_DEPTH:
            raise Limit("value too large or nested too deeply")
        if type(form) is not list:
            if form is None or type(form) in (bool, int, float, str):
                return form
            raise Limit("not a tagged value")
        try:
            return self.tagged(form[0], form[1:], depth + 1)
        except Limit:
            raise
        except (ValueError, TypeError, KeyError, IndexError, ArithmeticError, AttributeError) as error:
            raise Limit(f"not a tagged value: {type(error).__name__}") from None

    def tagged(self, tag: str, rest: list[Any], depth: int) -> Any:
        if tag in ("l", "t", "s", "fs", "q", "keys", "values", "it"):
            items = self.many(rest, depth)
            _refuse_collisions(items)
            return _SEQUENCES[tag](items)
        if tag in ("d", "od", "items"):
            parts = self.many(rest, depth)
            _refuse_collisions(parts[::2])
            mapping = (OrderedDict if tag == "od" else dict)(zip(parts[::2], parts[1::2], strict=True))
            return mapping.items() if tag == "items" else mapping
        if tag == "i":
            return int(rest[0], 16)
        if tag in ("b", "ba"):
            return (bytes if tag == "b" else bytearray).fromhex(rest[0])
        if tag == "c":
            return complex(*rest)
        if tag == "D":
            return Decimal(rest[0])
        if tag == "F":
            return Fraction(int(rest[0], 16), int(rest[1], 16))
        if tag in ("r", "sl"):
            return (range if tag == "r" else slice)(*self.many(rest, depth))
        if tag in ("dt", "da", "ti"):
            return _CALENDAR[tag](rest[0])
        if tag == "de":
            return Delta(*rest)
        if tag == "ty":
            return _TYPES[rest[0]]
        if tag in ("...", "ni"):
            return Ellipsis if tag == "..." else NotImplemented
        if tag == "np" and self.numpy:
            return _array(*rest)
        if tag == "o":
            return Opaque(str(rest[0])[:200])
        if tag == "call" and self.call is not None:
            name, args, pairs = rest
            return self.call(name, self.many(args, depth), {key: self.value(form, depth) for key, form in pairs})
        raise Limit(f"unknown tag {str(tag)[:20]!r}")


_CALENDAR: dict[str, Any] = {"dt": DateTime.fromisoformat, "da": Date.fromisoformat, "ti": Time.fromisoformat}
_SEQUENCES: dict[str, Any] = {
    "l": list,
    "t": tuple,
    "s": set,
    "fs": frozenset,
    "q": deque,
    "keys": lambda items: dict.fromkeys(items).keys(),
    "values": lambda items: dict(enumerate(items)).values(),
    "it": iter,
}


def _array(dtype: str, shape: list[int] | None, data: str) -> Any:
    """Return a numpy array, or a scalar where there is no shape; never one of objects."""
    import numpy

    content = bytes.fromhex(data)
    if not _NUMPY_TYPE(dtype) or not all(type(length) is int and length >= 0 for length in shape or ()):
        raise Limit("not an array")
    _check_size(shape or (), len(content))
    array = numpy.frombuffer(content, dtype).reshape(shape or ()).copy()
    return array[()] if shape is None else array


def decode(form: Any, numpy: bool = False) -> Any:
    """Return the value of a form that a candidate's process sent; raises `Limit` if it is malformed or too large."""
    return Decoder(numpy=numpy).value(form)


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


__all__ = ["Decoder", "Limit", "Nested", "Opaque", "decode", "describe", "dumps", "encode", "loads", "shorten"]
