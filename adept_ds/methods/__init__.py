"""Tuning methods by name; each is one file behind the protocol of `adept_ds.methods.base`."""

from __future__ import annotations

from adept_ds.config import AdeptConfig
from adept_ds.methods.adept import Adept
from adept_ds.methods.base import Method
from adept_ds.methods.untuned import Untuned


def create_method(config: AdeptConfig) -> Method:
    """Return the method that the settings describe, not yet injected into a backbone."""
    return {"adept": Adept}[config.name](config)


__all__ = ["Adept", "Method", "Untuned", "create_method"]
