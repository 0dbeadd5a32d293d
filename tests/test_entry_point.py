"""How a command ends that meets trouble: what a person reads last."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.ranks import REPOSITORY

RAISES = """
from adept_ds.entry_point import run_entry_point
from adept_ds.errors import UserError

class OutOfMemoryError(RuntimeError):
    pass

def main(arguments):
    {what}

run_entry_point(main)
"""


def run(what: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    return subprocess.run(
        [sys.executable, "-c", RAISES.format(what=what)],
        env=environment | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("what", "status", "lines"),
    [
        ("raise UserError('train.epochs is odd')", 2, ["error: train.epochs is odd"]),
        ("open('/nowhere/x')", 2, ["error: /nowhere/x: No such file or directory"]),
        ("raise OSError(28, 'No space left on device', '/full/x')", 2, ["error: /full/x: No space left on device"]),
        ("raise KeyboardInterrupt", 130, []),
        ("return 7", 7, []),
    ],
)
def test_what_lies_outside_the_program_is_told_without_a_traceback(what: str, status: int, lines: list[str]) -> None:
    done = run(what)
    assert (done.returncode, done.stderr.splitlines()) == (status, lines)


@pytest.mark.parametrize(
    ("what", "advice"),
    [
        ("raise OutOfMemoryError('CUDA out of memory')", "the GPU has no memory left"),
        ("raise OSError('odd')", "please report the lines above"),
        ("raise OSError(24, 'Too many open files')", "'Too many open files': look at the disks and limits"),
        ("1 / 0", "please report the lines above"),
    ],
)
def test_behind_a_traceback_the_last_line_says_what_to_do(what: str, advice: str) -> None:
    done = run(what)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("what to do: ")
    assert advice in done.stderr.splitlines()[-1]


def test_a_name_that_the_terminal_cannot_show_ends_nothing() -> None:
    assert run("print('a\\udcff')").stdout == "a\\udcff\n"
