"""Packages inside the sandbox: only those that were named, and arrays that a hostile program cannot use to lie."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from adept_ds.errors import UserError
from adept_ds.sandbox import Program, Sandbox, SandboxUnavailable, Tests, Verdict
from adept_ds.sandbox.inside import codec
from adept_ds.sandbox.isolation import TIERS
from adept_ds.sandbox.split import plan

SOURCE = """
import numpy as np

class Liar(np.ndarray):
    def __eq__(self, other): return np.True_
    def __array_function__(self, *args, **kwargs): return True
    def tolist(self): return [1, 2, 3]
    dtype = shape = nbytes = property(lambda self: 1 / 0)

class LyingFloat(np.float64):
    def __eq__(self, other): return True
    __hash__ = np.float64.__hash__

def f(text): return eval(text)
"""


@pytest.fixture(scope="module", params=TIERS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    try:
        sandbox = Sandbox(request.param, workers=1, packages=("numpy",))
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    with sandbox:
        yield sandbox


def judge(sandbox: Sandbox, claim: str, source: str = SOURCE) -> Verdict:
    (verdict,) = sandbox.run([Program("x", source, Tests((f"assert {claim}",), reference=SOURCE))])
    return verdict


RIGHT = [
    "np.array_equal(f('np.arange(6).reshape(2, 3)'), [[0, 1, 2], [3, 4, 5]])",
    "np.allclose(f('np.linalg.inv(2 * np.eye(2))'), np.eye(2) / 2)",
    "f('np.zeros((0, 3))').shape == (0, 3)",
    "f('np.array(5)').shape == ()",
    "f('np.array([[1, 2], [3, 4]], order=\"F\")').tolist() == [[1, 2], [3, 4]]",
    "f('np.array([1], dtype=\">i2\")') == 1",
    "f('np.array([\"a\", \"bc\"])').tolist() == ['a', 'bc']",
    "f('np.array([1 + 2j])')[0] == 1 + 2j",
    "float(f('np.float32(0.1)')) == float(np.float32(0.1)) != 0.1",
    "isinstance(f('np.float64(2)'), np.float64) and f('np.int8(-3)') == -3",
    "f('np.True_') is not True and f('np.True_') == True",
    "f('np.float64(\"nan\")') != f('np.float64(\"nan\")')",
    "not np.array_equal(f('np.array([np.nan])'), [np.nan])",
    "np.array_equal(f('np.array([np.nan])'), [np.nan], equal_nan=True)",
    "f('{np.int64(1): [np.float64(2.5)]}') == {1: [2.5]}",
    "f('np.datetime64(\"2020-01-02\")') == f('np.datetime64(\"2020-01-02\")')",
    "f('np.fft.fft([1, 2])').real.tolist() == [3, -1]",
    "f('np.random.default_rng(0).random()') == np.random.default_rng(0).random()",
    "f('np.matrix([[1]])').shape == (1, 1)",
]
WRONG = {
    "array that claims to equal all": "(f('np.zeros(3).view(Liar)') == [1, 2, 3]).all()",
    "scalar that claims to equal all": "f('LyingFloat(7)') == 3",
    "array of objects": "np.array_equal(f('np.array([object()], dtype=object)'), [1])",
    "structured array": "np.array_equal(f('np.zeros(1, dtype=\"i4,i4\")'), [0])",
    "truth of several values": "f('np.array([1, 2])') == [1, 2]",
}


@pytest.mark.parametrize("claim", RIGHT)
def test_arrays_compare_as_in_one_process(sandbox: Sandbox, claim: str) -> None:
    verdict = judge(sandbox, claim)
    assert (verdict.status, verdict.in_process) == ("passed", False), verdict.detail


@pytest.mark.parametrize("name", WRONG)
def test_arrays_that_lie_or_exhaust_fail(sandbox: Sandbox, name: str) -> None:
    verdict = judge(sandbox, WRONG[name])
    assert verdict.status == "failed", verdict.detail


@pytest.mark.parametrize(
    "claim", ["np.array_equal(f('np.zeros(3).view(Liar)'), [1, 2, 3])", "f('np.zeros(10**6)') is not None"]
)
def test_arrays_that_cannot_be_carried_over_are_stamped(sandbox: Sandbox, claim: str) -> None:
    assert judge(sandbox, claim).in_process


def test_only_the_named_packages_are_there(sandbox: Sandbox) -> None:
    source = "def f(name):\n    try: __import__(name)\n    except ImportError: return False\n    return True"
    assert judge(sandbox, "[f('numpy'), f('pytest'), f('pip'), f('torch')] == [True, False, False, False]", source)


def test_the_program_cannot_change_the_package(sandbox: Sandbox) -> None:
    source = "import numpy\ndef f():\n    try: open(numpy.__file__, 'a')\n    except OSError: return 'refused'"
    assert judge(sandbox, "f() == 'refused'", source).status == "passed"


def test_a_patched_numpy_does_not_reach_the_grader(sandbox: Sandbox) -> None:
    source = "import numpy as np\nnp.allclose = np.array_equal = lambda *a, **k: True\ndef f(): return np.zeros(2)"
    assert judge(sandbox, "np.allclose(f(), [1, 1])", source).status == "failed"


def test_a_statement_of_numpys_own_is_named_when_it_fails(sandbox: Sandbox) -> None:
    tests = Tests(("import numpy.testing as npt", "npt.assert_allclose(f('np.ones(2)'), [1, 2])"), reference=SOURCE)
    (verdict,) = sandbox.run([Program("x", SOURCE, tests)])
    assert (verdict.status, verdict.in_process) == ("failed", False)
    assert verdict.detail.startswith("npt.assert_allclose(f('np.ones(2)'), [1, 2]): got array([1., 1.])")


def test_packages_are_part_of_the_description(sandbox: Sandbox) -> None:
    numpy = pytest.importorskip("numpy")
    assert sandbox.isolation["packages"] == {"numpy": numpy.__version__}


@pytest.mark.parametrize(
    "statement",
    [
        "assert np.load('x') == f(1)",
        "assert np.random.seed(1) is f(1)",
        "assert np.zeros(1).ctypes.data == f(1)",
        "import numpy.ctypeslib\nassert f(1) == 1",
        "from numpy import fromfile\nassert f(1) == 1",
    ],
)
def test_what_shares_a_state_or_files_runs_beside_the_program(statement: str) -> None:
    assert plan(Tests((statement,)), numpy=True).judge is None


def test_without_numpy_its_tests_run_beside_the_program() -> None:
    assert plan(Tests(("assert np.array_equal(f(1), [1])",))).judge is None


@pytest.mark.parametrize(
    "form",
    [
        ["np", "|O", [1], "00" * 8],
        ["np", "<f8", [2], "00" * 8],
        ["np", "<f8", [-1], "00" * 8],
        ["np", "<f8", [True], "00" * 8],
        ["np", "<U999999", [1], ""],
        ["np", "<i4,<i4", [1], "00" * 8],
        ["np", "(9,)<f8", None, "00" * 72],
        ["np", "<f8", [1], 5],
        ["np", "<f8"],
    ],
)
def test_forged_arrays_are_refused(form: object) -> None:
    with pytest.raises(codec.Malformed):
        codec.decode(form)


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("nunpy", "'nunpy': not installed .*; did you mean 'numpy'"),
        ("math", "'math': part of the standard library"),
        ("numpy.linalg", "'numpy.linalg': expected the name that is imported"),
        ("pandas", "'pandas' cannot be imported: .*numpy"),
    ],
)
def test_packages_that_cannot_be_had_are_named(package: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sandbox(workers=1, packages=(package,))
