"""The sandbox as its callers see it: programs in, verdicts out, as they are found."""

from __future__ import annotations

import os
import selectors
import socket
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from adept_ds.errors import UserError, did_you_mean

from . import isolation as tiers
from .cache import VerdictCache
from .program import Limits, Program, SandboxFailure, Verdict
from .run import ProgramRun
from .worker import Worker

_GRACE_SECONDS = 20.0
_TRIES = 3
_REFUSALS = ("PermissionError", "FileNotFoundError", "ModuleNotFoundError")


class _Slot:
    """A worker and the program that it runs now."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.run: ProgramRun | None = None
        self.channel: socket.socket | None = None
        self.item: _Item | None = None
        self.deadline = 0.0
        self.alone = True


class _Item:
    """A submitted program; `program` until its verdict is out."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.failures = 0
        self.rerun = False


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
        self._count = min(workers or cores, cores)
        self._slots: list[_Slot] = []
        packages = (packages,) if isinstance(packages, str) else packages
        self._numpy = "numpy" in packages
        self._tier = tiers.choose(isolation, tuple(sorted(set(packages))))
        self._cache = VerdictCache(Path(cache), self.limits, self.isolation) if cache is not None else None

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
        for slot in self._slots:
            if slot.channel is not None:
                slot.channel.close()
            slot.worker.close()
        self._slots.clear()

    def run(self, programs: Iterable[Program]) -> Iterator[Verdict]:
        """Yield one verdict per program, in the order in which they are found.

        A program that ran out of time beside others is run once more alone, after all others. Trouble of the sandbox
        itself is retried; raises `SandboxFailure` if it persists, since a wrong answer must not be made up.
        """
        source = iter(programs)
        retries: deque[_Item] = deque()
        alone: deque[_Item] = deque()
        exhausted = False
        selector = selectors.DefaultSelector()
        try:
            while True:
                while not exhausted and not retries and self._idle():
                    program = next(source, None)
                    if program is None:
                        exhausted = True
                    elif self._cache is not None and (known := self._cache.get(program)) is not None:
                        yield known
                    else:
                        self._assign(_Item(program), selector)
                while retries and self._idle():
                    self._assign(retries.popleft(), selector)
                busy = [slot for slot in self._slots if slot.run is not None]
                if not busy and exhausted and not retries:
                    if not alone:
                        return
                    self._assign(alone.popleft(), selector)
                    busy = [slot for slot in self._slots if slot.run is not None]
                for slot in busy:
                    slot.alone = slot.alone and len(busy) == 1
                for verdict, item, was_alone in self._step(selector):
                    if verdict.status == "sandbox_error":
                        item.failures += 1
                        if item.failures >= _TRIES:
                            raise SandboxFailure(f"program {item.program.id!r}: {verdict.detail}")
                        retries.append(item)
                    elif verdict.status == "timeout" and not was_alone and not item.rerun:
                        item.rerun = True
                        alone.append(item)
                    else:
                        if self._cache is not None:
                            self._cache.put(item.program, verdict)
                        yield verdict
        finally:
            self._abandon()
            selector.close()

    def _launch(self) -> Worker:
        assert self._tier.launch is not None
        return self._tier.launch()

    def _idle(self) -> bool:
        return len(self._slots) < self._count or any(slot.run is None for slot in self._slots)

    def _assign(self, item: _Item, selector: selectors.BaseSelector) -> None:
        run = ProgramRun(item.program, self.limits, self._numpy)
        slot = next((slot for slot in self._slots if slot.run is None), None)
        if slot is None:
            slot = _Slot(self._launch())
            self._slots.append(slot)
        while True:
            try:
                slot.channel = slot.worker.start(self.limits)
                break
            except OSError:  # it died while idle
                slot.worker.close()
                slot.worker = self._launch()
        slot.run, slot.item, slot.alone = run, item, True
        slot.deadline = time.monotonic() + self.limits.wall_seconds + _GRACE_SECONDS
        run.flush(slot.channel)
        selector.register(slot.worker.control, selectors.EVENT_READ, slot)
        selector.register(slot.channel, _wanted(run), slot)

    def _step(self, selector: selectors.BaseSelector) -> Iterator[tuple[Verdict, _Item, bool]]:
        """Wait for one round of events and yield the programs that ended in it."""
        ready = selector.select(1.0)
        ended = []
        for key, events in ready:
            slot: _Slot = key.data
            if key.fileobj is slot.channel:
                self._talk(slot, events, selector)
            else:
                ended.append(slot)
        now = time.monotonic()
        late = [slot for slot in self._slots if slot.run is not None and slot not in ended and now > slot.deadline]
        for slot in ended + late:
            yield self._finish(slot, selector, hung=slot in late)

    def _talk(self, slot: _Slot, events: int, selector: selectors.BaseSelector) -> None:
        run, channel = slot.run, slot.channel
        if run is None or channel is None:
            return
        open_end = run.receive(channel) if events & selectors.EVENT_READ else True
        run.flush(channel)
        if run.settled or not open_end:
            selector.unregister(channel)
            channel.close()
            slot.channel = None
            if run.outcome is not None:
                slot.worker.stop_program()
        else:
            selector.modify(channel, _wanted(run), slot)

    def _finish(self, slot: _Slot, selector: selectors.BaseSelector, hung: bool) -> tuple[Verdict, _Item, bool]:
        run, item, worker = slot.run, slot.item, slot.worker
        assert run is not None
        assert item is not None
        selector.unregister(worker.control)
        report = {"failure": "the fork server hung"} if hung else worker.report()
        if slot.channel is not None:
            run.receive(slot.channel)  # answers that were on their way when the report overtook them
            selector.unregister(slot.channel)
            slot.channel.close()
        slot.run = slot.item = slot.channel = None
        verdict = run.verdict(report)
        if self._tier.tier == "seccomp" and any(name in verdict.detail for name in _REFUSALS):
            verdict = replace(verdict, detail=f"{verdict.detail} (the seccomp tier refuses files and processes)")
        if verdict.status == "sandbox_error":
            worker.close()
            self._slots.remove(slot)
        return verdict, item, slot.alone

    def _abandon(self) -> None:
        """Forget programs that still run because the caller stopped listening."""
        for slot in [slot for slot in self._slots if slot.run is not None]:
            if slot.channel is not None:
                slot.channel.close()
            slot.worker.close()
            self._slots.remove(slot)


def _wanted(run: ProgramRun) -> int:
    return selectors.EVENT_READ | (selectors.EVENT_WRITE if run.outgoing else 0)
