"""Ladder side tuning (LST; Sung et al. 2022, https://arxiv.org/abs/2206.06522): a narrow network beside the backbone.

With r = `reduction`, h_i the output of backbone layer i and s the side network's state, d / r wide,

    s = W_0 x + b_0                                          x: what the first layer reads
    s = Block_i(g_i s + (1 - g_i) (W_i h_i + b_i))           g_i = sigmoid(a_i / 0.1), a_i = 0 at the start
    s = dropout(norm(s))

for the layers i in `layers`, where Block_i is a layer of the backbone's kind with all widths divided by r. The decoder
of an encoder-decoder model has a side network too, whose blocks attend to the encoder's last s. What the LM head reads
is, with the published method for encoder-decoder models, and one of our own for decoder-only ones,

    encoder-decoder   W_up s + b_up                          the backbone's last state is not used
    decoder-only      h + W_up s + b_up                      W_up zero at the start: training starts at the backbone

No gradient goes through the backbone, so nothing of it is kept for the backward pass but the h_i, which the W_i need.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache, PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from adept_ds.backbone.sharding import full_shape
from adept_ds.config.method import LstConfig
from adept_ds.contexts import attribute_set
from adept_ds.errors import UserError
from adept_ds.methods.base import MethodDefaults
from adept_ds.methods.layers import embedding_table
from adept_ds.methods.narrow import block_list, can_be_pruned, last_norm, narrow_copy, prune, refusal

GATE_TEMPERATURE = 0.1
_INITIAL_STD = 0.01
_CACHES = ("past_key_values", "layer_past")
"""Names of a layer's argument with the cache."""
_POSITION_BIASES = ("position_bias", "encoder_decoder_position_bias")
"""T5's arguments that its first layer makes for the others; in the order in which layers return them."""


class Gates(nn.Module):
    """g s + (1 - g) x with g = sigmoid(a / 0.1), one a for each layer of the backbone; zero at the start.

    As published, layers without a block beside them have one too, which stays as it is.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layers))

    def forward(self, layer: int, state: Tensor, tapped: Tensor) -> Tensor:
        """[..., d / r] twice to [..., d / r]."""
        gate = torch.sigmoid(self.weight[layer].float() / GATE_TEMPERATURE).to(state.dtype)
        return gate * state + (1 - gate) * tapped


class SideStack(nn.Module):
    """The side network along one stack of the backbone's layers, which it follows through hooks on them.

    Its modules compute in the precision of their own weights: fp32, or what an engine holds them in. They are called in
    one order, once each in every pass, whatever the batch is.

    Args:
        stack: The encoder or decoder of the backbone.
        narrow: The same of its narrow copy, whose layers are taken.
        layers: The layers of the backbone that have one of these beside them.
        width: Features d of the backbone's states.
        side_width: Features d / r.
        generator: As `Method.inject`.
    """

    def __init__(
        self,
        stack: nn.Module,
        narrow: Any,
        layers: Sequence[int],
        width: int,
        side_width: int,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        blocks: Any = block_list(stack)
        self.layers, self.depth = tuple(layers), len(blocks)
        self.first = sampler(width, side_width, generator)
        self.down = nn.ModuleList(sampler(width, side_width, generator) for _ in layers)
        self.gates = Gates(self.depth)
        self.blocks: Any = block_list(narrow)
        self.norm: Any = last_norm(narrow)
        self.dropout = narrow.dropout if isinstance(getattr(narrow, "dropout", None), nn.Dropout) else nn.Identity()
        self.rotary = getattr(narrow, "rotary_emb", None)
        self._layer_types = narrow.config.layer_types if _takes(self.rotary, "layer_type") else None
        self._arguments = list(inspect.signature(type(blocks[0]).forward).parameters)[1:]
        self.encoder_state: Tensor | None = None
        self._state: Tensor | None = None
        self._positions: Tensor | None = None
        self._biases: dict[str, Tensor] = {}

    @property
    def _dtype(self) -> torch.dtype:
        return self.first.weight.dtype

    def start(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Begin a pass with what the backbone's first layer is called with."""
        call = self._named(args, kwargs)
        cache = next((call[name] for name in _CACHES if call.get(name) is not None), None)
        if cache is not None:
            self._extend(cache)
        self._biases = {}
        self._state = self.first(call["hidden_states"].to(self._dtype))

    def see_positions(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note what the backbone's rotary positions are made of."""
        self._positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]

    def step(self, number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Go on by one block, with what the backbone's layer beside it was called with and gave."""
        hidden = output if isinstance(output, Tensor) else output[0]
        state = self.gates(self.layers[number], self._state, self.down[number](hidden.to(self._dtype)))
        call = {name: self._own(name, value, number) for name, value in self._named(args, kwargs).items()}
        del call["hidden_states"]
        result = self.blocks[number](state, **call)
        self._state = result if isinstance(result, Tensor) else result[0]
        if _POSITION_BIASES[1] in self._arguments:
            # LongT5 puts the attention's weights behind each.
            self._biases = dict(zip(_POSITION_BIASES, (result[1], result[3 if len(result) > 3 else -1]), strict=True))

    def finish(self) -> Tensor:
        """Return the state [B, S, d / r] behind the last layer, and forget the pass."""
        state: Tensor = self.dropout(self.norm(self._state))
        self._state = self.encoder_state = self._positions = None
        self._biases = {}
        return state

    def _named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return dict(zip(self._arguments, args, strict=False)) | dict(kwargs)

    def _own(self, name: str, value: Any, number: int) -> Any:
        """What a block gets in the place of an argument of the backbone's layer."""
        if name == "encoder_hidden_states" and value is not None:
            return self.encoder_state
        if name in _POSITION_BIASES and _POSITION_BIASES[1] in self._arguments:
            return self._biases.get(name)
        if name == "position_embeddings" and value is not None and self.rotary is not None:
            layer_type = () if self._layer_types is None else (self._layer_types[number],)
            return self.rotary(self._state, self._positions, *layer_type)
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self._dtype) if is_float else value

    def _extend(self, cache: Cache) -> None:
        """Give the cache layers for the blocks, each of the kind of the one beside it."""
        parts = [cache]
        if isinstance(cache, EncoderDecoderCache):
            parts = [cache.self_attention_cache, cache.cross_attention_cache]
        for part in parts:
            layers: list[Any] = part.layers
            if len(layers) == self.depth:  # not one that grows by itself
                if layers[self.layers[0]].is_initialized:
                    raise UserError(
                        "past_key_values has been filled without the side network, which would lack what was read; "
                        "expected an empty cache, or one that this model has filled"
                    )
                layers.extend(copy.deepcopy(layers[layer]) for layer in self.layers)


def sampler(width_in: int, width_out: int, generator: torch.Generator | None) -> nn.Linear:
    """Return a linear layer with weights from N(0, 0.01^2) and a bias of zero, as published."""
    layer = nn.utils.skip_init(nn.Linear, width_in, width_out, device=torch.get_default_device())
    nn.init.normal_(layer.weight, std=_INITIAL_STD, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def _takes(module: nn.Module | None, argument: str) -> bool:
    return module is not None and argument in inspect.signature(type(module).forward).parameters


class LadderSideTuning(MethodDefaults):
    """Trains a narrow network beside the backbone; made from an `LstConfig`.

    Parameters of T5-base with the published layers: 3,878,712.
    """

    config: LstConfig
    enabled = True

    @override
    def inject(
        self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator | None
    ) -> None:
        """Put the side network on the backbone, and hooks on the backbone's layers.

        Raises:
            UserError: The backbone has no narrow form, or not with these settings.
        """
        config, name = self.config, backbone.config.name_or_path
        reason = refusal(backbone)
        if reason:
            raise UserError(
                f"method.name is 'lst', whose side network is a narrow copy of the backbone's layers; {name!r} (model "
                f"type {backbone.config.model_type!r}) has none here: {reason}. Expected a decoder-only model with "
                "plain layers, T5 or one built like it, or another method"
            )
        self._is_encoder_decoder: bool = backbone.config.is_encoder_decoder
        if config.init == "magnitude" and not can_be_pruned(backbone):
            raise UserError(
                f"method.init is 'magnitude', which cuts layers of T5, Llama and those built like them; of {name!r} "
                f"(model type {backbone.config.model_type!r}) it is not known which features may go; expected 'random'"
            )
        stacks = {"decoder": backbone.get_decoder()}
        if self._is_encoder_decoder:
            stacks = {"encoder": backbone.get_encoder(), **stacks}
        depth = min(len(block_list(stack)) for stack in stacks.values())  # type: ignore[arg-type]
        layers = tuple(range(depth)) if config.layers is None else config.layers
        if layers[-1] >= depth:
            raise UserError(
                f"method.layers has {layers[-1]}; the layers of {name!r} are 0 to {depth - 1}"
                + (" of encoder and decoder each" if self._is_encoder_decoder else "")
            )
        narrow = narrow_copy(backbone, config.reduction, layers, generator)
        width, side_width = backbone.config.hidden_size, narrow.config.hidden_size
        narrow_stacks = {"encoder": narrow.get_encoder() if self._is_encoder_decoder else None}
        narrow_stacks["decoder"] = narrow.get_decoder()
        self.side = nn.ModuleDict(
            {
                key: SideStack(stack, narrow_stacks[key], layers, width, side_width, generator)
                for key, stack in stacks.items()
            }
        )
        head = backbone.get_output_embeddings()
        up = self.side["up"] = sampler(side_width, full_shape(head.weight)[1], generator)
        if not self._is_encoder_decoder:
            nn.init.zeros_(up.weight)
        self.side.to(embedding_table(backbone).weight.device)
        if config.init == "magnitude" and generator is not None:
            prune(backbone, narrow, config.reduction, layers)
        backbone.side_network = self.side
        for key, stack in stacks.items():
            self._follow(stack, self.side[key], is_encoder=key == "encoder")

    def _follow(self, stack: Any, side: Any, is_encoder: bool) -> None:
        """Register the hooks by which a side network goes along a stack of the backbone."""
        was_enabled: list[bool] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not self.enabled:
                return None
            if self._is_encoder_decoder and not is_encoder:
                kwargs = dict(kwargs)
                both, width = kwargs["encoder_hidden_states"], stack.config.hidden_size
                kwargs["encoder_hidden_states"] = both[..., :width].detach().to(self._encoder_dtype)
                side.encoder_state = both[..., width:].to(side.first.weight.dtype)
            # Layers that are recomputed, or that T5 hands a bias with a gradient, would record a graph for nothing.
            was_enabled.append(torch.is_grad_enabled())
            torch.set_grad_enabled(False)
            return args, kwargs

        def start(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.enabled:
                with torch.set_grad_enabled(was_enabled[-1]):
                    side.start(args, kwargs)

        def step_of(number: int) -> Any:
            def step(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                if self.enabled:
                    with torch.set_grad_enabled(was_enabled[-1]):
                        side.step(number, args, kwargs, output)

            return step

        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if was_enabled:
                torch.set_grad_enabled(was_enabled.pop())
            if not self.enabled or output is None:  # None after an error
                return
            state, hidden = side.finish(), output.last_hidden_state
            if is_encoder:
                # Beams and whatever else repeats the encoder's rows then repeat the side network's.
                self._encoder_dtype = hidden.dtype
                output.last_hidden_state = torch.cat([hidden, state], -1)
                return
            states = self.side["up"](state)
            output.last_hidden_state = (states if self._is_encoder_decoder else hidden + states).to(hidden.dtype)

        def positions(rotary: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.enabled:
                side.see_positions(args, kwargs)

        blocks: Any = block_list(stack)
        stack.register_forward_pre_hook(enter, with_kwargs=True)
        blocks[0].register_forward_pre_hook(start, with_kwargs=True)
        for number, layer in enumerate(side.layers):
            blocks[layer].register_forward_hook(step_of(number), with_kwargs=True)
        stack.register_forward_hook(leave, with_kwargs=True, always_call=True)
        if side.rotary is not None:
            stack.rotary_emb.register_forward_pre_hook(positions, with_kwargs=True)

    @override
    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {f"side_network.{name}": parameter for name, parameter in self.side.named_parameters()}

    @override
    def learning_rate_group(self, name: str) -> str:
        return "side"

    @override
    def disabled(self) -> AbstractContextManager[None]:
        return attribute_set(self, "enabled", False)
