"""What all command-line programs share: a user's mistake ends in one message, never in a traceback."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence

from adept_ds.errors import UserError

USER_ERROR_STATUS = 2


def is_main_rank() -> bool:
    """Whether the launcher made this process rank 0; for use before the process group exists."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0


def run_entry_point(main: Callable[[Sequence[str]], int | None]) -> None:
    """Call `main` with the command-line arguments and exit with its status (None is 0).

    A `UserError` is the same on every rank, so only rank 0 prints it. The others leave a little later: a launcher ends
    all ranks when the first one fails, which must not be before rank 0 has spoken.
    """
    try:
        sys.exit(main(sys.argv[1:]) or 0)
    except UserError as error:
        if is_main_rank():
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(3)
        sys.exit(USER_ERROR_STATUS)
