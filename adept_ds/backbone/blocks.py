"""A backbone's blocks: its decoder and encoder layers, each of them a unit that is compiled and gathered as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def backbone_layers(backbone: nn.Module) -> list[nn.Module]:
    """The decoder and encoder layers in their order: modules that `transformers` would not split over devices, or else
    the members of lists of modules. Of nested ones the outermost."""
    names = set(getattr(backbone, "_no_split_modules", None) or ())
    found = list(_outermost(backbone, lambda module, _: type(module).__name__ in names))
    return found or list(_outermost(backbone, lambda _, parent: isinstance(parent, nn.ModuleList)))


def _outermost(parent: nn.Module, is_layer: Any) -> Iterator[nn.Module]:
    for module in parent.children():
        if is_layer(module, parent):
            yield module
        else:
            yield from _outermost(module, is_layer)
