"""Random programs and tests, judged by the sandbox and by plain Python in one interpreter: the verdicts must agree.

    python tests/sandbox_fuzz.py [--pairs 20000] [--seed 1] [--isolation auto]

A verdict may differ from plain Python's only if it is stamped `in_process`; prints how many were, for what, and every
pair that differs. Plain Python is a forked process each time, with the same hash seed as the sandbox has.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import re
import signal
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from adept_ds.sandbox import Limits, Program, Sandbox, Tests

_LITERALS = (
    *("0", "1", "-3", "2.5", "'ab'", "''", "'b a'", "None", "True", "b'x'", "(1, 2)", "[3, 1, 2]", "[]", "['b', 'a']"),
    *("[[1], [2]]", "{'a': 1, 'b': [2]}", "{1, 2, 3}", "{'x', 'y', 'zz'}", "[(1, 'a'), (0, 'b')]", "{}", "10 ** 20"),
    *("float('inf')", "float('nan')", "1j", "range(3)", "[None, False]", "{3: {4}}", "-0.0", "chr(0xD800)", "()"),
)
_VALUES = (
    *("x", "[x]", "[x, x]", "(x,)", "{1: x}", "sorted(x)", "list(x)", "set(x)", "str(x)", "x[0]", "x[::-1]", "len(x)"),
    *("x + x", "x * 2", "iter(x)", "(v for v in x)", "map(str, x)", "Counter(x)", "Pair(x, 1)", "Box(x)", "lambda: x"),
    *("type(x)", "x == 1", "dict.fromkeys(x, 0)", "frozenset(x)", "kept", "max(x)", "x is None", "repr(x)", "not x"),
    *("{v: v for v in x}", "[v for v in x if v]", "1 / x", "x.append(9)", "x.sort()", "x.pop()", "x.update(a=2)"),
    *("[[0]] * 2", "Half.ONE", "OrderedDict.fromkeys(x)", "deque(x)", "x.keys()", "x.items()", "bytearray(b'x')"),
    *("Fraction(1, 3)", "Decimal('1.5')", "hash(x) == hash(x)", "print(x)", "Same()", "ValueError('a')", "abs(x)"),
)
_HEAD = """
from collections import Counter, OrderedDict, deque, namedtuple
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
import math
Pair = namedtuple("Pair", "a b")
class Half(IntEnum): ONE = 1
class Box:
    def __init__(self, value): self.value = value
    def __len__(self): return 1
    def __eq__(self, other): return isinstance(other, Box) and self.value == other.value
    def get(self): return self.value
class Same:
    def __str__(self): return "same"
class Wrong(ValueError): pass
kept = []
"""
_STATEMENTS = (
    *("kept.append(x)", "x.append(7)", "x.sort()", "x.clear()", "x[0] = 5", "pass", "pass", "pass", "global n; n = 3"),
    *("if not x: raise ValueError('empty', x)", "if not x: raise Wrong('w')", "if x == 1: return 'one'", "y = x"),
)
_SHADOWS = (
    "",
    "",
    "",
    "",
    "",
    "",
    "sorted = list",
    "def len(x): return 1",
    "a = 4",
    "n = 5",
    "math = None",
    "list = tuple",
)
_EXPRESSIONS = (
    *("{c}", "{c}", "{c}", "{c}", "sorted({c})", "len({c})", "str({c})", "list({c})", "set({c})", "type({c}).__name__"),
    *("{c}[0]", "[{c}, {c}]", "({c}, {c2})", "{c} + {c2}", "{c} == {c2}", "{c} is None", "{c} is {v}", "repr({c})"),
    *("[f(v) for v in {v}]", "{c}.value", "{c}.get()", "callable({c})", "isinstance({c}, list)", "hash({c}) == 1"),
    *("f({v}) if {v} else g({v})", "any({c} == v for v in [1, 2])", "list(map(f, [1, 2]))", "(lambda q: f(q))({v})"),
    *(
        "math.floor({c})",
        "'{{}}'.format({c})",
        'f"""{{ {c} }}"""',
        "dict({c})",
        "max({c}, {c2})",
        "{c} in [1, 'one', None]",
    ),
    *("id({c}) == id({v})", "bool({c})", "next(iter({c}))", "{v}", "({c}, {v})", "{c} and {v}", "copy.deepcopy({c})"),
    *(
        "next({c})",
        "{c}()",
        "{c}.a",
        "tuple({c})",
        "json.dumps({c})",
        "{c}['b']",
        "min({c})",
        "sum({c})",
        "eval(str({c}))",
    ),
)


class _Pair:
    """One random program with its tests."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        functions = [self.function(name) for name in "fg"]
        self.program = "\n".join([_HEAD, rng.choice(_SHADOWS), *functions])
        self.variables: list[str] = []
        self.asserts: list[str] = []
        space: dict[str, object] = {"__name__": "candidate"}
        try:
            exec(self.program, space)
        except Exception:  # a shadow can break the head
            space = {}
        for _ in range(rng.randint(1, 4)):
            self.asserts.append(self.statement(space))

    def function(self, name: str) -> str:
        body = [f"    {self.rng.choice(_STATEMENTS)}" for _ in range(self.rng.randint(0, 2))]
        kind = "yield" if self.rng.random() < 0.03 else "return"
        return "\n".join([f"def {name}(x, n=0):", *body, f"    {kind} {self.rng.choice(_VALUES)}"])

    def value(self) -> str:
        if self.variables and self.rng.random() < 0.5:
            return self.rng.choice(self.variables)
        return self.rng.choice(_LITERALS)

    def call(self) -> str:
        inner = self.value()
        if self.rng.random() < 0.1:
            inner = self.rng.choice([f"g({inner})", f"[{inner}]", f"x={inner}", f"{inner}, n=2", "lambda: 1", "len"])
        return f"{self.rng.choice('ffg')}({inner})"

    def expression(self) -> str:
        return self.rng.choice(_EXPRESSIONS).format(c=self.call(), c2=self.call(), v=self.value())

    def statement(self, space: dict[str, object]) -> str:
        choice = self.rng.random()
        if choice < 0.25:
            name = self.rng.choice("abn")
            self.variables.append(name)
            return self.executed(f"{name} = {self.value() if self.rng.random() < 0.6 else self.call()}", space)
        if choice < 0.3 and self.variables:
            return self.executed(f"{self.rng.choice(self.variables)}.append(4)", space)
        if choice < 0.36:
            error = self.rng.choice(["ValueError", "Exception", "TypeError", "(KeyError, IndexError)"])
            text = f"try:\n    r = {self.call()}\nexcept {error} as e:\n    r = str(e)\nassert r != 'never'"
            return self.executed(text, space)
        if choice < 0.42:
            return self.executed(f"for v in {self.value()}:\n    assert f(v) == f(v)", space)
        if choice < 0.45:
            return self.executed(self.rng.choice(["import math", "import copy, json", "from math import floor"]), space)
        for _ in range(12):  # mostly what has a value, and is true, at this point
            expression = self.expression()
            try:
                found = repr(eval(expression, space))
                eval(found, {"inf": 1, "nan": 1})
                break
            except BaseException:
                found = self.rng.choice(_LITERALS)
        found = self.rng.choice(_LITERALS) if self.rng.random() < 0.1 else found
        found = re.sub(r"(?<!')\b(nan|inf)\b(?!')", r"float('\1')", found)
        text = f"assert {expression} == {found}"
        with contextlib.suppress(SyntaxError):  # a replacement inside of a string
            compile(text, "<test>", "exec")
            return text
        return f"assert {expression} == 0"

    @staticmethod
    def executed(text: str, space: dict[str, object]) -> str:
        with contextlib.suppress(BaseException):
            exec(text, space)
        return text

    def passes_plainly(self) -> bool:
        """Run program and tests in one process."""
        pid = os.fork()
        if pid == 0:
            signal.alarm(5)
            null = os.open(os.devnull, os.O_RDWR)
            for number in (0, 1, 2):
                os.dup2(null, number)
            sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            try:
                space: dict[str, object] = {"__name__": "candidate"}
                exec(self.program, space)
                for name in ("math", "copy", "json"):
                    space.setdefault(name, __import__(name))
                for text in self.asserts:
                    exec(text, space)
            except BaseException:
                os._exit(1)
            os._exit(0)
        return os.waitpid(pid, 0)[1] == 0


def main() -> int:
    """Return 1 if a verdict differs that is not stamped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--isolation", default="auto")
    flags = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONHASHSEED": "0"})
    sys.stdout, console = io.StringIO(), sys.stdout  # programs print
    warnings.simplefilter("ignore")
    rng, started = random.Random(flags.seed), time.monotonic()
    pairs = {str(number): _Pair(rng) for number in range(flags.pairs)}
    expected = {number: pair.passes_plainly() for number, pair in pairs.items()}
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    differing = 0
    programs = [Program(number, pair.program, Tests(tuple(pair.asserts))) for number, pair in pairs.items()]
    with Sandbox(flags.isolation, Limits(wall_seconds=10, cpu_seconds=5)) as sandbox:
        for verdict in sandbox.run(programs):
            passed = verdict.status == "passed"
            counts[f"{'passed' if passed else 'not passed'}{' in process' if verdict.in_process else ''}"] += 1
            if verdict.in_process:
                reasons[verdict.reason[:40]] += 1
            if passed != expected[verdict.id]:
                counts["differs" + (", stamped" if verdict.in_process else "")] += 1
                differing += not verdict.in_process
                tests = "\n".join(pairs[verdict.id].asserts)
                print(f"== {verdict}\n{pairs[verdict.id].program[len(_HEAD) :]}\n--\n{tests}", file=console)
    print(f"{len(pairs)} pairs, seed {flags.seed}, {time.monotonic() - started:.0f} s: {dict(counts)}", file=console)
    print(f"beside the program: {dict(reasons.most_common(12))}", file=console)
    return min(differing, 1)


if __name__ == "__main__":
    sys.exit(main())
