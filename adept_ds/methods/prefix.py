"""Prefix tuning (Li and Liang 2021, https://arxiv.org/abs/2101.00190) with HF PEFT's prefix encoder.

Each decoder layer attends to l trained keys and values in front of those of its input. They are put into the layer's
cache while it is empty. The decoder finds l entries in it, in front of any padding, as if it had read l tokens before:
generation, beams and padding need no code of their own.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from typing_extensions import override

from adept_ds.config.method import PrefixTuningConfig
from adept_ds.contexts import attribute_set
from adept_ds.errors import UserError
from adept_ds.methods.base import BatchValue, MethodDefaults
from adept_ds.methods.layers import embedding_table, seeded

CACHE = "past_key_values"
"""Argument of decoders."""


class PrefixTuning(MethodDefaults):
    """Keys and values in front of each decoder layer's; made from a `PrefixTuningConfig`.

    Parameters: 2 l x layers x width of a layer's keys, without a projection.
    """

    config: PrefixTuningConfig
    enabled = True

    def __init__(self, config: PrefixTuningConfig) -> None:
        super().__init__(config)
        self.batch: BatchValue[Tensor] = BatchValue()
        """In packed rows, the number of each position's example [B, S]."""

    @override
    def inject(
        self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator | None
    ) -> None:
        architecture, length = backbone.config, self.config.prefix_length
        table = embedding_table(backbone)
        heads: int | None = getattr(architecture, "num_attention_heads", None)
        if heads is None:
            raise UserError(
                "method.name is 'prefix', which stands in front of the keys and values of attention layers; "
                f"{architecture.name_or_path!r} (model type {architecture.model_type!r}) has none"
            )
        if getattr(architecture, "kv_lora_rank", None):
            raise UserError(
                f"method.name is 'prefix'; {architecture.name_or_path!r} (model type {architecture.model_type!r}) has "
                "latent attention, whose keys are wider than its values"
            )
        width = getattr(architecture, "d_kv", None) or getattr(architecture, "head_dim", None)
        self._head_width: int = width or architecture.hidden_size // heads
        self._heads = _key_heads(architecture, heads)
        self._layers: int = getattr(architecture, "num_decoder_layers", None) or architecture.num_hidden_layers
        self.peft_config = peft.PrefixTuningConfig(
            num_virtual_tokens=length,
            token_dim=self._heads * self._head_width,
            num_layers=self._layers,
            num_attention_heads=self._heads,
            num_transformer_submodules=1,
            encoder_hidden_size=self.config.hidden_size or architecture.hidden_size,
            prefix_projection=self.config.projection,
        )
        with seeded(generator):
            self.encoder = peft.PrefixEncoder(self.peft_config).to(table.weight.device)
        backbone.prefix_encoder = self.encoder
        self._is_encoder_decoder = architecture.is_encoder_decoder
        self._dtype = table.weight.dtype
        decoder = backbone.get_decoder()
        if CACHE not in inspect.signature(type(decoder).forward).parameters:
            # Decoders swallow arguments that they do not know: there would be no prefix, and no error.
            raise UserError(
                f"method.name is 'prefix', which puts its vectors into the cache that a decoder takes as {CACHE}; "
                f"{type(decoder).__name__} of {backbone.config.name_or_path!r} does not; expected another method"
            )
        self._window: int | None = _sliding_window(decoder)
        decoder.register_forward_pre_hook(self._put_before, with_kwargs=True)
        decoder.register_forward_hook(self._take_back, with_kwargs=True)

    def _put_before(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Add the prefix to the decoder's cache, mask and positions."""
        if not self.enabled:
            return None
        ids = args[0] if args else kwargs["input_ids"]
        length, cache = self.config.prefix_length, kwargs.get(CACHE)
        kwargs = dict(kwargs)
        if cache is None or (self._window and cache.get_seq_length() == 0):
            # Not one that drops what the window has passed: it would count padding, and drop the prefix.
            cache = DynamicCache()
            if self._is_encoder_decoder:
                cache = EncoderDecoderCache(cache, DynamicCache())
            kwargs[CACHE] = cache
        if cache.get_seq_length() == 0:
            self._fill(cache, ids)
        mask = kwargs.get("attention_mask")
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + length
        if mask is not None:
            # Who has seen the cache, and lays out its columns, gives a mask over the prefix too.
            if mask.shape[1] < cache.get_seq_length() + ids.shape[1]:
                mask = torch.cat([mask.new_ones(mask.shape[0], length), mask], 1)
            kwargs["attention_mask"] = mask
            if self._window:
                # Padding has the position of the last token before it, so that it sees something.
                positions = mask.cumsum(1) - 1
                kwargs["attention_mask"] = self._by_position(decoder, positions, mask[:, None].bool(), ids.shape[1])
        elif (example_ids := self.batch.value) is not None:
            positions = F.pad(kwargs["position_ids"], (length, 0))
            positions[:, :length] = torch.arange(length, device=ids.device)
            # All examples of a row see the one prefix.
            is_own = F.pad(example_ids[:, :, None] == example_ids[:, None], (length, 0), value=True)
            kwargs["attention_mask"] = self._by_position(decoder, positions, is_own, ids.shape[1])
        return args, kwargs

    def _by_position(
        self, decoder: nn.Module, positions: Tensor, may_see: Tensor, columns: int
    ) -> Tensor | dict[str, Tensor]:
        """Return the masks by which the last so many columns attend to what lies before them, in the decoder's form.

        A sliding window counts columns, and left padding, which stands behind the prefix, would push it out: what a row
        reads would depend on the rows beside it. So it is told here what each token may see, by positions [B, l + S] in
        the row, or in the example where rows are packed. `may_see` [B, S or 1, l + S] leaves out padding, or others.
        """
        config: Any = decoder.config
        attention = config._attn_implementation
        if attention not in ("eager", "sdpa"):
            what = "packed rows" if self.batch.value is not None else "a backbone with a sliding window"
            raise UserError(
                f"method.name is 'prefix' on {what}, which works with attention eager and sdpa; "
                f"model.attn_implementation is {attention!r}"
            )
        distance = positions[:, -columns:, None] - positions[:, None]
        is_seen = (distance >= 0) & may_see
        lowest = torch.finfo(self._dtype).min

        def additive(seen: Tensor) -> Tensor:
            return torch.zeros_like(seen, dtype=self._dtype).masked_fill_(~seen, lowest)[:, None]

        within = additive(is_seen & (distance < self._window) if self._window else is_seen)
        if "causal_mask_mapping" not in inspect.unwrap(type(decoder).forward).__code__.co_varnames:
            return within
        return {"full_attention": additive(is_seen), "sliding_attention": within}

    def _take_back(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Give out no cache where none is wanted: `generate` would hand it to the next call, which reads all again."""
        if self.enabled and kwargs.get("use_cache") is False:
            output.past_key_values = None

    def _fill(self, cache: Cache, ids: Tensor) -> None:
        """Put the prefix into an empty cache of as many rows as `ids` [B, S] has."""
        prefix = self.encoder(torch.arange(self.config.prefix_length, device=ids.device)[None]).to(self._dtype)
        # [l, layers, 2, heads, width] -> layers x 2 x [B, heads, l, width]
        prefix = prefix.view(-1, self._layers, 2, self._heads, self._head_width).permute(1, 2, 3, 0, 4)
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        for layer, (keys, values) in enumerate(prefix):
            rows = ids.shape[0]
            own.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)

    @override
    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {f"prefix_encoder.{name}": parameter for name, parameter in self.encoder.named_parameters()}

    @override
    def learning_rate_group(self, name: str) -> str:
        return "soft_prompt"

    @override
    def for_batch(self, context: Tensor, task_ids: Tensor, example_ids: Tensor | None = None) -> Tensor | None:
        return example_ids

    @override
    def disabled(self) -> AbstractContextManager[None]:
        return attribute_set(self, "enabled", False)


def _sliding_window(decoder: nn.Module) -> int | None:
    """How far back the layers see that do not see everything; None if all do."""
    config: Any = decoder.config
    window: int | None = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    # Configs keep settings that their models do not know.
    is_used = "create_sliding_window_causal_mask" in inspect.unwrap(type(decoder).forward).__globals__
    return window if is_used and (types is None or "sliding_attention" in types) else None


def _key_heads(architecture: PreTrainedConfig, heads: int) -> int:
    """Number of heads that a layer's cached keys have, of an attention with so many heads."""
    # The first Falcons have one head for all queries; later ones, which say `multi_query` too, cache one for each.
    if getattr(architecture, "multi_query", False) and not getattr(architecture, "new_decoder_architecture", False):
        return 1
    return getattr(architecture, "num_key_value_heads", None) or heads
