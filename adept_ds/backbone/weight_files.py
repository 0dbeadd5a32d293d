"""The safetensors files of a checkpoint, by their headers: whether they are whole, and which weights they hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adept_ds.errors import UserError

LENGTH_BYTES = 8
"""A file begins with the length of its JSON header, little-endian; the tensors follow it."""
LFS_START = b"version https://git-lfs"
SAMPLES, SAMPLE_BYTES = 4, 64
"""Pieces of each tensor, evenly spaced, that its fingerprint is of: some megabytes of a large model."""

Header = Mapping[str, Mapping[str, Any]]


def check_weight_files(paths: Sequence[Path]) -> None:
    """Refuse files that are not whole.

    Raises:
        UserError: As `read_header`.
    """
    from safetensors import SafetensorError, safe_open

    for path in paths:
        read_header(path)
        try:
            with safe_open(path, "pt"):
                pass  # It compares types, shapes and places of all tensors.
        except SafetensorError as error:
            raise UserError(f"{path} is no safetensors file: {error}") from error


def fingerprint(paths: Sequence[Path]) -> str:
    """sha256 over names, types, shapes and samples of all tensors: the same wherever the files lie and however the
    tensors are split over them.

    Raises:
        UserError: As `check_weight_files`.
    """
    found: dict[str, bytes] = {}
    for path in paths:
        start, header = read_header(path)
        with path.open("rb") as file:
            for name, tensor in header.items():
                first, last = tensor["data_offsets"]
                digest = hashlib.sha256(json.dumps([tensor["dtype"], tensor["shape"]]).encode())
                for number in range(SAMPLES):
                    file.seek(start + first + (last - first) * number // SAMPLES)
                    digest.update(file.read(min(SAMPLE_BYTES, last - first)))
                found[name] = digest.digest()
    whole = hashlib.sha256()
    for name in sorted(found):
        whole.update(name.encode() + found[name])
    return whole.hexdigest()


def read_header(path: Path) -> tuple[int, Header]:
    """Return where the tensors of a file start, and what it says of each: `dtype`, `shape`, `data_offsets` from there.

    Raises:
        UserError: It cannot be read, is none, is what git leaves in place of a large file, or is not as long as its
            header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            begin = file.read(LENGTH_BYTES)
            if LFS_START.startswith(begin) and begin:
                raise UserError(
                    f"{path} is a pointer of git-lfs, not the safetensors file that it stands for; fetch that by "
                    "`git lfs pull`"
                )
            start = LENGTH_BYTES + int.from_bytes(begin, "little")
            if len(begin) < LENGTH_BYTES or start > size:
                raise UserError(f"{path} is no whole safetensors file: {size:,} bytes, with a header of {start:,}")
            header = json.loads(file.read(start - LENGTH_BYTES))
        header.pop("__metadata__", None)
        end = start + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        _ = [(tensor["dtype"], tensor["shape"]) for tensor in header.values()]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no safetensors file: its header cannot be read ({error})") from error
    if end != size:
        raise UserError(
            f"{path} has {size:,} bytes and should have {end:,} by its safetensors header; fetch or copy it again"
        )
    return start, header


def read_index(path: Path) -> list[str]:
    """Return the names of the files that a checkpoint is split over, by its index.

    Raises:
        UserError: It is no index.
    """
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({str(name) for name in names})
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no index of safetensors files ({type(error).__name__}: {error})") from error
