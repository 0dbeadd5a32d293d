"""The sandbox against hostile and awkward programs, on every tier here, as root and as an unprivileged user."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adept_ds.sandbox import Limits, Program, Sandbox, Tests
from adept_ds.sandbox.isolation import TIERS, probe

sys.path.insert(0, str(Path(__file__).resolve().parent))
import sandbox_corpus as corpus  # shared with a script that other users and interpreters run

RUNNER = Path(__file__).with_name("sandbox_corpus_run.py")
AS_NOBODY = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]


@functools.cache
def _interpreter_for_anyone() -> str | None:
    """Return an interpreter that a user without a home can start; the sandbox needs only the standard library."""
    for name in [*(f"/usr/bin/python3.{minor}" for minor in range(14, 10, -1)), os.path.realpath(sys.executable)]:
        command = [*AS_NOBODY, name, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
        if subprocess.run(command, capture_output=True).returncode == 0:
            return name
    return None


def _command(user: str, tier: str) -> list[str]:
    """Return the command that runs the corpus in `tier` as `user`, or skip where that cannot be."""
    if user == "self":
        interpreter, prefix = sys.executable, []
    else:
        if os.getuid() != 0 or shutil.which("setpriv") is None:
            pytest.skip("only root can become another user, with setpriv")
        if (found := _interpreter_for_anyone()) is None:
            pytest.skip("no Python 3.11 that other users can start")
        interpreter, prefix = found, AS_NOBODY
    code = f"import sys; from adept_ds.sandbox.isolation import probe; sys.exit(probe({tier!r}).problem or 0)"
    repository = str(RUNNER.parents[1])
    tried = subprocess.run([*prefix, interpreter, "-c", code], capture_output=True, text=True, cwd=repository)
    if tried.returncode != 0:
        pytest.skip(f"no {tier} here: {tried.stderr.strip()[-300:]}")
    return [*prefix, interpreter, "-B", str(RUNNER), tier]


@pytest.fixture(scope="module")
def outcome() -> Callable[[str, str], dict[str, Any]]:
    """Run the whole corpus once for each user and tier."""

    @functools.cache
    def run(user: str, tier: str) -> dict[str, Any]:
        result = subprocess.run(_command(user, tier), capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return run


everywhere = pytest.mark.parametrize(("user", "tier"), [(user, tier) for tier in TIERS for user in ("self", "nobody")])


@pytest.mark.slow
@everywhere
def test_every_verdict_is_the_deserved_one(outcome: Callable[..., dict[str, Any]], user: str, tier: str) -> None:
    verdicts = outcome(user, tier)["verdicts"]
    wrong = {
        entry.name: (entry.deserved(tier), verdicts[entry.name])
        for entry in corpus.ENTRIES
        if verdicts[entry.name][0] not in entry.deserved(tier)
    }
    assert wrong == {}


@pytest.mark.slow
@everywhere
def test_the_host_is_as_before(outcome: Callable[..., dict[str, Any]], user: str, tier: str) -> None:
    host = {key: value for key, value in outcome(user, tier).items() if key != "verdicts"}
    assert host == {"reached": [], "untouched": True, "processes": 0, "files": []}


@pytest.mark.slow
def test_shared_hostile_programs_get_their_exact_verdicts(shared_dir: Path) -> None:
    if probe("namespaces").launch is None:
        pytest.skip("no namespaces here")
    tests = Tests(corpus.ASSERTS, reference=corpus.RIGHT)
    expected, programs = {}, []
    for path in sorted((shared_dir / "hostile").glob("*.py")):
        source = path.read_bytes().decode("utf-8", "surrogateescape")
        expected[path.stem] = source.partition("# expected: ")[2].partition(" | ")[0].split("|")
        programs.append(Program(path.stem, source, tests))
    slow = [program for program in programs if expected[program.id] == ["timeout"]]
    quick = [program for program in programs if program not in slow]
    wrong = {}
    for group, limits, workers in ((quick, Limits(wall_seconds=10), None), (slow, Limits(1.5, 1.5), 1)):
        with Sandbox("namespaces", limits, workers) as sandbox:
            for verdict in sandbox.run(group):
                got = f"error:{verdict.kind}" if verdict.status == "error" else verdict.status
                if got not in expected[verdict.id]:
                    wrong[verdict.id] = verdict
    assert wrong == {}
