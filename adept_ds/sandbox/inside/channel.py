"""Messages between two processes of the sandbox: a 4-byte length and JSON, on a stream socket."""

from __future__ import annotations

import os
import struct
from builtins import EOFError, ValueError, bytearray, bytes, len, min  # noqa: UP029
from typing import Any

from . import codec

_read, _write = os.read, os.write
HEADER = struct.Struct("!I")
_pack, _unpack = HEADER.pack, HEADER.unpack
_dumps, _loads = codec.dumps, codec.loads


class TooLong(ValueError):
    """A message that is longer than the reader takes."""


def receive(descriptor: int, most: int = 1 << 31) -> Any:
    """Wait for a message; raises EOFError at the end of the stream, `TooLong`, ValueError for what is no JSON."""
    (length,) = _unpack(_exactly(descriptor, 4))
    if length > most:
        raise TooLong(f"a message of {length} bytes")
    return _loads(_exactly(descriptor, length).decode("ascii"))


def _exactly(descriptor: int, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = _read(descriptor, min(count - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def send(descriptor: int, message: Any) -> None:
    """Send a message."""
    data = _dumps(message).encode("ascii")
    data = _pack(len(data)) + data
    while data:
        data = data[_write(descriptor, data) :]


def read_job(descriptor: int) -> Any:
    """Return the message that a file holds, and close it."""
    data = _exactly(descriptor, os.lseek(descriptor, 0, os.SEEK_END) - os.lseek(descriptor, 0, os.SEEK_SET))
    os.close(descriptor)
    return _loads(data.decode("ascii"))
