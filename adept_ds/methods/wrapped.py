"""The base of methods that put something around layers of the backbone: biases, bottlenecks, trained copies."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from adept_ds.contexts import attribute_set
from adept_ds.methods.base import MethodDefaults


class WrappedLayer(nn.Module):
    """Takes the place of a layer, which stays in it unchanged as `layer`. A subclass holds the trained parameters, in
    fp32 on the device of the backbone's embedding table, and says in `tuned` what comes out of them.

    Where it is `enabled` it computes `tuned(x)`, else `layer(x)`: [..., in] to [..., out] in the layer's dtype.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.enabled = True

    @property
    def weight(self) -> Any:
        """The layer's, which T5 asks for its dtype."""
        return self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        output: Tensor = self.tuned(x) if self.enabled else self.layer(x)
        return output

    def tuned(self, x: Tensor) -> Tensor:
        """What the method makes of the layer's input [..., in]: [..., out] in the layer's dtype."""
        raise NotImplementedError


class WrappedLayersMethod(MethodDefaults):
    """Puts a `WrappedLayer` in the place of some layers, which `wrap` chooses, and trains what was added to them.

    In the adapter file a parameter has the name of the layer and that of the parameter in the `WrappedLayer`.
    """

    @abstractmethod
    def wrap(self, backbone: PreTrainedModel, generator: torch.Generator | None) -> dict[str, WrappedLayer]:
        """Return what takes the places of layers, by their names in the backbone; see `Method.inject`."""

    @override
    def inject(
        self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator | None
    ) -> None:
        self._wrapped = self.wrap(backbone, generator)
        for name, module in self._wrapped.items():
            backbone.set_submodule(name, module)

    @override
    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{key}": parameter
            for name, module in self._wrapped.items()
            for key, parameter in module.named_parameters()
            if not key.startswith("layer.")
        }

    @contextmanager
    @override
    def disabled(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module in self._wrapped.values():
                stack.enter_context(attribute_set(module, "enabled", False))
            yield
