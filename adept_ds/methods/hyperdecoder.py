"""HyperDecoder (Ivison and Peters 2022, https://arxiv.org/abs/2203.08304): adapters beside the feed-forward parts of an
encoder-decoder model; those of the decoder are made for each input.

    h' = h + FF(n) + W_up ReLU(W_down n + b_down) + b_up       n = norm(h)   W_down [r, d]   W_up [d, r]

In the encoder the adapters' weights are trained themselves. In the decoder they are linear functions, the same for all
layers, of

    x_j = ReLU(W [c; l_j] + b)      c: mean of the encoder's output over a row's tokens      l_j: embedding of layer j

They are made when the decoder is first called for a batch, and are what the whole of its generation reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from adept_ds.config.method import HyperDecoderConfig
from adept_ds.errors import UserError
from adept_ds.methods.base import BatchValue
from adept_ds.methods.bottleneck import BottleneckWeights
from adept_ds.methods.hyper_network import HyperNetworkMethod, fp32_linear
from adept_ds.methods.layers import embedding_table
from adept_ds.methods.narrow import block_list
from adept_ds.methods.wrapped import WrappedLayer

ENCODER_GAIN = 1e-4
"""Of the Xavier draws that the encoder's adapters start at, as published."""
GENERATED_SCALE = 1e-3
"""Factor of the bounds of the draws that the linear functions start at, as published."""


@dataclass
class DecoderAdapters:
    """What a batch's rows are decoded with."""

    rows: int
    """Number B of the batch's rows, of which beams are copies."""
    of_layers: tuple[BottleneckWeights, ...] | None = None
    """Each layer's weights of the rows, [B, ...]; None until the decoder is called."""


class DecoderGenerator(nn.Module):
    """What makes the adapters of all L decoder layers of a row.

    Parameters, with h = `hidden_size` and k = `layer_embedding_size`: k L + (d + k + 1) h + (h + 1) (2 d r + d + r),
    and 2 d (d + 1) of the MLP if there is one. Linear layers that say nothing else start as torch draws them.
    """

    def __init__(self, layers: int, width: int, config: HyperDecoderConfig, generator: torch.Generator | None) -> None:
        super().__init__()
        hidden, bottleneck, size = config.hidden_size, config.bottleneck, config.layer_embedding_size

        def usual(width_in: int, width_out: int) -> nn.Linear:
            bound = width_in**-0.5
            draw = partial(nn.init.uniform_, a=-bound, b=bound, generator=generator)
            return fp32_linear(width_in, width_out, draw, draw)

        def head(width_out: int, inputs: int) -> nn.Linear:
            """One that makes weights of a layer with so many inputs."""
            bound = GENERATED_SCALE * math.sqrt(3 / (hidden * inputs))
            return fp32_linear(hidden, width_out, partial(nn.init.uniform_, a=-bound, b=bound, generator=generator))

        self.process: nn.Module = nn.Identity()
        if config.process_encoder:
            self.process = nn.Sequential(usual(width, width), nn.ReLU(), usual(width, width))
        self.layers = nn.Parameter(torch.empty(layers, size).normal_(generator=generator))
        self.first = usual(width + size, hidden)
        self.w_down, self.b_down = head(bottleneck * width, width), head(bottleneck, 1)
        self.w_up, self.b_up = head(width * bottleneck, bottleneck), head(width, 1)
        self._shape = (bottleneck, width)

    def forward(self, encoded: Tensor) -> tuple[Tensor, ...]:
        """Return the weights that `BottleneckWeights` has, of rows whose encoder's output has the means [B, d]: each
        [B, L, ...]."""
        shape = (len(encoded), len(self.layers))
        of_rows = self.process(encoded)[:, None].expand(*shape, -1)
        x = F.relu(self.first(torch.cat([of_rows, self.layers.float().expand(*shape, -1)], -1)))
        w_down, w_up = self.w_down(x).unflatten(-1, self._shape), self.w_up(x).unflatten(-1, self._shape[::-1])
        return w_down, self.b_down(x), w_up, self.b_up(x)


class TrainedAdapter(nn.Module):
    """W_up ReLU(W_down n + b_down) + b_up; 2 r d + r + d parameters."""

    def __init__(self, width: int, bottleneck: int, generator: torch.Generator | None) -> None:
        super().__init__()
        draw = partial(nn.init.xavier_uniform_, gain=ENCODER_GAIN, generator=generator)
        self.w_down = nn.Parameter(draw(torch.empty(bottleneck, width)))
        self.w_up = nn.Parameter(draw(torch.empty(width, bottleneck)))
        self.b_down, self.b_up = nn.Parameter(torch.zeros(bottleneck)), nn.Parameter(torch.zeros(width))

    def forward(self, n: Tensor) -> Tensor:
        """[..., d] to [..., d] in fp32."""
        values = (self.w_down, self.b_down, self.w_up, self.b_up)
        return BottleneckWeights(*(value.float() for value in values)).added(n.float(), F.relu)


class MadeAdapter(nn.Module):
    """W_up ReLU(W_down n + b_down) + b_up with the row's own weights."""

    def __init__(self, layer: int, batch: BatchValue[DecoderAdapters]) -> None:
        super().__init__()
        self.layer, self.batch = layer, batch

    def forward(self, n: Tensor) -> Tensor:
        """[..., d] to [..., d] in fp32."""
        made = self.batch.value
        assert made is not None
        assert made.of_layers is not None
        return made.of_layers[self.layer].added(n.float(), F.relu)


class ParallelAdapter(WrappedLayer):
    """T5's feed-forward part with its norm and residual sum, and an adapter that reads what comes out of the norm."""

    def __init__(self, layer: nn.Module, adapter: nn.Module) -> None:
        super().__init__(layer)
        self.adapter = adapter

    @override
    def tuned(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        output: Tensor = layer(x)
        return (output.float() + self.adapter(layer.layer_norm(x))).to(output.dtype)


def _feed_forward_parts(stack: nn.Module) -> list[nn.Module]:
    """Return the feed-forward part of each layer, with norm and residual sum; none if they are not built like T5's."""
    blocks: Any = block_list(stack) or ()
    parts = [block.layer[-1] for block in blocks if hasattr(block, "layer")]
    return parts if all(hasattr(part, "DenseReluDense") for part in parts) else []


class HyperDecoder(HyperNetworkMethod):
    """Adapters of the encoder, and a network that makes the decoder's; made from a `HyperDecoderConfig`.

    Parameters of T5-base: 14,078,008.
    """

    config: HyperDecoderConfig

    def __init__(self, config: HyperDecoderConfig) -> None:
        super().__init__(config)
        self.batch: BatchValue[DecoderAdapters] = BatchValue()

    @override
    def inject(
        self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator | None
    ) -> None:
        super().inject(backbone, tokenizer, generator)
        backbone.get_decoder().register_forward_pre_hook(self._make, with_kwargs=True)

    @override
    def wrap(self, backbone: PreTrainedModel, generator: torch.Generator | None) -> dict[str, WrappedLayer]:
        """Choose the last part of each layer.

        Raises:
            UserError: The backbone is not T5 or one built like it.
        """
        config, table = self.config, embedding_table(backbone)
        names = {id(module): name for name, module in backbone.named_modules()}
        of_encoder: list[nn.Module] = []
        if backbone.config.is_encoder_decoder:
            of_encoder, of_decoder = map(_feed_forward_parts, (backbone.get_encoder(), backbone.get_decoder()))
        if not of_encoder:
            raise UserError(
                "method.name is 'hyperdecoder', whose adapters stand beside the feed-forward parts of encoder and "
                f"decoder; {backbone.config.name_or_path!r} (model type {backbone.config.model_type!r}) has no such "
                "parts as T5's; expected T5 or a model built like it, or another method, such as 'hyperformer' or "
                "'adapter'"
            )
        width, device = table.embedding_dim, table.weight.device
        self.network = DecoderGenerator(len(of_decoder), width, config, generator).to(device)
        adapters = [TrainedAdapter(width, config.bottleneck, generator).to(device) for _ in of_encoder]
        made = [MadeAdapter(layer, self.batch) for layer in range(len(of_decoder))]
        both = zip([*of_encoder, *of_decoder], [*adapters, *made], strict=True)
        return {names[id(part)]: ParallelAdapter(part, adapter) for part, adapter in both}

    def _make(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make the weights of a batch whose rows the encoder has read."""
        value = self.batch.value
        if value is None or value.of_layers is not None:
            return
        # Beams are copies of a row.
        hidden: Tensor = kwargs["encoder_hidden_states"]
        step = len(hidden) // value.rows
        hidden, mask = hidden[::step].float(), kwargs.get("encoder_attention_mask")
        is_token = hidden.new_ones(hidden.shape[:2]) if mask is None else mask[::step].to(hidden.dtype)
        means = (hidden * is_token[..., None]).sum(1) / is_token.sum(1, keepdim=True).clamp(min=1)
        value.of_layers = BottleneckWeights.of_places(self.network(means))

    @override
    def for_batch(self, context: Tensor, task_ids: Tensor, example_ids: Tensor | None = None) -> DecoderAdapters:
        return DecoderAdapters(len(context))
