"""HyperFormer++ (Karimi Mahabadi et al. 2021, https://arxiv.org/abs/2106.04489): one network makes all adapters of all
tasks of a stack, an encoder or decoder.

    z  = LayerNorm(W_2 ReLU(W_1 [e_task; e_layer; e_place] + b_1) + b_2)        e, z [k]
    y' = y + LayerNorm(U gelu(D y + b_D) + b_U)                                 D [b, d]   U [d, b]

y is the output of a layer's self-attention or of its feed-forward part, before the residual sum. Each of D, b_D, U, b_U
and the weight and bias of the norm behind is a linear function of z, the same for all tasks, layers and places. All are
small at the start, so that training starts near the backbone. The weights of the backbone's own norms are trained too.

The embeddings e_task are what tasks have of their own; both stacks read them. A decoder-only backbone has one stack.
Only T5's form was published.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from adept_ds.config.method import HyperFormerConfig
from adept_ds.contexts import attribute_set
from adept_ds.methods.base import BatchValue
from adept_ds.methods.bottleneck import AdaptedLayer, BottleneckWeights, TrainedCopy
from adept_ds.methods.hyper_network import HyperNetworkMethod, fp32_linear
from adept_ds.methods.layers import embedding_table, feed_forward_layers, layer_index, norms, output_layers
from adept_ds.methods.source_tasks import for_own_tasks
from adept_ds.methods.wrapped import WrappedLayer
from adept_ds.storage.adapter_folder import Adapter

INITIAL_STD = 0.01
"""Standard deviation of the draws that the linear layers' weights start at, as in the published code."""
NORM_EPSILON = 1e-6
"""Of the norm of z."""
PLACES = 2
"""A layer's adapters: that of the feed-forward part is 0, that of the self-attention 1."""
_TASKS = "hyper_network.tasks"


class AdapterGenerator(nn.Module):
    """What makes the adapters of a stack's L layers. Its embeddings start at draws from N(0, 1).

    Parameters, with h = `hidden_size`: k L + 2 k + (3 k + 1) h + (h + 1) k + 2 k + (k + 1) (2 d b + 3 d + b).
    """

    def __init__(self, layers: int, width: int, config: HyperFormerConfig, generator: torch.Generator | None) -> None:
        super().__init__()
        size, hidden, bottleneck = config.embedding_size, config.hidden_size, config.bottleneck
        self.layers = nn.Parameter(torch.empty(layers, size).normal_(generator=generator))
        self.places = nn.Parameter(torch.empty(PLACES, size).normal_(generator=generator))
        draw = partial(nn.init.normal_, std=INITIAL_STD, generator=generator)
        self.first, self.second = fp32_linear(3 * size, hidden, draw), fp32_linear(hidden, size, draw)
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self._shapes = {
            "w_down": (bottleneck, width),
            "b_down": (bottleneck,),
            "w_up": (width, bottleneck),
            "b_up": (width,),
            "norm_weight": (width,),
            "norm_bias": (width,),
        }
        self.heads = nn.ModuleDict(
            {name: fp32_linear(size, torch.Size(shape).numel(), draw) for name, shape in self._shapes.items()}
        )

    def forward(self, tasks: Tensor) -> tuple[Tensor, ...]:
        """Return the weights that `BottleneckWeights` has, of embeddings of tasks [T, k]: each [T, 2 L, ...], a layer's
        places one after another."""
        shape = (len(tasks), len(self.layers), PLACES, tasks.shape[1])
        parts = (tasks[:, None, None], self.layers[:, None], self.places)
        z = self.second(F.relu(self.first(torch.cat([part.float().expand(shape) for part in parts], -1))))
        z = F.layer_norm(z, z.shape[-1:], self.norm_weight.float(), self.norm_bias.float(), NORM_EPSILON)
        return tuple(self.heads[name](z.flatten(1, 2)).unflatten(-1, shape) for name, shape in self._shapes.items())


class HyperNetwork(nn.Module):
    """Embeddings of tasks [T, k] and the generators of all stacks, by the names of these."""

    def __init__(
        self, layers: dict[str, int], width: int, config: HyperFormerConfig, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        tasks = max(1, len(config.tasks))
        self.tasks = nn.Parameter(torch.empty(tasks, config.embedding_size).normal_(generator=generator))
        for stack, number in layers.items():
            self.add_module(stack, AdapterGenerator(number, width, config, generator))

    def forward(self) -> dict[str, tuple[Tensor, ...]]:
        """Return the weights of all tasks' adapters of each stack; see `AdapterGenerator`."""
        return {stack: generator(self.tasks) for stack, generator in self.named_children()}


@dataclass(frozen=True)
class GeneratedWeights:
    """What the layers read of a batch's rows."""

    tasks: Tensor
    """Each row's task [B], or each position's [B, S]."""
    of_stacks: dict[str, tuple[BottleneckWeights, ...]]


class GeneratedAdapter(nn.Module):
    """y + LayerNorm(U gelu(D y + b_D) + b_U) with weights that were made for the batch; computed in fp32, cast once."""

    def __init__(self, stack: str, number: int, batch: BatchValue[GeneratedWeights]) -> None:
        super().__init__()
        self.stack, self.number, self.batch = stack, number, batch

    def forward(self, y: Tensor) -> Tensor:
        """[..., d] to [..., d], in the dtype of y."""
        made, wide = self.batch.value, y.float()
        assert made is not None
        weights = made.of_stacks[self.stack][self.number]
        return (wide + weights.added(wide, partial(F.gelu, approximate="tanh"), made.tasks)).to(y.dtype)


class HyperFormer(HyperNetworkMethod):
    """Adapters of all tasks by one network for each stack, and trained layer norms; made from a `HyperFormerConfig`.

    For T5-base and eight tasks 5,211,056 parameters, 651,382 for each.
    """

    config: HyperFormerConfig
    _kept: dict[str, tuple[BottleneckWeights, ...]] | None = None
    """Weights of each stack, where they are kept; empty until they are made."""

    def __init__(self, config: HyperFormerConfig) -> None:
        super().__init__(config)
        self.batch: BatchValue[GeneratedWeights] = BatchValue()

    @override
    def wrap(self, backbone: PreTrainedModel, generator: torch.Generator | None) -> dict[str, WrappedLayer]:
        """Choose the outputs of each layer's two parts, and the norms.

        Raises:
            UserError: The backbone is of no family.
        """
        config, table = self.config, embedding_table(backbone)
        outputs, feed_forward = output_layers(backbone), feed_forward_layers(backbone)
        of_encoder = (
            {id(module) for module in backbone.get_encoder().modules()} if backbone.config.is_encoder_decoder else ()
        )
        layers: dict[str, int] = {}
        wrapped: dict[str, WrappedLayer] = {}
        for name, layer in outputs.items():
            stack, index = "encoder" if id(layer) in of_encoder else "decoder", layer_index(name) or 0
            layers[stack] = max(layers.get(stack, 0), index + 1)
            place = PLACES * index + (0 if name in feed_forward else 1)
            wrapped[name] = AdaptedLayer(layer, GeneratedAdapter(stack, place, self.batch))
        self.network = HyperNetwork(layers, table.embedding_dim, config, generator).to(table.weight.device)
        if config.train_norms:
            wrapped |= {name: TrainedCopy(norm) for name, norm in norms(backbone).items()}
        return wrapped

    @override
    def for_batch(self, context: Tensor, task_ids: Tensor, example_ids: Tensor | None = None) -> GeneratedWeights:
        of_stacks = {} if self._kept is None else self._kept
        if not of_stacks:
            of_stacks.update({stack: BottleneckWeights.of_places(made) for stack, made in self.network().items()})
        return GeneratedWeights(task_ids, of_stacks)

    @override
    def unchanging(self) -> AbstractContextManager[None]:
        return attribute_set(self, "_kept", {})

    @override
    def start_values(self, source: Adapter) -> dict[str, Tensor]:
        """The embedding of each task; the network is all tasks'.

        Raises:
            UserError: As `for_own_tasks`.
        """
        return source.tensors | {_TASKS: for_own_tasks(source.tensors[_TASKS], source, self.config)}
