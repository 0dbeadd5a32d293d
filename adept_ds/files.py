"""Files that are either whole or not there, and JSON in them."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from adept_ds.errors import UserError


def repository() -> Path | None:
    """The checkout that this package lies in; None where pip has installed a copy of it."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "launchers" / "slurm").is_dir() else None


def user_cache() -> Path:
    """The user's folder for what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adept_ds"


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file beside `path` and rename it to `path` once the block has ended without an exception.

    The data is flushed to disk before the rename, so a reader (or a restart after a crash) sees the old file or the
    new one, never a part of it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        os.chmod(descriptor, usual_mode())
        with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say whose it is
        raise


def read_end(path: Path) -> str:
    """The last 64 KiB of a file as text, or all of a shorter one."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65_536))
        return file.read().decode(errors="replace")


def usual_mode() -> int:
    """Mode of a new file as the umask says; temporary files, and those of safetensors, are made for the user alone."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def left_by_atomic_write(path: Path) -> Iterator[Path]:
    """Yield the temporary files that killed processes have left beside `path`."""
    yield from path.parent.glob(f".{path.name}.????????")


def parse_json(text: str, **options: Any) -> Any:
    """As `json.loads`; `json.JSONDecodeError` also for what Python cannot hold: integers of thousands of digits, lists
    in lists to a depth of hundreds."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None
    except (json.JSONDecodeError, UserError):
        raise
    except ValueError:
        raise json.JSONDecodeError("an integer with too many digits", text, 0) from None


def json_text(value: Any, indent: int | None = None) -> str:
    """Return `value` as JSON, which has neither NaN nor Infinity: such numbers become null."""
    return json.dumps(_without_odd_numbers(value), indent=indent, allow_nan=False)


def _without_odd_numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_odd_numbers(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_odd_numbers(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all; as `json_text`."""
    with atomic_write(path) as file:
        file.write(json_text(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        UserError: It holds something else.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value
