"""Expected outputs of problems that have inputs and a reference only: the reference runs in the sandbox, once.

What it returned is kept as data in a folder of the user's, under a hash of reference and inputs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from adept_ds.errors import UserError
from adept_ds.files import atomic_write, read_json, user_cache
from adept_ds.formats import Problem
from adept_ds.formats.evalplus import Cases
from adept_ds.sandbox import NoValue, Sandbox, Tests, Values, decode

_FORMAT = 1
"""Raised whenever a change could change what is kept."""
_MOST_SECONDS = 60.0
"""CPU time of a reference for all inputs, and the most that a program is given for them."""
_FACTOR = 4.0
"""A program may take so many times the reference's time, as in EvalPlus."""


@dataclass(frozen=True)
class Judging:
    """How the programs for a problem are judged."""

    tests: Tests
    base_tests: Tests | None = None
    """The original benchmark's tests among them, where the problem has further ones."""
    cpu_seconds: float = 0.0
    """CPU time that a program is given at least."""


def judging_of(problems: Iterable[Problem], sandbox: Sandbox, cache: str | None) -> dict[str, Judging]:
    """Return how each problem is judged, by its id; references whose outputs are not kept yet run in `sandbox`.

    `cache`: the folder for what they return; one in the user's cache folder if None.

    Raises:
        UserError: A reference fails, or returns what cannot be compared; names the problems.
    """
    problems = list(problems)
    found = {problem.task_id: Judging(problem.tests) for problem in problems if problem.cases is None}
    have_cases = [problem for problem in problems if problem.cases is not None]
    folder = Path(cache) if cache else user_cache() / "expected"
    mistakes = []
    for problem in tqdm(have_cases, desc="expected outputs", unit="problem", disable=not have_cases):
        assert problem.cases is not None
        try:
            found[problem.task_id] = _judging(problem.cases, sandbox, folder)
        except NoValue as reason:
            of_base = reason.number < len(problem.cases.base)
            number = reason.number - (0 if of_base else len(problem.cases.base))
            where = f"{'base' if of_base else 'plus'}_input[{number}]"
            mistakes.append(f"{problem.task_id}: canonical_solution on {where}: {reason.why}")
        except UserError as error:
            mistakes.append(f"{problem.task_id}: canonical_solution returned {error}")
        except (ValueError, RecursionError) as error:  # what `decode` raises for forms that are none
            mistakes.append(f"{problem.task_id}: canonical_solution returned what is no value ({error})")
    if mistakes:
        more = f" and {len(mistakes) - 10} more" if len(mistakes) > 10 else ""
        raise UserError(f"no expected outputs could be made: {'; '.join(mistakes[:10])}{more}")
    return found


def _judging(cases: Cases, sandbox: Sandbox, folder: Path) -> Judging:
    values = _values(cases, sandbox, folder)
    judged = cases.judged_by([decode(form) for form in values.forms])
    seconds = min(_MOST_SECONDS, math.ceil(_FACTOR * values.cpu_seconds))
    return Judging(judged.tests, judged.base_tests, seconds)


def _values(cases: Cases, sandbox: Sandbox, folder: Path) -> Values:
    made_of = [_FORMAT, cases.reference, cases.expressions, platform.python_version(), sandbox.isolation["packages"]]
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    path = folder / digest[:2] / f"{digest}.json"
    with contextlib.suppress(UserError, TypeError):  # not there, or damaged
        return Values(**read_json(path))
    limits = sandbox.limits
    more = max(1.0, _MOST_SECONDS / limits.cpu_seconds)
    patient = replace(limits, cpu_seconds=more * limits.cpu_seconds, wall_seconds=more * limits.wall_seconds)
    values = sandbox.values(cases.reference, cases.expressions, patient)
    try:
        with atomic_write(path) as file:
            json.dump(asdict(values), file)  # not `write_json`, which has no infinity
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; expected a folder for what references return, set eval.sandbox.cache"
        ) from None
    return values
