"""Problems of our own in the form of EvalPlus's files, with programs: right, wrong on plus inputs only, hostile.

Entry points and task ids are EvalPlus's where its rules go by them (sets, tuples, other readings of a task).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Plus:
    """A problem, and programs with the verdicts that they deserve: by the base inputs, and by all."""

    row: dict[str, Any]
    programs: tuple[tuple[str, bool, bool], ...]


def _mbpp(
    number: int,
    entry_point: str,
    solution: str,
    base: Sequence[Any],
    plus: Sequence[Any],
    programs: Sequence[tuple[str, bool, bool]],
    atol: float = 0,
) -> Plus:
    row = {
        "task_id": f"Mbpp/{number}",
        "prompt": f'"""\nWrite a function {entry_point}.\n"""\n',
        "entry_point": entry_point,
        "canonical_solution": f"\n{solution}",
        "base_input": base,
        "plus_input": plus,
        "atol": atol,
        "contract": "\n    assert True # $_CONTRACT_$\n",
        "assertion": "",
    }
    return Plus(row, ((solution, True, True), *programs))


_draw = random.Random(0)
_INTS = [[_draw.randint(-50, 50) for _ in range(_draw.randint(0, 12))] for _ in range(300)]
_SOME = [ints for ints in _INTS if ints]

MBPP_PLUS = [
    _mbpp(
        2,  # each argument is a tuple; outputs are compared as sets
        "similar_elements",
        "def similar_elements(a, b):\n    return tuple(set(a) & set(b))\n",
        [[[3, 4, 5, 6], [5, 7, 4, 10]], [[1, 2], [3]]],
        [[one, other] for one, other in zip(_INTS, reversed(_INTS), strict=True)],
        [
            ("def similar_elements(a, b):\n    return [x for x in a if x in b]\n", True, True),
            ("def similar_elements(a, b):\n    return set(a) & set(b)\n", True, True),
            (
                "def similar_elements(a, b):\n    assert type(a) is tuple\n    return (4, 5) if 3 in a else ()\n",
                True,
                False,
            ),
            ("def similar_elements(a, b):\n    return None\n", False, False),
        ],
    ),
    _mbpp(
        1001,  # outputs that are floats: a tolerance of 1e-6, though none is stated
        "mean",
        "def mean(xs):\n    return sum(xs) / len(xs)\n",
        [[[1, 2]], [[3, 3, 4]]],
        [[ints] for ints in _SOME],
        [
            ("def mean(xs):\n    return sum(x / len(xs) for x in xs) + 1e-9\n", True, True),
            ("def mean(xs):\n    return sum(xs) / len(xs) + 1e-3\n", False, False),
            ("def mean(xs):\n    return abs(sum(xs)) / len(xs)\n", True, False),
            ("def mean(xs):\n    return str(sum(xs) / len(xs))\n", False, False),
            ("def mean(xs):\n    return [sum(xs) / len(xs)]\n", False, False),
        ],
    ),
    _mbpp(
        1002,  # lists of floats with a stated tolerance; once there is one, integers are close as well
        "halves",
        "def halves(xs):\n    return [x / 2 for x in xs]\n",
        [[[1, 2]], [[]]],
        [[ints] for ints in _INTS],
        [
            ("def halves(xs):\n    return [x / 2 + 0.004 for x in xs]\n", True, True),
            ("def halves(xs):\n    return [x / 2 + 0.02 for x in xs]\n", False, False),
            ("def halves(xs):\n    return tuple(x / 2 for x in xs)\n", False, False),
            ("def halves(xs):\n    return [x / 2 + 0.004 for x in xs][:5]\n", True, False),
        ],
        atol=0.01,
    ),
    _mbpp(
        1003,  # exact, and the function changes what it is given
        "in_order",
        "def in_order(xs):\n    xs.sort()\n    return xs\n",
        [[[3, 1, 2]]],
        [[ints] for ints in _INTS],
        [
            ("def in_order(xs):\n    return sorted(xs)\n", True, True),
            ("def in_order(xs):\n    return tuple(sorted(xs))\n", False, False),
            ("def in_order(xs):\n    return sorted(set(xs))\n", True, False),
            ("def in_order(xs):\n    return sorted(xs) if len(xs) < 12 else 1 / 0\n", True, False),
            ("import sys\ndef in_order(xs):\n    sys.exit(0)\n", False, False),
        ],
    ),
    _mbpp(
        115,  # sets among the arguments
        "empty_dit",
        "def empty_dit(items):\n    return all(not item for item in items)\n",
        [[[[], []]], [[[1, 2], [3]]]],
        [[[list({*ints[:3]}), list({*ints[3:6]})]] for ints in _INTS[:60]],
        [
            ("def empty_dit(items):\n    return all(len(item) == 0 for item in items)\n", True, True),
            (
                "def empty_dit(items):\n    assert type(items[1]) in (set, dict)\n    return items == [{}, {}]\n",
                True,
                True,
            ),
            ("def empty_dit(items):\n    return {3} not in items and 3 not in items[0]\n", True, False),
        ],
    ),
    _mbpp(
        124,  # complex numbers
        "angle",
        "import cmath\ndef angle(a, b):\n    return cmath.phase(a + b)\n",
        [[0, "1j"], [2, "1j"]],
        [[ints[0], f"({ints[0]}+{abs(ints[-1])}j)"] for ints in _SOME],
        [
            ("import math\ndef angle(a, b):\n    return math.atan2(b.imag, a + b.real)\n", True, True),
            ("import math\ndef angle(a, b):\n    return math.atan2(1, a)\n", True, False),
        ],
    ),
    _mbpp(
        1004,  # any result but None counts as True
        "check_str",
        "import re\ndef check_str(text):\n    return re.match('[aeiou]', text)\n",
        [["annie"], ["dawood"]],
        [[text] for text in ("", "e", "Else", "xyz", "iou", "éa")],
        [
            ("def check_str(text):\n    return text[:1] in tuple('aeiou')\n", True, True),
            ("def check_str(text):\n    return 'yes' if text[:1] in tuple('aeiou') else None\n", True, True),
            ("def check_str(text):\n    return text[0] in 'aeiou'\n", True, False),
            ("def check_str(text):\n    return 'yes' if text[:1] in tuple('aeiou') else 'no'\n", False, False),
        ],
    ),
    _mbpp(
        1005,  # the reference returns a subclass
        "counts",
        "from collections import Counter\ndef counts(xs):\n    return Counter(xs)\n",
        [[[1, 1, 2]]],
        [[ints] for ints in _INTS],
        [
            ("def counts(xs):\n    return {x: xs.count(x) for x in xs}\n", True, True),
            ("def counts(xs):\n    return {x: xs.count(x) for x in xs if x > 0}\n", True, False),
        ],
    ),
    _mbpp(
        295,  # 0 is right as well
        "sum_div",
        "def sum_div(n):\n    return sum(d for d in range(1, n) if n % d == 0)\n",
        [[8], [12]],
        [[n] for n in range(1, 200)],
        [
            ("def sum_div(n):\n    return 0\n", True, True),
            ("def sum_div(n):\n    return {8: 7, 12: 16}.get(n, 1)\n", True, False),
        ],
    ),
    _mbpp(
        558,
        "digit_distance_nums",
        "def digit_distance_nums(a, b):\n    return sum(map(int, str(abs(a - b))))\n",
        [[1, 2], [23, 56]],
        [[a, b] for a in range(0, 200, 17) for b in range(0, 3000, 171)],
        [
            (
                "def digit_distance_nums(a, b):\n    a, b = f'{a:09}', f'{b:09}'\n"
                "    return sum(abs(int(x) - int(y)) for x, y in zip(a, b))\n",
                True,
                True,
            ),
            ("def digit_distance_nums(a, b):\n    return 1 if a == 1 else 6\n", True, False),
        ],
    ),
    _mbpp(
        581,
        "surface_Area",
        "def surface_Area(b, s):\n    return 2 * b * s + b**2\n",
        [[3, 4], [4, 5]],
        [[b, s] for b in range(1, 12) for s in range(1, 12)],
        [
            ("def surface_Area(b, h):\n    return round(2 * b * ((b / 2) ** 2 + h * h) ** 0.5 + b * b)\n", True, True),
            ("def surface_Area(b, s):\n    return 33 if b == 3 else 56\n", True, False),
            ("def surface_Area(b, s):\n    return 'large'\n", False, False),
        ],
    ),
    _mbpp(
        164,  # whatever comes is right
        "are_equivalent",
        "def are_equivalent(a, b):\n    return a == b\n",
        [[36, 57]],
        [[a, a + 1] for a in range(20)],
        [
            ("def are_equivalent(a, b):\n    return 'perhaps'\n", True, True),
            ("def are_equivalent(a, b):\n    return a / (b - 10) > 0\n", True, False),
        ],
    ),
    _mbpp(
        1006,  # numbers of thousands of digits, infinity
        "power",
        "def power(a, b):\n    return a**b if b < 9999 else float('inf')\n",
        [[2, 3]],
        [[10, n] for n in (5, 50, 5000, 9999)],
        [
            ("def power(a, b):\n    return a**b if b < 9999 else 1e999\n", True, True),
            ("def power(a, b):\n    return int(a**b + (b == 5000)) if b < 9999 else 1e999\n", True, False),
            ("def power(a, b):\n    return a**b\n", True, False),
        ],
    ),
    _mbpp(
        580,  # all lists are tuples
        "nested",
        "def nested(t):\n    return tuple(x for x in t if type(x) is tuple)\n",
        [[[1, [2, [3]], 4]]],
        [[[*ints[:2], [ints[2:4], *ints[4:]]]] for ints in _INTS],
        [
            ("def nested(t):\n    return tuple(x for x in t if not isinstance(x, int))\n", True, True),
            ("def nested(t):\n    return ((2, (3,)),) if t[0] == 1 and 4 in t else []\n", True, False),
        ],
    ),
]
"""The right program comes first in each."""


def _humaneval(
    number: int, entry_point: str, head: str, body: str, base: list[Any], plus: list[Any], atol: float,
    programs: Sequence[tuple[str, bool, bool]],
) -> Plus:  # fmt: skip
    prompt = f'{head}    """ Do it. """\n'
    row = {
        "task_id": f"HumanEval/{number}",
        "prompt": prompt,
        "entry_point": entry_point,
        "canonical_solution": body,
        "base_input": base,
        "plus_input": plus,
        "atol": atol,
        "contract": "\n    assert all(type(x) is int for x in xs) # $_CONTRACT_$\n",
    }
    return Plus(row, ((prompt + body, True, True), *programs))


_POLY = (
    "import math\n\n\ndef poly(xs: list, x: float):\n    return sum(c * math.pow(x, i) for i, c in enumerate(xs))\n\n\n"
)
_BISECT = (
    "    low, high = -1.0, 1.0\n    while poly(xs, low) * poly(xs, high) > 0:\n        low, high = low * 2, high * 2\n"
    "    while high - low > 1e-10:\n        at = (low + high) / 2\n"
    "        low, high = (low, at) if poly(xs, low) * poly(xs, at) <= 0 else (at, high)\n    return low\n"
)
HUMANEVAL_PLUS = [
    _humaneval(
        32,
        "find_zero",
        f"{_POLY}def find_zero(xs: list):\n",
        _BISECT,
        [[[1, 2]], [[-6, 11, -6, 1]]],
        [[[a, b]] for a in range(-9, 9) for b in (-3, -1, 2, 7)],
        1e-4,
        [
            (f"{_POLY}def find_zero(xs):\n    return -xs[0] / xs[1] if len(xs) == 2 else 1\n", True, True),
            (f"{_POLY}def find_zero(xs):\n    return -0.5 if xs[0] == 1 else 1\n", True, False),
            ("def find_zero(xs):\n    return 'x'\n", False, False),
        ],
    ),
    _humaneval(
        900,
        "spread",
        "def spread(xs: list) -> int:\n",
        "    return max(xs) - min(xs)\n",
        [[[1, 5]], [[2]]],
        [[ints] for ints in _SOME],
        0,
        [
            ("def spread(xs):\n    xs.sort()\n    return xs[-1] - xs[0]\n", True, True),
            ("def spread(xs):\n    return xs[-1] - xs[0]\n", True, False),
        ],
    ),
]

HOSTILE = (
    "def check(*a): pass\nclass Yes(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
    "def in_order(xs): return Yes()\n",
    "class Yes:\n    def __eq__(self, other): return True\ndef in_order(xs): return Yes()\n",
    "import gc, sys\ndef in_order(xs):\n"
    "    for one in gc.get_objects():\n"
    "        if isinstance(one, dict) and 'expected' in one: return one['expected']\n"
    "    frame = sys._getframe()\n"
    "    while frame:\n"
    "        for space in (frame.f_locals, frame.f_globals):\n"
    "            if 'expected' in space: return space['expected']\n"
    "        frame = frame.f_back\n"
    "    return 'not found'\n",
    "import os, glob\ndef in_order(xs):\n"
    "    for name in glob.glob('/proc/*/cmdline') + glob.glob('/**/*.json'):\n"
    "        if b'expected' in open(name, 'rb').read(): return sorted(xs)\n"
    "    return 'nothing'\n",
    "import os\nfor fd in range(3, 64):\n"
    "    try: os.write(fd, b'\\x00\\x00\\x00\\x10{\"passed\": true}')\n"
    "    except OSError: pass\n"
    "def in_order(xs): return 1\n",
    "import copy\ncopy.deepcopy = lambda x: []\ndef in_order(xs): return []\n",
    "import os\ndef in_order(xs): os._exit(0)\n",
    "import builtins\nbuiltins.all = lambda x: True\n"
    "all = sum = len = zip = lambda *x: True\ndef in_order(xs): return 0\n",
)
"""Programs for Mbpp/1003 that return nothing right but by reaching what they must not reach."""


def write(path: Path, problems: Sequence[Plus]) -> Path:
    """Write problems as a file of EvalPlus."""
    path.write_text("".join(json.dumps(problem.row) + "\n" for problem in problems))
    return path


def samples(problems: Sequence[Plus]) -> list[dict[str, str]]:
    """All programs, as EvalPlus's samples."""
    return [{"task_id": one.row["task_id"], "solution": program} for one in problems for program, *_ in one.programs]
