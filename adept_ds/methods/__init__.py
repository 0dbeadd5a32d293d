"""Tuning methods by name; each is one file behind the protocol of `adept_ds.methods.base`."""

from __future__ import annotations

from typing import Any

from adept_ds.method_config import MethodConfig
from adept_ds.methods.adept import Adept
from adept_ds.methods.base import Method
from adept_ds.methods.full import Full
from adept_ds.methods.untuned import Untuned

_METHODS: dict[str, Any] = {"adept": Adept, "full": Full}
"""Class of each method, made from its settings."""


def create_method(config: MethodConfig) -> Method:
    """Return the method that the settings describe, not yet injected into a backbone."""
    return _METHODS[config.name](config)


__all__ = ["Adept", "Full", "Method", "Untuned", "create_method"]
