"""Bottleneck adapters (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751) and AdapterDrop (Rueckle et al. 2021,
https://arxiv.org/abs/2010.11918), in the places of Karimi Mahabadi et al. 2021 (https://arxiv.org/abs/2106.04647),
whose figures the paper quotes.

    x + W_up act(W_down x + b_down) + b_up      W_down [r, d]   b_down [r]   W_up [d, r]   b_up [d]

behind the self-attention and the feed-forward part of each layer, before the residual sum; the weights of all layer
norms are trained too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adept_ds.backbone.sharding import gathered
from adept_ds.config.method import AdapterConfig, AdapterDropConfig
from adept_ds.contexts import attribute_set
from adept_ds.methods.base import MethodDefaults
from adept_ds.methods.layers import layer_index, layer_names, norms, replace

_INITIAL_STD = 0.01
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class BottleneckAdapter(nn.Module):
    """x + W_up act(W_down x + b_down) + b_up, computed in fp32 and cast once. The identity at the start.

    Parameters: 2 r d + r + d.
    """

    def __init__(self, width: int, bottleneck: int, activation: str, generator: torch.Generator | None) -> None:
        super().__init__()
        self.w_down = nn.Parameter(torch.empty(bottleneck, width).normal_(std=_INITIAL_STD, generator=generator))
        self.b_down = nn.Parameter(torch.zeros(bottleneck))
        self.w_up = nn.Parameter(torch.zeros(width, bottleneck))
        self.b_up = nn.Parameter(torch.zeros(width))
        self.activation = _ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] to [..., d], in the dtype of x."""
        hidden = self.activation(F.linear(x.float(), self.w_down.float(), self.b_down.float()))
        return (x.float() + F.linear(hidden, self.w_up.float(), self.b_up.float())).to(x.dtype)


class AdaptedLayer(nn.Module):
    """A layer and what is made of its output."""

    def __init__(self, layer: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.adapter = adapter
        self.enabled = True

    @property
    def weight(self) -> Any:
        """The layer's, which T5 asks for its dtype."""
        return self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return self.adapter(self.layer(x)) if self.enabled else self.layer(x)


class TrainedCopy(nn.Module):
    """A frozen layer and a copy of it with trained fp32 parameters, which takes its place."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        with gathered(layer.parameters()):
            parameters = {id(old): nn.Parameter(old.detach().float().clone()) for old in layer.parameters()}
            trained = copy.deepcopy(layer, parameters)
        self.layer = layer
        self.trained = trained
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] to [..., d], in the dtype of x."""
        return self.trained(x).to(x.dtype) if self.enabled else self.layer(x)


class Bottleneck(MethodDefaults):
    """Adapters behind the two parts of each layer, and trained layer norms; made from an `AdapterConfig` or an
    `AdapterDropConfig`, which leaves the lowest layers without."""

    num_virtual_tokens = 0

    def __init__(self, config: AdapterConfig | AdapterDropConfig) -> None:
        self.config = config
        self._dropped = config.dropped_layers if isinstance(config, AdapterDropConfig) else 0

    def inject(
        self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator | None
    ) -> None:
        """See `Method.inject`."""
        config, names = self.config, layer_names(backbone)
        table = cast(nn.Embedding, backbone.get_input_embeddings())
        outputs = (f".{names.attention_output}", f".{names.feed_forward_output}")
        places = {name: module for name, module in backbone.named_modules() if name.endswith(outputs)}
        self._changed: dict[str, AdaptedLayer | TrainedCopy] = {}
        for name, layer in places.items():
            if (layer_index(name) or 0) >= self._dropped:
                adapter = BottleneckAdapter(table.embedding_dim, config.bottleneck, config.activation, generator)
                self._changed[name] = AdaptedLayer(layer, adapter.to(table.weight.device))
        if config.train_norms:
            self._changed |= {name: TrainedCopy(norm) for name, norm in norms(backbone).items()}
        for name, module in self._changed.items():
            replace(backbone, name, module)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """See `Method.trained_parameters`."""
        return {
            f"{name}.{key}": parameter
            for name, module in self._changed.items()
            for key, parameter in module.named_parameters()
            if not key.startswith("layer.")
        }

    def learning_rate_group(self, name: str) -> str:
        """See `Method.learning_rate_group`."""
        return "adapter"

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """See `Method.disabled`."""
        with ExitStack() as stack:
            for module in self._changed.values():
                stack.enter_context(attribute_set(module, "enabled", False))
            yield
