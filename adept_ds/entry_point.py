"""What all command-line programs share: a user's mistake ends in one message, never in a traceback."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from adept_ds.errors import NodeError, UserError
from adept_ds.rank_environment import is_main_rank, take_slurm_ranks

USER_ERROR_STATUS = 2
BROKEN_PIPE_STATUS = 128 + signal.SIGPIPE
OUTSIDE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EIO}
"""Errors of a file that lie outside the program: it may not be written, or there is no room."""


def run_entry_point(main: Callable[[Sequence[str]], int | None]) -> None:
    """Call `main` with the command-line arguments and exit with its status (None is 0). A task of SLURM becomes a rank.

    A `UserError` is the same on every rank unless it is a `NodeError`, so only rank 0 prints it. The others leave a
    little later: a launcher ends all ranks when the first one fails, which must not be before rank 0 has spoken. Files
    that may not be written and full disks are told in a line, too. A reader of the output that goes away, such as
    `head`, ends the program in silence, as the signal SIGPIPE would.
    """
    take_slurm_ranks(os.environ)
    try:
        try:
            status: int | str | None = main(sys.argv[1:])
        except SystemExit as end:  # argparse, after its help
            status = end.code
        sys.stdout.flush()
        sys.exit(status)
    except UserError as error:
        if is_main_rank() or isinstance(error, NodeError):
            print(f"error: {error}", file=sys.stderr, flush=True)
            _record_error(str(error), of_rank=False)
        else:
            time.sleep(3)
        sys.exit(USER_ERROR_STATUS)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _has_no_reader(sys.stdout):
            # What is left in the buffer would fail again when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(BROKEN_PIPE_STATUS)
        if isinstance(error, OSError) and error.errno in OUTSIDE:
            message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            print(f"error: {message}", file=sys.stderr, flush=True)
            _record_error(message, of_rank=True)
            sys.exit(USER_ERROR_STATUS)
        _record_error(f"{type(error).__name__}: {error}", of_rank=True)
        raise


def _has_no_reader(stream: IO[str]) -> bool:
    """Whether nobody reads a pipe any more."""
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _record_error(message: str, of_rank: bool) -> None:
    """Leave the message where the launcher asks for it: with the time it tells which rank was the first to fail."""
    path = os.environ.get("ADEPT_DS_ERROR_FILE")
    if path:
        record = {"time": time.time(), "error": message, "of_rank": of_rank}
        with suppress(OSError):  # on a full disk, which may be the error itself
            Path(path).write_text(json.dumps(record), encoding="utf-8")
