"""Programs over a number of workers, each a pair of fork servers: one runs programs, one judges them."""

from __future__ import annotations

import selectors
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from .program import Limits, Program, SandboxFailure, Verdict
from .run import Judgement, ProgramRun
from .worker import Worker

_GRACE_SECONDS = 20.0
_TRIES = 3
Launch = Callable[[str], Worker]
"""Starts a fork server for a role, "program" or "judge"."""


class _Item:
    """A submitted program, until its verdict is out."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.failures = 0
        self.was_late = False
        self.beside = ""
        self.distrusted = False


class _Slot:
    """A pair of fork servers and what they run now."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.workers: list[Worker] = []
        self.run: ProgramRun | None = None
        self.item: _Item | None = None
        self.deadline = 0.0

    def start(self, item: _Item, limits: Limits, numpy: bool) -> None:
        """Start a program; servers that died while idle are replaced."""
        while True:
            try:
                for role in ("program", "judge")[len(self.workers) :]:
                    self.workers.append(self.launch(role))
                self.run = ProgramRun(item.program, limits, self.workers[0], self.workers[1], numpy, item.beside)
                break
            except OSError:
                self.close()
        self.item = item
        self.deadline = time.monotonic() + limits.of(item.program).wall_seconds + _GRACE_SECONDS

    def forget(self) -> None:
        """Be free for another program."""
        if self.run is not None:
            self.run.close()
        self.run = self.item = None

    def close(self) -> None:
        """End the servers, and whatever runs in them."""
        self.forget()
        for worker in self.workers:
            worker.close()
        self.workers = []


class Pool:
    """So many pairs of fork servers, started when they are needed; `limits` are those of programs that need no more."""

    def __init__(self, launch: Launch, count: int, limits: Limits, numpy: bool = False) -> None:
        self._slots = [_Slot(launch) for _ in range(count)]
        self.limits, self.numpy = limits, numpy

    def close(self) -> None:
        """End all servers."""
        for slot in self._slots:
            slot.close()

    def run(self, programs: Iterable[Program]) -> Iterator[tuple[Program, Verdict]]:
        """Yield each program with its verdict, in the order in which verdicts are found; see `Sandbox.run`."""
        source = (_Item(program) for program in programs)
        again: deque[_Item] = deque()
        try:
            while True:
                for slot in self._slots:
                    if slot.run is None:
                        item = next(source, None) or (again.popleft() if again else None)
                        if item is None:
                            break
                        slot.start(item, self.limits, self.numpy)
                busy = [slot for slot in self._slots if slot.run is not None]
                if not busy:
                    return
                self._wait(busy)
                for slot in busy:
                    if slot.run is not None and slot.item is not None and slot.run.ended:
                        item, judgement = slot.item, slot.run.judgement()
                        slot.forget()
                        if judgement.verdict.status == "sandbox_error" and not judgement.inexact:
                            slot.close()
                        if self._is_final(item, judgement):
                            yield item.program, _trusted(item, judgement.verdict)
                        else:
                            again.append(item)
        finally:
            for slot in self._slots:
                if slot.run is not None:  # the caller stopped listening
                    slot.close()

    def _wait(self, busy: list[_Slot]) -> None:
        """Wait for processes that end, and take their reports."""
        with selectors.PollSelector() as selector:
            for slot in busy:
                for worker in slot.run.running if slot.run is not None else ():
                    selector.register(worker.control, selectors.EVENT_READ, (slot, worker))
            for key, _ in selector.select(1.0):
                slot, worker = key.data
                if slot.run is not None:
                    slot.run.take_report(worker, worker.report())
        for slot in busy:
            if slot.run is not None and time.monotonic() > slot.deadline:
                for worker in list(slot.run.running):
                    slot.run.take_report(worker, {"failure": "the fork server hung"})

    def _is_final(self, item: _Item, judgement: Judgement) -> bool:
        """Tell whether a judgement is the program's verdict; if not, note how it is to be run again."""
        if judgement.inexact:
            item.beside, item.distrusted = judgement.inexact, judgement.distrusted
            return False
        if judgement.verdict.status == "sandbox_error":
            item.failures += 1
            if item.failures >= _TRIES:
                raise SandboxFailure(f"program {item.program.id!r}: {judgement.verdict.detail}")
            return False
        if judgement.verdict.status == "timeout" and not (judgement.used_its_time or item.was_late):
            item.was_late = True
            return False
        return True


def _trusted(item: _Item, verdict: Verdict) -> Verdict:
    """Return the verdict, failed if it passed because the program's own class said that it equals what is expected."""
    if item.distrusted and verdict.status == "passed":
        return replace(verdict, status="failed", detail=f"{verdict.reason}, which itself says what it equals")
    return verdict
