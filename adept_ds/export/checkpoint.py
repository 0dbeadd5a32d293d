"""Writing a checkpoint that is another one but for some tensors, piece by piece.

`safetensors` writes a file from tensors that are all in memory. Here a tensor that stays as it is is copied from file
to file, and one that changes is written in the parts in which it is computed, so that a model of any size needs the
memory of one part. A file in which nothing changes is a hard link where that can be.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from adept_ds.backbone.hub import INDEX_NAME
from adept_ds.backbone.weight_files import LENGTH_BYTES, read_header
from adept_ds.files import atomic_write, usual_mode, write_json

TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Names in files of the types that weights have; tensors of other types stay as they are."""
NAMES = {dtype: name for name, dtype in TYPES.items()}
_WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_COPY_BYTES = 16 << 20


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file."""

    type_name: str
    shape: Sequence[int]
    path: Path
    start: int
    nbytes: int

    def pieces(self) -> Iterator[memoryview]:
        """Its bytes."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = self.nbytes
            while left:
                piece = file.read(min(left, _COPY_BYTES))
                left -= len(piece)
                yield memoryview(piece)


@dataclass(frozen=True)
class Made:
    """A tensor that is computed while it is written."""

    type_name: str
    shape: Sequence[int]
    parts: Callable[[], Iterable[Tensor]]
    """Gives its values in order, in parts of any size and floating-point type."""

    @property
    def nbytes(self) -> int:
        """Of the whole tensor."""
        return prod(self.shape) * TYPES[self.type_name].itemsize

    def pieces(self) -> Iterator[memoryview]:
        """Its bytes."""
        for part in self.parts():
            values = part.detach().to(TYPES[self.type_name]).contiguous()
            yield values.view(-1).view(torch.uint8).numpy().data


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Return the tensors of a safetensors file by name."""
    start, header = read_header(path)
    return {
        name: Stored(fact["dtype"], fact["shape"], path, start + fact["data_offsets"][0], last - first)
        for name, fact in header.items()
        for first, last in [fact["data_offsets"]]
    }


def write_tensors(path: Path, tensors: Mapping[str, Stored | Made]) -> str:
    """Write a safetensors file, whole or not at all; return its sha256.

    Raises:
        ValueError: A tensor gives other bytes than its shape says.
    """
    # Wide types come first, as in the files of `safetensors`, so that every tensor lies at a multiple of its width.
    order = sorted(tensors, key=lambda name: (-_WIDTHS.get(tensors[name].type_name, 1), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        header[name] = {
            "dtype": tensor.type_name,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    digest = hashlib.sha256()
    with atomic_write(path, "wb") as file:
        head = len(text).to_bytes(LENGTH_BYTES, "little") + text
        digest.update(head)
        file.write(head)
        for name in order:
            written = 0
            for piece in tensors[name].pieces():
                digest.update(piece)
                written += file.write(piece)
            if written != tensors[name].nbytes:
                raise ValueError(f"{name} should have {tensors[name].nbytes} bytes, and {written} were given")
    return digest.hexdigest()


def rewrite(
    paths: Sequence[Path],
    folder: Path,
    changed: Mapping[str, Made],
    added: Mapping[str, Made],
    dtype: torch.dtype | None = None,
    show_progress: bool = True,
) -> dict[str, str | None]:
    """Write the files of a checkpoint into `folder` with some of its tensors changed, and some more.

    Readers of checkpoints take every tensor that they find in the files, whatever an index says; so none stays that was
    changed.

    Args:
        paths: The checkpoint's safetensors files.
        folder: An existing folder.
        changed: In the place of the tensors of these names.
        added: Further tensors, for the file in which the first changed one is, or the last file.
        dtype: What all weights are converted to; None leaves them as they are.
        show_progress: Whether to show it.

    Returns:
        Names of the files, with the sha256 of those that were written anew; None for a link to, or a copy of, the
        checkpoint's own.
    """
    hashes: dict[str, str | None] = {}
    contents = {path: stored_tensors(path) for path in paths}
    host = next((path for path, tensors in contents.items() if changed.keys() & tensors.keys()), paths[-1])
    places: dict[str, str] = {}
    total = 0
    for path, tensors in tqdm(contents.items(), desc="write", unit="file", disable=not show_progress):
        written: dict[str, Stored | Made] = {}
        for name, tensor in tensors.items():
            written[name] = changed.get(name) or _converted(name, tensor, dtype)
        written |= added if path == host else {}
        is_same = all(written[name] is tensors.get(name) for name in written)
        hashes[path.name] = None
        if is_same:
            _link(path, folder / path.name)
        else:
            hashes[path.name] = write_tensors(folder / path.name, written)
        places |= dict.fromkeys(written, path.name)
        total += sum(tensor.nbytes for tensor in written.values())
    if len(paths) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_json(folder / INDEX_NAME, index)
    return hashes


def _converted(name: str, tensor: Stored, dtype: torch.dtype | None) -> Stored | Made:
    if dtype is None or tensor.type_name not in TYPES or TYPES[tensor.type_name] == dtype:
        return tensor

    def parts() -> Iterator[Tensor]:
        with safe_open(tensor.path, "pt") as file:
            yield file.get_tensor(name)

    return Made(NAMES[dtype], tensor.shape, parts)


def _link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy of it: on another disk, or where others could not read it."""
    source = source.resolve()
    if source.stat().st_mode & usual_mode() == usual_mode():
        with suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)
    target.chmod(usual_mode())
