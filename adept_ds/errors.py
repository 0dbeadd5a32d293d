"""The one exception type for mistakes that a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """A mistake in a config, a file or a command; entry points print its message without a traceback."""


class NodeError(UserError):
    """A fault of one machine among several, so that not every rank meets it."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the choice nearest to `word`, or an empty string if none is near."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def did_you_mean_path(path: str) -> str:
    """As `did_you_mean`, for a path that is not there, among what lies in its folder."""
    folder = Path(path).parent
    return did_you_mean(path, map(str, folder.iterdir())) if folder.is_dir() else ""
