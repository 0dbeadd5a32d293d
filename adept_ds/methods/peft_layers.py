"""Methods whose layers HF PEFT makes and puts into the backbone: LoRA, (IA)3 and VeRA.

`method.target_modules` says which layers they are. If it is not given, they are those of the paper's figures in a
backbone of one of its families (see `adept_ds.methods.layers`), in any other those that PEFT chooses for its model
type, and where it chooses none those of other families.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import peft
import torch
from peft.tuners import VeraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING,
)
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from adept_ds.config.method import Ia3Config, LoraConfig, VeraConfig
from adept_ds.errors import UserError, did_you_mean
from adept_ds.methods.base import MethodDefaults
from adept_ds.methods.layers import (
    FAMILIES,
    OTHER_FAMILIES,
    described,
    embedding_table,
    family_of,
    linear_layers,
    missing_ends,
    seeded,
)

_ADAPTER = "default"
_REMEDIES = {
    "low_rank": "set method.target_modules",
    "keys_values": "set method.target_modules",
    "feed_forward_output": "set method.feed_forward to false",
}
"""What to do where the layers of a part of `Family` are not known."""


def published_layers(mapping: Mapping[str, Any], backbone: PreTrainedModel) -> list[str]:
    """Return PEFT's choice of layers for the backbone's model type, if it has made one."""
    ends = mapping.get(backbone.config.model_type, [])
    # One multimodal type has a pattern in place of names.
    return ends if isinstance(ends, list) else []


class PeftLayers(MethodDefaults):
    """Wraps layers of the backbone in those of PEFT, which call the layer and never read its weight: it may be sharded
    or quantised."""

    config: LoraConfig | Ia3Config | VeraConfig

    @abstractmethod
    def peft_config(self, backbone: PreTrainedModel) -> peft.PeftConfig:
        """The settings in PEFT's form.

        Raises:
            UserError: The settings name no layers, and those of the backbone are not known.
        """

    @override
    def inject(
        self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, generator: torch.Generator | None
    ) -> None:
        """Let PEFT wrap the layers.

        Raises:
            UserError: As `peft_config`. Or a name in the settings is that of no layer, or of one that PEFT cannot wrap.
        """
        missing = missing_ends(backbone, self.config.target_modules or ())
        if missing and generator is not None:  # without one an adapter is loaded, whose layers are settled
            names = [name.rpartition(".")[2] for name in linear_layers(backbone)]
            raise UserError(
                f"method.target_modules has {missing[0]!r}; {described(backbone)}{did_you_mean(missing[0], names)}"
            )
        settings = self.peft_config(backbone)
        try:
            with seeded(generator):
                self.put_into(backbone, settings, generator)
        except (ValueError, TypeError) as error:
            raise UserError(f"method.target_modules does not fit {backbone.config.name_or_path!r}: {error}") from error
        self._layers = [module for module in backbone.modules() if isinstance(module, BaseTunerLayer)]
        self._trained = {
            name.replace(f".{_ADAPTER}", ""): parameter
            for name, parameter in backbone.named_parameters()
            if parameter.requires_grad
        }
        for parameter in self._trained.values():
            parameter.data = parameter.data.float()

    def put_into(self, backbone: PreTrainedModel, settings: peft.PeftConfig, generator: torch.Generator | None) -> None:
        """Let PEFT wrap the layers that its settings name."""
        peft.inject_adapter_in_model(settings, backbone, _ADAPTER)

    def known_layers(self, backbone: PreTrainedModel, part: str, theirs: list[str]) -> list[str]:
        """Return the layers of this part of the backbone's family, or PEFT's choice where the backbone lacks one of
        them, or those of another family.

        Raises:
            UserError: It lacks one of PEFT's too, or PEFT has made no choice.
        """
        own, other = (getattr(family_of(backbone, families), part, ()) for families in (FAMILIES, OTHER_FAMILIES))
        for ends in (own, theirs, other):
            if ends and not missing_ends(backbone, ends):
                return list(ends)
        raise UserError(
            f"{described(backbone)}; which of them {self.config.name} is for is known neither here nor to HF PEFT: "
            f"{_REMEDIES[part]}"
        )

    def low_rank_layers(self, backbone: PreTrainedModel, published: Mapping[str, Any]) -> list[str]:
        """Return the layers that are set, or else those of `known_layers`; `published` is PEFT's choice by model."""
        return list(
            self.config.target_modules or self.known_layers(backbone, "low_rank", published_layers(published, backbone))
        )

    @override
    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return self._trained

    @contextmanager
    @override
    def disabled(self) -> Iterator[None]:
        for layer in self._layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.enable_adapters(True)


class Lora(PeftLayers):
    """LoRA: W x + alpha / r B A x; A [r, in] Kaiming-uniform, B [out, r] zero; made from a `LoraConfig`.

    Parameters: r (in + out) for each layer.
    """

    config: LoraConfig

    @override
    def peft_config(self, backbone: PreTrainedModel) -> peft.PeftConfig:
        config = self.config
        return peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=self.low_rank_layers(backbone, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING),
        )


class Ia3(PeftLayers):
    """(IA)3: s * (W x) for keys and values, W (s * x) for the feed-forward layers' last projection; s one at the start;
    made from an `Ia3Config`."""

    config: Ia3Config

    @override
    def peft_config(self, backbone: PreTrainedModel) -> peft.PeftConfig:
        config = self.config
        their_feed_forward = published_layers(TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING, backbone)
        theirs = published_layers(TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING, backbone)
        theirs = [end for end in theirs if end not in their_feed_forward]
        targets = config.target_modules or self.known_layers(backbone, "keys_values", theirs)
        feed_forward: list[str] = []
        if config.feed_forward:
            feed_forward = self.known_layers(backbone, "feed_forward_output", their_feed_forward)
        return peft.IA3Config(target_modules=[*targets, *feed_forward], feedforward_modules=feed_forward)


class Vera(PeftLayers):
    """VeRA: W x + diag(b) B diag(d) A x; b [out] zero, d [r] `d_initial`; A [r, in] and B [out, r] Kaiming-uniform,
    frozen and the same for all layers, which take of them what they need; made from a `VeraConfig`.

    Parameters: r + out for each layer. A and B are in the adapter file too, so that it does not depend on how a
    version of torch draws.
    """

    config: VeraConfig

    @override
    def put_into(self, backbone: PreTrainedModel, settings: peft.PeftConfig, generator: torch.Generator | None) -> None:
        """Wrap the layers, and draw A and B anew: PEFT has rounded them to the layers' precision."""
        # Layers refer to the two, which is all that PEFT's model around the backbone would hold.
        tuner = VeraModel(backbone, settings, _ADAPTER)
        device = embedding_table(backbone).weight.device
        for projections in (tuner.vera_A, tuner.vera_B):
            drawn = torch.empty(projections[_ADAPTER].shape)
            projections[_ADAPTER] = nn.init.kaiming_uniform_(drawn, generator=generator).to(device)
        for layer in backbone.modules():
            if isinstance(layer, BaseTunerLayer):
                # A and B stay in fp32 in training, too, where d and b are in the backbone's precision.
                layer._cast_input_dtype = _at_least_fp32

    @override
    def peft_config(self, backbone: PreTrainedModel) -> peft.PeftConfig:
        config = self.config
        return peft.VeraConfig(
            r=config.rank,
            d_initial=config.d_initial,
            vera_dropout=config.dropout,
            target_modules=self.low_rank_layers(backbone, TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING),
        )

    @override
    def constants(self) -> dict[str, Tensor]:
        # One pair of tensors, which every layer refers to.
        layer: Any = self._layers[0]
        return {name: getattr(layer, name)[_ADAPTER] for name in ("vera_A", "vera_B")}


def _at_least_fp32(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(torch.promote_types(dtype, torch.float32))
