"""What all command-line programs share: a user's mistake ends in one message, never in a traceback."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TextIO

from typing_extensions import override

from adept_ds.errors import NodeError, UserError
from adept_ds.rank_environment import is_main_rank, take_slurm_ranks

USER_ERROR_STATUS = 2
CLOSED_OUTPUT_STATUS = 141
"""As a shell tells of a program that SIGPIPE has ended."""
OUTSIDE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EIO}
"""Errors of a file that lie outside the program: it may not be written, or there is no room."""


def run_entry_point(main: Callable[[Sequence[str]], int | None]) -> None:
    """Call `main` with the command-line arguments and exit with its status (None is 0). A task of SLURM becomes a rank.

    What lies outside the program, such as a full disk, is told without a traceback; behind one that is thrown all the
    same the last line says what to do.

    A `UserError` is the same on every rank unless it is a `NodeError`, so only rank 0 prints it. The others leave a
    little later: a launcher ends all ranks when the first one fails, which must not be before rank 0 has spoken. A
    reader of the output that goes away, such as `head`, ends the program in silence, as the signal SIGPIPE would.
    """
    take_slurm_ranks(os.environ)
    # A name of a file can be more than the terminal's encoding holds.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        try:
            status: int | str | None = main(sys.argv[1:])
        except SystemExit as end:  # argparse, after its help
            status = end.code
        sys.stdout.flush()
        sys.exit(status or 0)
    except UserError as error:
        if is_main_rank() or isinstance(error, NodeError):
            print(f"error: {error}", file=sys.stderr, flush=True)
            _record_error(str(error), of_rank=False)
        else:
            time.sleep(3)
        sys.exit(USER_ERROR_STATUS)
    except BrokenPipeError:
        # Who reads the output, such as `head`, has seen enough.
        _to_nowhere(sys.stdout)
        sys.exit(CLOSED_OUTPUT_STATUS)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        _record_error(f"{type(error).__name__}: {error}", of_rank=True)
        if error.errno not in OUTSIDE and (error.strerror is None or error.filename is None):
            _tell_fault(error)
        # The disk, or a permission: where in the program it was met helps nobody.
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR_STATUS)
    except Exception as error:
        _record_error(f"{type(error).__name__}: {error}", of_rank=True)
        _tell_fault(error)


ADVICE = {
    "OutOfMemoryError": "the GPU has no memory left: lower train.micro_batch_size or data.max_length, or see what fits "
    "by `adept-ds plan`; other processes on the GPU count too",
    "MemoryError": "this machine has no memory left: see what fits by `adept-ds plan`",
    "DistBackendError": "the ranks lost one another: look at the first error of any rank above, and at the network",
    "MainRankError": "look at the error of rank 0 above",
}
"""Type of an exception that is nobody's mistake in the settings, to what can be done."""
OTHERWISE = "this is a fault of adept-ds, or of a library under it: please report the lines above with the config"


def _tell_fault(error: Exception) -> NoReturn:
    """Print where it was met, and in the last line what to do."""
    sys.excepthook(type(error), error, error.__traceback__)
    advice = ADVICE.get(type(error).__name__, OTHERWISE)
    if isinstance(error, OSError) and error.strerror:
        advice = f"the operating system says {error.strerror!r}: look at the disks and limits of this machine"
    print(f"what to do: {advice}", file=sys.stderr, flush=True)
    sys.exit(1)


def outlive_console() -> None:
    """From now on what is printed goes nowhere once it cannot be written: the terminal is gone, `tee` has ended by the
    same Ctrl-C, the disk of a redirected log is full. A run has its own record of what it does."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and not isinstance(stream, _Console):
            stream.flush()
            setattr(sys, name, _Console(stream))


class _Console(io.TextIOWrapper):
    """A stream over another one's file that never fails."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        super().__init__(
            stream.buffer,
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        self._stream = stream  # which would close the file if it were given up

    @override
    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            _to_nowhere(self)
            return len(text)

    @override
    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            _to_nowhere(self)


def _to_nowhere(stream: TextIO) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _record_error(message: str, of_rank: bool) -> None:
    """Leave the message where the launcher asks for it: with the time it tells which rank was the first to fail."""
    path = os.environ.get("ADEPT_DS_ERROR_FILE")
    if path:
        record = {"time": time.time(), "error": message, "of_rank": of_rank}
        with suppress(OSError):  # on a full disk, which may be the error itself
            Path(path).write_text(json.dumps(record), encoding="utf-8")
