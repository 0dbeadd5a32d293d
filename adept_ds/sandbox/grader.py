"""The sandbox as its callers see it: programs in, verdicts out, as they are found."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from adept_ds.errors import UserError, did_you_mean

from . import isolation as tiers
from .cache import VerdictCache
from .pool import Pool
from .program import Limits, Program, Verdict
from .values import Values, returned_values
from .worker import Worker

_REFUSALS = ("PermissionError", "FileNotFoundError", "ModuleNotFoundError")


class Sandbox:
    """Runs programs in isolation and judges them.

        with Sandbox() as sandbox:
            for verdict in sandbox.run(programs):
                ...

    `isolation` is "auto" (the strongest tier that passes its self-test), "namespaces", "bubblewrap", "seccomp", or
    "none", which protects nothing. One `run` at a time.
    `workers` defaults to the cores that this process may use, and is cut to them; more would make time-outs measure
    contention. `cache` is a folder in which verdicts are kept for equal programs. `packages` names what programs may
    import beside the standard library, with everything that it needs itself; with "numpy" among them, tests that
    compare arrays stay outside the program's process too. Raises `SandboxUnavailable` if the isolation cannot be had,
    `UserError` if a package cannot be imported.
    """

    def __init__(
        self,
        isolation: str = "auto",
        limits: Limits | None = None,
        workers: int | None = None,
        cache: str | Path | None = None,
        packages: Sequence[str] = (),
    ) -> None:
        choices = ("auto", *tiers.TIERS, "none")
        if isolation not in choices:
            hint = did_you_mean(isolation, choices)
            raise UserError(f"sandbox isolation {isolation!r}: expected one of {', '.join(choices)}{hint}")
        cores = len(os.sched_getaffinity(0))
        if workers is not None and workers < 1:
            raise UserError(f"sandbox workers = {workers}: expected at least 1")
        self.limits = limits or Limits()
        packages = (packages,) if isinstance(packages, str) else packages
        self._tier = tiers.choose(isolation, tuple(sorted(set(packages))))
        self._cache = VerdictCache(Path(cache), self.limits, self.isolation) if cache is not None else None
        assert self._tier.launch is not None
        self._pool = Pool(self._tier.launch, min(workers or cores, cores), self.limits, "numpy" in packages)
        self._asked: Worker | None = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def isolation(self) -> dict[str, Any]:
        """What protects the host, JSON-able: the tier, what it consists of, what it does not cover."""
        return self._tier.description

    def close(self) -> None:
        """End all workers and whatever runs in them."""
        self._pool.close()
        if self._asked is not None:
            self._asked.close()

    def values(self, source: str, expressions: Sequence[str], limits: Limits | None = None) -> Values:
        """Run a program and return what expressions come to among its names; see `returned_values`."""
        if self._asked is None:
            assert self._tier.launch is not None
            self._asked = self._tier.launch("program")
        return returned_values(self._asked, limits or self.limits, source, expressions)

    def run(self, programs: Iterable[Program]) -> Iterator[Verdict]:
        """Yield one verdict per program, in the order in which they are found.

        A program that ran out of time without using its CPU time up is run once more, after all others. Trouble of the
        sandbox itself is retried; raises `SandboxFailure` if it persists, since a wrong answer must not be made up.
        """
        known: list[Verdict] = []
        for program, verdict in self._pool.run(self._unknown(programs, known)):
            if self._tier.tier == "seccomp" and any(name in verdict.detail for name in _REFUSALS):
                verdict = replace(verdict, detail=f"{verdict.detail} (the seccomp tier refuses files and processes)")
            if self._cache is not None:
                self._cache.put(program, verdict)
            yield from known
            known.clear()
            yield verdict
        yield from known

    def _unknown(self, programs: Iterable[Program], known: list[Verdict]) -> Iterator[Program]:
        """Yield the programs that have no verdict in the cache; those of the others go to `known`."""
        for program in programs:
            verdict = self._cache.get(program) if self._cache is not None else None
            if verdict is None:
                yield program
            else:
                known.append(verdict)
