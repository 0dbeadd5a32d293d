"""Context managers that change something for a block of code and put it back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def attribute_set(target: object, name: str, value: object) -> Iterator[None]:
    """Set an instance attribute inside the block; after it the instance is as it was before."""
    own = vars(target)
    had, old = name in own, own.get(name)
    setattr(target, name, value)
    try:
        yield
    finally:
        if had:
            setattr(target, name, old)
        else:
            delattr(target, name)
