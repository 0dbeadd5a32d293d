"""The sandbox as a command.

    python -m adept_ds.sandbox run FILE --tests TESTS.json [--timeout S] [--memory MB] [--isolation TIER]
    python -m adept_ds.sandbox doctor

`run` executes one program against a JSON list of assert statements and prints the verdict as one JSON object; the
exit status is 0 if it passed and 1 if not. `doctor` tells what isolation this machine offers. Status 2 means that the
command could not be carried out.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from adept_ds.errors import UserError

from . import doctor
from .grader import Sandbox
from .isolation import TIERS
from .program import Limits, Program, Tests


def _run(arguments: argparse.Namespace) -> int:
    try:
        source = arguments.file.read_bytes().decode("utf-8", "surrogateescape")
        asserts = json.loads(arguments.tests.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the program or its tests: {error}") from None
    if not isinstance(asserts, list) or not all(isinstance(item, str) for item in asserts):
        raise UserError(f"{arguments.tests}: expected a JSON list of assert statements")
    limits = Limits(wall_seconds=2 * arguments.timeout, cpu_seconds=arguments.timeout, memory_mb=arguments.memory)
    program = Program(arguments.file.name, source, Tests(asserts=tuple(asserts)))
    with Sandbox(arguments.isolation, limits, workers=1) as sandbox:
        verdict = next(iter(sandbox.run([program])))
        print(json.dumps(asdict(verdict) | {"isolation": sandbox.isolation}))
    return 0 if verdict.status == "passed" else 1


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m adept_ds.sandbox", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="judge one program")
    run.add_argument("file", type=Path, help="the program")
    run.add_argument("--tests", type=Path, required=True, help="JSON list of assert statements")
    run.add_argument("--timeout", type=float, default=10.0, help="CPU seconds; twice as much wall time (default 10)")
    run.add_argument("--memory", type=int, default=1024, help="MB for all its processes (default 1024)")
    run.add_argument("--isolation", default="auto", help=f"auto, {', '.join(TIERS)}, or none (default auto)")
    commands.add_parser("doctor", help="tell which isolation works here, and why not")
    arguments = parser.parse_args(argv)
    try:
        return _run(arguments) if arguments.command == "run" else doctor.main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
