"""When a run is to end early: a signal, or the end of what has started it.

Nothing here imports torch, so that a signal is noted while the libraries load; process 1 of a container would not even
be ended by it then.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from contextlib import suppress
from types import FrameType

import psutil

STARTED_BY = "ADEPT_DS_STARTED_BY"
"""Environment variable in which this package's own commands leave their process id to the ranks that they start."""
REPEAT_SECONDS = 2.0
"""Signals that follow the first one so soon are its echo: a terminal, a service manager and a launcher each send it."""
POLL_SECONDS = 1.0
_DEEPSPEED_LAUNCHER = "deepspeed.launcher.launch"


def stop_signals() -> list[signal.Signals]:
    """The signals that ask for an early end; SIGHUP is not one where `nohup` has it ignored."""
    signals = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
    return signals if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [*signals, signal.SIGHUP]


class StopRequest:
    """Turns a signal, or the end of a launcher, into a flag that is read at the next step boundary.

    A thread of its own takes the signals, since the main one may wait for other ranks for minutes. A signal that is
    sent again ends the process at once. DeepSpeed's launcher kills its ranks 30 s after a signal, one after the other;
    so it is halted from the first signal on until they have saved.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the signal, or which process has ended; None as long as the run is to go on."""
        self._since = 0.0
        self._is_open = True
        self._launcher, self._starters = _starters()
        self._signals = stop_signals()
        self._inbox, outbox = os.pipe()
        os.set_blocking(outbox, False)
        for number in self._signals:
            signal.signal(number, _note)
        signal.set_wakeup_fd(outbox, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="stop requests", daemon=True).start()

    @property
    def reason(self) -> str:
        """What ends the run, for a person."""
        return self.received or "a signal to another rank"

    def close(self) -> None:
        """The run is over: what has been saved is not to be lost to a late signal, and the launcher goes on."""
        self._is_open = False
        signal.set_wakeup_fd(-1)
        for number in self._signals:
            # Ignored, since Python puts default handlers back while it exits.
            signal.signal(number, signal.SIG_IGN)
        self._halt_launcher(False)

    def _watch(self) -> None:
        while self._is_open:
            if select.select([self._inbox], [], [], POLL_SECONDS)[0]:
                for number in os.read(self._inbox, 64):
                    self._receive(signal.Signals(number))
            if self.received is None:
                ended = next((process.pid for process in self._starters if _has_ended(process)), None)
                if ended is not None:
                    self._stop(f"the end of process {ended}, which had started it")

    def _receive(self, number: signal.Signals) -> None:
        if self.received is None:
            self._stop(number.name)
        # SLURM warns by one signal and, later, gives the last half minute with another.
        elif time.monotonic() - self._since > REPEAT_SECONDS and (
            number == signal.SIGINT or "SLURM_JOB_ID" not in os.environ
        ):
            self._halt_launcher(False)
            os._exit(128 + number)

    def _stop(self, reason: str) -> None:
        self._since = time.monotonic()
        self._halt_launcher(True)
        self.received = reason

    def _halt_launcher(self, halted: bool) -> None:
        if self._launcher is not None:
            with suppress(psutil.Error):
                self._launcher.suspend() if halted else self._launcher.resume()


def _starters() -> tuple[psutil.Process | None, list[psutil.Process]]:
    """DeepSpeed's launcher, if it is the parent, and all processes that this rank is not to outlive.

    The parent of a process that no launcher has started is a shell, which may end before it.
    """
    starters = []
    for word in os.environ.get(STARTED_BY, "").split():
        with suppress(psutil.Error, ValueError):
            starters.append(psutil.Process(int(word)))
    with suppress(psutil.Error):
        parent = psutil.Process().parent()
        if parent is not None and _DEEPSPEED_LAUNCHER in parent.cmdline():
            command = parent.parent()  # `deepspeed`, which a service manager may signal alone
            return parent, [*starters, parent, *([command] if command else [])]
        if parent is not None and "TORCHELASTIC_RUN_ID" in os.environ:
            starters.append(parent)
    return None, starters


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True


def _note(number: int, frame: FrameType | None) -> None:
    """That there is a handler makes Python write the signal's number to the pipe."""


# A process that is forked off would write its own signals to the same pipe.
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
