"""What all command-line programs share: a user's mistake ends in one message, never in a traceback."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from adept_ds.errors import NodeError, UserError
from adept_ds.rank_environment import is_main_rank, take_slurm_ranks

USER_ERROR_STATUS = 2


def run_entry_point(main: Callable[[Sequence[str]], int | None]) -> None:
    """Call `main` with the command-line arguments and exit with its status (None is 0). A task of SLURM becomes a rank.

    A `UserError` is the same on every rank unless it is a `NodeError`, so only rank 0 prints it. The others leave a
    little later: a launcher ends all ranks when the first one fails, which must not be before rank 0 has spoken.
    """
    take_slurm_ranks(os.environ)
    try:
        sys.exit(main(sys.argv[1:]) or 0)
    except UserError as error:
        if is_main_rank() or isinstance(error, NodeError):
            print(f"error: {error}", file=sys.stderr, flush=True)
            _record_error(str(error), of_rank=False)
        else:
            time.sleep(3)
        sys.exit(USER_ERROR_STATUS)
    except Exception as error:
        _record_error(f"{type(error).__name__}: {error}", of_rank=True)
        raise


def _record_error(message: str, of_rank: bool) -> None:
    """Leave the message where the launcher asks for it: with the time it tells which rank was the first to fail."""
    path = os.environ.get("ADEPT_DS_ERROR_FILE")
    if path:
        record = {"time": time.time(), "error": message, "of_rank": of_rank}
        Path(path).write_text(json.dumps(record), encoding="utf-8")
