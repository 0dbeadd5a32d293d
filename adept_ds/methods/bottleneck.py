"""Bottleneck adapters (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751) and AdapterDrop (Rueckle et al. 2021,
https://arxiv.org/abs/2010.11918), in the places of Karimi Mahabadi et al. 2021 (https://arxiv.org/abs/2106.04647),
whose figures the paper quotes.

    x + W_up act(W_down x + b_down) + b_up      W_down [r, d]   b_down [r]   W_up [d, r]   b_up [d]

behind the self-attention and the feed-forward part of each layer, before the residual sum; the weights of all layer
norms are trained too. With a norm of its own an adapter is x + LayerNorm(W_up act(W_down x + b_down) + b_up).

Where several tasks are trained together, each has adapters of its own and they share the norms ("Adapters" with a
dagger in Karimi Mahabadi et al. 2021, https://arxiv.org/abs/2106.04489). What is added to x is computed here for other
methods too, whose weights are made for the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from adept_ds.backbone.sharding import gathered
from adept_ds.config.method import AdapterConfig, AdapterDropConfig, BottleneckSettings
from adept_ds.methods.base import BatchValue
from adept_ds.methods.layers import embedding_table, layer_index, norms, output_layers
from adept_ds.methods.source_tasks import for_own_tasks
from adept_ds.methods.wrapped import WrappedLayer, WrappedLayersMethod
from adept_ds.storage.adapter_folder import Adapter

_INITIAL_STD = 0.01
BY_TASK = tuple(f".adapter.{name}" for name in ("w_down", "b_down", "w_up", "b_up"))
"""Ends of the names of parameters that each task has its own of."""
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


@dataclass(frozen=True)
class BottleneckWeights:
    """Weights of one place's adapter in fp32: `w_down` [r, d], `b_down` [r], `w_up` [d, r], `b_up` [d], and weight and
    bias of its norm [d] if it has one. Each may be stacked, [T, ...], for T tasks, or for the rows of a batch."""

    w_down: Tensor
    b_down: Tensor
    w_up: Tensor
    b_up: Tensor
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None

    @classmethod
    def of_places(cls, made: Iterable[Tensor]) -> tuple[BottleneckWeights, ...]:
        """Take weights of P places apart, of which each tensor has all, [T, P, ...].

        At once: the gradient of a part by itself would be as large as the whole, and mostly zeros.
        """
        return tuple(cls(*weights) for weights in zip(*(tensor.unbind(1) for tensor in made), strict=True))

    def added(self, x: Tensor, activation: Callable[[Tensor], Tensor], tasks: Tensor | None = None) -> Tensor:
        """Return W_up act(W_down x + b_down) + b_up, behind the norm if there is one.

        Args:
            x: What the adapter reads, in fp32 [..., d].
            activation: Between the two projections.
            tasks: Which of stacked weights a row has, [B], or in packed rows a position, [B, S]. If not given, stacked
                weights are those of the rows. Beams of a row stand side by side and are read as it is.
        """
        hidden = activation(_affine(x, self.w_down, self.b_down, tasks))
        added = _affine(hidden, self.w_up, self.b_up, tasks)
        if self.norm_weight is None or self.norm_bias is None:
            return added
        if self.norm_weight.dim() == 1:
            return F.layer_norm(added, added.shape[-1:], self.norm_weight, self.norm_bias)
        added = F.layer_norm(added, added.shape[-1:])
        weight, bias = (value if tasks is None else value[tasks] for value in (self.norm_weight, self.norm_bias))
        if weight.dim() > 2:
            return torch.addcmul(bias, weight, added)
        return torch.addcmul(bias[:, None], weight[:, None], _by_row(added, len(weight))).view_as(added)


def _affine(x: Tensor, weight: Tensor, bias: Tensor, tasks: Tensor | None) -> Tensor:
    """W x + b of x [..., in], see `BottleneckWeights`."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    if tasks is not None and tasks.dim() > 1:  # packed rows, whose positions are of several tasks
        of_tasks = [F.linear(x, *of_task) for of_task in zip(weight, bias, strict=True)]
        chosen = (torch.where((tasks == task)[..., None], one, 0) for task, one in enumerate(of_tasks))
        return sum(chosen, start=torch.zeros_like(of_tasks[0]))
    if tasks is not None:
        weight, bias = weight[tasks], bias[tasks]
    made = torch.baddbmm(bias[:, None], _by_row(x, len(weight)), weight.mT)
    return made.view(*x.shape[:-1], -1)


def _by_row(x: Tensor, rows: int) -> Tensor:
    """x [..., d] as [B, ., d]: beams of a row stand side by side, and some backbones have flattened rows and columns
    into one."""
    return x.reshape(rows, -1, x.shape[-1])


class BottleneckAdapter(nn.Module):
    """x + W_up act(W_down x + b_down) + b_up, computed in fp32 and cast once. The identity at the start, but with a
    norm, since zeros have no direction: W_up starts as W_down does then.

    Parameters: 2 r d + r + d, and 2 d of the norm. For each of T tasks the former are stacked, [T, ...], and the value
    of `batch` [B] says which task each row is of.
    """

    def __init__(
        self,
        width: int,
        config: BottleneckSettings,
        batch: BatchValue[Tensor] | None,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.batch, tasks, bottleneck = batch, (len(config.tasks),) if config.tasks else (), config.bottleneck
        w_down, w_up = torch.empty(*tasks, bottleneck, width), torch.zeros(*tasks, width, bottleneck)
        for drawn in (w_down, w_up) if config.post_norm else (w_down,):
            drawn.normal_(std=_INITIAL_STD, generator=generator)
        self.w_down, self.b_down = nn.Parameter(w_down), nn.Parameter(torch.zeros(*tasks, bottleneck))
        self.w_up, self.b_up = nn.Parameter(w_up), nn.Parameter(torch.zeros(*tasks, width))
        self.norm_weight = nn.Parameter(torch.ones(width)) if config.post_norm else None
        self.norm_bias = nn.Parameter(torch.zeros(width)) if config.post_norm else None
        self.activation = _ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] to [..., d], in the dtype of x."""
        values = (self.w_down, self.b_down, self.w_up, self.b_up, self.norm_weight, self.norm_bias)
        weights = BottleneckWeights(*(value.float() for value in values if value is not None))
        wide = x.float()
        return (wide + weights.added(wide, self.activation, self.batch.value if self.batch else None)).to(x.dtype)


class AdaptedLayer(WrappedLayer):
    """A layer and what is made of its output."""

    def __init__(self, layer: nn.Module, adapter: nn.Module) -> None:
        super().__init__(layer)
        self.adapter = adapter

    @override
    def tuned(self, x: Tensor) -> Tensor:
        output: Tensor = self.adapter(self.layer(x))
        return output


class TrainedCopy(WrappedLayer):
    """A copy of a layer with trained fp32 parameters."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        with gathered(layer.parameters()):
            parameters = {id(old): nn.Parameter(old.detach().float().clone()) for old in layer.parameters()}
            self.trained = copy.deepcopy(layer, parameters)

    @override
    def tuned(self, x: Tensor) -> Tensor:
        output: Tensor = self.trained(x)
        return output.to(x.dtype)


class Bottleneck(WrappedLayersMethod):
    """Adapters behind the two parts of each layer, and trained layer norms; made from an `AdapterConfig` or an
    `AdapterDropConfig`, which leaves the lowest layers without."""

    config: AdapterConfig | AdapterDropConfig

    def __init__(self, config: AdapterConfig | AdapterDropConfig) -> None:
        super().__init__(config)
        self.batch: BatchValue[Tensor] | None = BatchValue() if config.tasks else None

    @override
    def wrap(self, backbone: PreTrainedModel, generator: torch.Generator | None) -> dict[str, WrappedLayer]:
        """Choose the outputs of each layer's two parts, and the norms.

        Raises:
            UserError: The backbone is of no family.
        """
        config = self.config
        dropped = config.dropped_layers if isinstance(config, AdapterDropConfig) else 0
        table = embedding_table(backbone)
        wrapped: dict[str, WrappedLayer] = {}
        for name, layer in output_layers(backbone).items():
            if (layer_index(name) or 0) >= dropped:
                adapter = BottleneckAdapter(table.embedding_dim, config, self.batch, generator)
                wrapped[name] = AdaptedLayer(layer, adapter.to(table.weight.device))
        if config.train_norms:
            wrapped |= {name: TrainedCopy(norm) for name, norm in norms(backbone).items()}
        return wrapped

    @override
    def for_batch(self, context: Tensor, task_ids: Tensor, example_ids: Tensor | None = None) -> Tensor:
        return task_ids

    @override
    def start_values(self, source: Adapter) -> dict[str, Tensor]:
        """Each task's adapters; the norms are all tasks'.

        Raises:
            UserError: As `for_own_tasks`.
        """
        values = dict(source.tensors)
        for name, value in source.tensors.items():
            if name.endswith(BY_TASK):
                stacked = value if source.method.prompt_tasks else value[None]
                own = for_own_tasks(stacked, source, self.config)
                values[name] = own if self.config.tasks else own[0]
        return values
