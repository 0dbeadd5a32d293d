"""A backbone's blocks: the layers of its stacks, each of them a unit that is compiled, and gathered, as a whole."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def blocks_of(backbone: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the blocks by name, in the order of the modules: those that `transformers` never splits over devices.

    Of blocks within one another the outermost counts. There are none where a model does not name their classes.
    """
    classes, blocks = set(backbone._no_split_modules or ()), dict[str, nn.Module]()
    outermost = ""
    for name, module in backbone.named_modules():
        if type(module).__name__ in classes and not (outermost and name.startswith(outermost)):
            blocks[name], outermost = module, f"{name}."
    return blocks
