"""MBPP+ and HumanEval+: EvalPlus's problems, which have inputs and a reference, and no expected outputs.

A record has `base_input` (the benchmark's own tests) and `plus_input` (EvalPlus's), each a list of lists of arguments.
What the reference returns for them is right; it is run in the sandbox when samples are scored. `Cases.judged_by` then
writes tests in HumanEval's form, so that these problems are judged as all others are.

What counts as right, and how inputs are kept in JSON, is EvalPlus's: evalplus/eval/__init__.py, eval/_special_oracle.py
and data/mbpp.py of github.com/evalplus/evalplus at 26d6d00.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from adept_ds.errors import UserError
from adept_ds.formats.rows import Row
from adept_ds.formats.tested import MOST_TESTS
from adept_ds.sandbox import Tests

EVALPLUS_FIELDS = ("task_id", "prompt", "canonical_solution", "entry_point", "base_input", "plus_input", "atol")
Dataset = Literal["mbpp", "humaneval"]
_LEAST_ATOL = 1e-6
"""Tolerance where a problem states none and its expected outputs are floats."""
_UNKNOWN_YET = "def check(candidate):\n    raise RuntimeError('the expected outputs are not known yet')\n"


@dataclass(frozen=True)
class Judged:
    """The tests of a problem whose expected outputs are known."""

    tests: Tests
    """All inputs."""
    base_tests: Tests
    """The benchmark's own inputs alone."""


@dataclass(frozen=True)
class Cases:
    """The inputs of a problem."""

    dataset: Dataset
    entry_point: str
    reference: str
    """A whole program."""
    base: tuple[str, ...]
    """Each input as the source of a list of arguments."""
    plus: tuple[str, ...]
    atol: float

    @property
    def _oracle(self) -> _Oracle:
        return _ORACLES[self.dataset].get(self.entry_point, _SAME)

    @property
    def expressions(self) -> list[str]:
        """What the reference has to be asked for, in the order of `base` and `plus`."""
        return [self._oracle.asked.format(call=f"{self.entry_point}(*{args})") for args in (*self.base, *self.plus)]

    @property
    def pending(self) -> Tests:
        """Tests that every program fails, until it is known what the reference returns."""
        return Tests(check=_UNKNOWN_YET, entry_point=self.entry_point, reference=self.reference)

    def judged_by(self, outputs: Sequence[Any]) -> Judged:
        """Return the tests, given what the `expressions` came to."""
        base, plus = outputs[: len(self.base)], outputs[len(self.base) :]
        own = self._with_tolerances(self.base, base)
        return Judged(self._tests(own + self._with_tolerances(self.plus, plus)), self._tests(own))

    def _with_tolerances(self, inputs: Sequence[str], outputs: Sequence[Any]) -> list[tuple[str, str, float]]:
        """Return input, source of what is expected, and tolerance; that of floats stays for all inputs after them."""
        cases, atol = [], self.atol
        for args, output in zip(inputs, outputs, strict=True):
            if atol == 0 and _is_floats(output):
                atol = _LEAST_ATOL
            cases.append((args, literal(self._oracle.expected(output, args)), atol))
        return cases

    def _tests(self, cases: Sequence[tuple[str, str, float]]) -> Tests:
        is_exact = all(atol == 0 for *_, atol in cases)
        condition = self._oracle.exact if is_exact else self._oracle.within
        functions = "".join(source for name, source in _FUNCTIONS.items() if name in condition)
        if len(cases) <= MOST_TESTS and any(_has_set(args) for args, *_ in cases):
            # A set in a variable would be handed over in an order of its own; one in a call is made where it is used.
            body = [
                f"assert {condition.format(call=f'candidate(*{args})', args=args, expected=expected, atol=atol)}"
                for args, expected, atol in cases
            ]
        else:
            # On one line, since a failed test is quoted by its lines.
            data = ", ".join(f"({args}, {expected}, {atol!r})" for args, expected, atol in cases)
            functions += f"cases = [{data}]\n"
            call = "candidate(*copy.deepcopy(args))"
            condition = condition.format(call=call, args="args", expected="expected", atol="atol")
            body = [
                "for args, expected, atol in cases:",
                f"    assert {condition}, f'for {{args}}, expected {{expected}}'",
            ]
        check = f"{functions}def check(candidate):\n" + "".join(f"    {line}\n" for line in body)
        return Tests(check=check, entry_point=self.entry_point, reference=self.reference)


def _is_floats(output: Any) -> bool:
    """Whether an output is a float, or a list or tuple of nothing but floats."""
    if isinstance(output, list | tuple):
        return bool(output) and all(isinstance(item, float) for item in output)
    return isinstance(output, float)


def _has_set(args: str) -> bool:
    nodes = ast.walk(ast.parse(args)) if "{" in args else ()
    return any(isinstance(node, ast.Set) and len(node.elts) > 1 for node in nodes)


def literal(value: Any) -> str:
    """Return the source of a plain value. UserError for one of another type."""
    kind = type(value)
    if kind is float and not math.isfinite(value):
        return f"float('{value}')"
    if kind is complex:
        return f"complex({literal(value.real)}, {literal(value.imag)})"
    if kind is int and value.bit_length() > 10_000:
        return hex(value)  # Of decimal digits Python reads some thousands only.
    if kind is dict:
        return "{" + ", ".join(f"{literal(key)}: {literal(one)}" for key, one in value.items()) + "}"
    if kind in (list, tuple, set, frozenset):
        inner = ", ".join(map(literal, value))
        if kind is list:
            return f"[{inner}]"
        if kind is tuple:
            return f"({inner},)" if value else "()"
        of_set = "{" + inner + "}" if value else "set()"
        return of_set if kind is set else f"frozenset({of_set})"
    if value is None or kind in (bool, int, float, str, bytes, range):
        return repr(value)
    raise UserError(f"a value of type {kind.__name__}")


# What counts as right


@dataclass(frozen=True)
class _Oracle:
    """How a value of a program is compared with the reference's."""

    exact: str
    """The condition on a call where no tolerance is in force."""
    within: str
    """The condition where one is."""
    asked: str = "{call}"
    """What the reference is asked for."""
    expected: Callable[[Any, str], Any] = lambda output, args: output
    """What is expected, of the reference's value and the source of the arguments."""


_FUNCTIONS = {
    "agrees": """
def close(out, expected, atol):
    if isinstance(expected, (list, tuple)):
        same = isinstance(out, (list, tuple)) and len(out) == len(expected)
        return same and all([close(one, other, atol) for one, other in zip(out, expected)])
    return (abs(out - expected) <= atol + 1e-07 * abs(expected) and abs(expected) < float('inf')) or out == expected

def agrees(out, expected, atol):
    return out == expected or (atol != 0 and type(out) == type(expected) and close(out, expected, atol))

def agrees_with_one(out, expected, atol):
    return any([agrees(out, one, atol) for one in expected])

def agrees_as_set(out, expected, atol):
    return set(out) == set(expected) or agrees(out, expected, atol)

""",
    "value_at": """
def value_at(coefficients, x):
    return sum([one * math.pow(x, power) for power, one in enumerate(coefficients)])

""",
}
"""Functions of the tests: NumPy's `allclose(out, expected, rtol=1e-07, atol=atol)` on plain values; a polynomial."""

_SAME = _Oracle("{call} == {expected}", "agrees({call}, {expected}, {atol})")
_AS_SET = _Oracle("set({call}) == set({expected})", "agrees_as_set({call}, {expected}, {atol})")
# The call's text crosses where a match object could not; of booleans the value counts.
_IS_SOMETHING = "({call}.__repr__() not in ('None', 'False')) == {expected}"
_SOMETHING = _Oracle(_IS_SOMETHING, _IS_SOMETHING, asked="{call} is not None")
_ANYTHING = _Oracle("[{call}]", "[{call}]")
_IS_ROOT = "abs(value_at({args}[0], {call})) <= {atol}"
_ROOT = _Oracle(_IS_ROOT, _IS_ROOT)


def _one_of(other: Callable[..., Any]) -> _Oracle:
    """The reference's value, or that of another reading of the task, which is given the arguments."""

    def expected(output: Any, args: str) -> tuple[Any, ...]:
        try:
            return (output, other(*ast.literal_eval(args)))
        except (TypeError, ValueError, ArithmeticError):
            return (output,)

    return _Oracle("{call} in {expected}", "agrees_with_one({call}, {expected}, {atol})", expected=expected)


def _surface(base: float, height: float) -> int:
    """Surface of a square pyramid whose height is that of its apex, rounded."""
    return round(base**2 + 2 * base * math.hypot(base / 2, height))


def _distance(first: int, second: int) -> int:
    """Sum of the differences between the digits of two numbers, the shorter one filled up with zeros."""
    length = max(len(str(first)), len(str(second)))
    digits = (map(int, str(number).zfill(length)) for number in (first, second))
    return sum(abs(one - other) for one, other in zip(*digits, strict=True))


_SETS = (
    *("similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly", "larg_nnum"),
    *("intersection_array", "find_dissimilar", "Diff"),
)
_ORACLES: dict[Dataset, dict[str, _Oracle]] = {
    "mbpp": {
        **dict.fromkeys(_SETS, _AS_SET),
        **dict.fromkeys(("check_str", "text_match_three", "text_starta_endb"), _SOMETHING),
        "are_equivalent": _ANYTHING,
        "sum_div": _one_of(lambda *args: 0),
        "surface_Area": _one_of(_surface),
        "digit_distance_nums": _one_of(_distance),
    },
    "humaneval": {"find_zero": _ROOT},
}
"""By entry point; all others must return the same, or floats that are close."""


# How inputs are kept in JSON


def _first(convert: Callable[[Any], Any]) -> Callable[[list[Any]], list[Any]]:
    return lambda args: [convert(args[0]), *args[1:]]


def _each(convert: Callable[[Any], Any]) -> Callable[[list[Any]], list[Any]]:
    return lambda args: [convert(one) for one in args]


def _of_tuples(value: Any) -> list[Any]:
    return [tuple(item) for item in value]


def _deep(value: Any) -> Any:
    return tuple(map(_deep, value)) if isinstance(value, list) else value


_LAYOUTS: tuple[tuple[tuple[int, ...], Callable[[list[Any]], list[Any]]], ...] = (
    (
        (
            *(2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424, 429, 470, 560, 579, 596, 616, 630, 726, 740, 744),
            809,
        ),
        _each(tuple),
    ),
    ((63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780), _each(_of_tuples)),
    ((75, 413, 444, 753), _first(_of_tuples)),
    ((106, 750), lambda args: [args[0], tuple(args[1])]),
    ((115,), _first(lambda items: [set(item) if isinstance(item, list) and item else {} for item in items])),
    ((124,), lambda args: [float(args[0]), complex(args[1])]),
    ((250, 307, 405, 446, 617, 720, 763, 808), _first(tuple)),
    ((252,), _first(complex)),
    ((259, 401, 445), _each(lambda value: tuple(_of_tuples(value)))),
    ((278,), _each(lambda value: tuple(tuple(item) if isinstance(item, list) else item for item in value))),
    ((580, 615, 791), _each(_deep)),
    ((722,), _first(lambda value: {key: tuple(item) for key, item in value.items()})),
)
_LAYOUT_OF = {number: layout for numbers, layout in _LAYOUTS for number in numbers}
"""Number of an MBPP task to what its arguments are made of; those of all others are what JSON says."""


@dataclass(frozen=True)
class PlusRecord:
    """A problem of EvalPlus. `where` is `file:line`; `split` is None unless the record names one."""

    where: str
    task_id: str
    prompt: str
    canonical_solution: str
    split: str | None
    cases: Cases

    @property
    def tests(self) -> Tests:
        """For the sandbox, until the expected outputs are known."""
        return self.cases.pending


class MbppPlusRecord(PlusRecord):
    """One of MBPP+: the prompt is a docstring, the solution a whole program."""


class HumanEvalPlusRecord(PlusRecord):
    """One of HumanEval+: the prompt is a signature with its docstring, the solution the body."""


_RECORDS: dict[str, tuple[type[PlusRecord], Dataset]] = {
    "mbpp": (MbppPlusRecord, "mbpp"),
    "humaneval": (HumanEvalPlusRecord, "humaneval"),
}


def is_plus(row: Row) -> bool:
    """Whether a record has EvalPlus's form."""
    return "base_input" in row.values or "plus_input" in row.values


def parse_plus_record(row: Row) -> PlusRecord:
    """Read a record of EvalPlus's form. UserError on missing, mistyped and empty fields."""
    task_id = row.get_task_id()
    name, _, number = task_id.partition("/")
    if name.lower() not in _RECORDS or not number.isdecimal():
        raise UserError(f"{row.where}: task_id {task_id!r}; expected Mbpp/NUMBER or HumanEval/NUMBER, as EvalPlus has")
    kind, dataset = _RECORDS[name.lower()]
    prompt, solution, entry_point = (row.get_text(name) for name in ("prompt", "canonical_solution", "entry_point"))
    atol = row.values.get("atol")
    if isinstance(atol, bool) or not isinstance(atol, int | float) or not 0 <= atol < math.inf:
        raise UserError(f"{row.where}: atol must be a tolerance of 0 or more, not {atol!r}")
    layout = _LAYOUT_OF.get(int(number), list) if dataset == "mbpp" else list
    base, plus = (_inputs(row, field, layout) for field in ("base_input", "plus_input"))
    if not base:
        raise UserError(f"{row.where}: base_input is empty")
    split = row.get("split", str) if "split" in row.values else None
    cases = Cases(dataset, entry_point, prompt + solution, base, plus, float(atol))
    return kind(row.where, task_id, prompt, solution, split, cases)


def _inputs(row: Row, field: str, layout: Callable[[list[Any]], list[Any]]) -> tuple[str, ...]:
    inputs = []
    for number, args in enumerate(row.get(field, list)):
        try:
            inputs.append(literal(layout(list(args))))
        except (TypeError, ValueError, IndexError, AttributeError, UserError):
            raise UserError(
                f"{row.where}: {field}[{number}] is no list of arguments as EvalPlus keeps those of this task"
            ) from None
    return tuple(inputs)
