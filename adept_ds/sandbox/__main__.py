"""The sandbox as a command.

    python -m adept_ds.sandbox run FILE --tests TESTS.json [--timeout S] [--memory MB] [--isolation TIER]
                               [--packages NAME ...] [--cache FOLDER]
    python -m adept_ds.sandbox doctor

`run` executes one program against a JSON list of assert statements and prints the verdict as one JSON object; the
exit status is 0 if it passed and 1 if not. `doctor` tells what isolation this machine offers, and exits with 1 if it
offers none. Status 2 means that the command could not be carried out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

from adept_ds.errors import UserError

from . import doctor
from .grader import Sandbox
from .isolation import TIERS
from .program import MIN_MEMORY_MB, Limits, Program, Tests


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _read_asserts(path: Path) -> tuple[str, ...]:
    try:
        asserts = json.loads(_read(path))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(asserts, list) or not asserts or not all(isinstance(item, str) for item in asserts):
        raise UserError(f'{path}: expected a JSON list of assert statements, such as ["assert f(1) == 2"]')
    return tuple(asserts)


def _run(arguments: argparse.Namespace) -> int:
    data = _read(arguments.file)
    try:
        source = importlib.util.decode_source(data)
    except (SyntaxError, UnicodeDecodeError):  # which the verdict will say
        source = data.decode("utf-8", "surrogateescape")
    tests = Tests(asserts=_read_asserts(arguments.tests))
    program = Program(arguments.file.name, source, tests)
    limits = Limits(wall_seconds=2 * arguments.timeout, cpu_seconds=arguments.timeout, memory_mb=arguments.memory)
    with Sandbox(arguments.isolation, limits, 1, arguments.cache, arguments.packages) as sandbox:
        (verdict,) = sandbox.run([program])
        if verdict.status == "passed" and next(sandbox.run([Program("none", "", tests)])).status == "passed":
            raise UserError(f"{arguments.tests}: an empty program passes too, so the tests test nothing")
        print(json.dumps(asdict(verdict) | {"isolation": sandbox.isolation}))
    return 0 if verdict.status == "passed" else 1


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r}: expected a positive number of seconds")


def _megabytes(text: str) -> int:
    if text.isdecimal() and int(text) >= MIN_MEMORY_MB:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of MB, {MIN_MEMORY_MB} or more")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m adept_ds.sandbox", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="judge one program")
    run.add_argument("file", type=Path, help="the program")
    run.add_argument("--tests", type=Path, required=True, help="JSON list of assert statements")
    run.add_argument("--timeout", type=_seconds, default=10.0, help="CPU seconds; twice as much wall time (default 10)")
    run.add_argument("--memory", type=_megabytes, default=1024, help="MB for all its processes (default 1024)")
    run.add_argument("--isolation", default="auto", help=f"auto, {', '.join(TIERS)}, or none (default auto)")
    run.add_argument("--packages", nargs="+", default=(), metavar="NAME", help="what it may import, such as numpy")
    run.add_argument("--cache", metavar="FOLDER", help="keep the verdict there, and take it from there")
    commands.add_parser("doctor", help="tell which isolation works here, and why not")
    arguments = parser.parse_args(argv)
    try:
        return _run(arguments) if arguments.command == "run" else doctor.main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # what ran has been ended on the way here
        return 130


if __name__ == "__main__":
    sys.exit(main())
