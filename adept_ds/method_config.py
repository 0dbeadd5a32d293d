"""The settings of every tuning method: the section `method`, whose `name` says which of these classes it is.

A further method is a class here, named in `MethodConfig`, and its implementation in `adept_ds.methods`. Its fields are
its keys of a config file, their docstrings its help.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from adept_ds.config_base import Count, CountOrZero, Fraction, PositiveFloat, Section

DEFAULT_METHOD = "adept"
"""The method of a config that names none."""


class MethodSettings(Section):
    """Base of every method's settings. Those of a method with a soft prompt have a field `num_virtual_tokens`, all
    others are a `PromptlessSettings`."""

    works_quantized: ClassVar[bool] = True
    """Whether the backbone may be quantised, since none of the weights that are trained would be."""
    trains_backbone: ClassVar[bool] = False
    """Whether weights of the backbone's own are trained, so that what ZeRO does for frozen ones alone is not for it."""
    saves_model: ClassVar[bool] = False
    """Whether the result is a whole model in the hub's format (`adept_ds.model_io`) and not an adapter."""


class PromptlessSettings(MethodSettings):
    """Base for methods that put no tokens in front of the input."""

    @property
    def num_virtual_tokens(self) -> int:
        """Soft-prompt tokens in front of the input."""
        return 0


class AdeptConfig(MethodSettings):
    """ADePT (eq. 3 and 4 of the paper): soft prompt P [l, d] and token-shared network of bottleneck r."""

    name: Literal["adept"] = "adept"
    """The method."""
    num_virtual_tokens: CountOrZero = 7
    """Length l of the soft prompt, in tokens. 0 leaves the prompt out."""
    bottleneck: Count = 1
    """Width r of the token-shared network's hidden layer."""
    prompt_init: Literal["tokens", "text", "normal"] = "tokens"
    """Where P starts: embeddings of tokens sampled among the first 5,000 ids, of a text's tokens, or a normal draw."""
    prompt_init_text: str | None = None
    """The text for `prompt_init: text`, without special tokens, repeated or cut to l tokens."""
    prompt_init_std: PositiveFloat | None = None
    """Standard deviation for `prompt_init: normal`; that of the embedding table if not given."""
    down_init: Literal["published", "linear"] = "published"
    """Bounds of W_down's uniform draw: 1/sqrt(r) (the published code) or 1/sqrt(d) (the usual linear-layer rule)."""
    dropout: Fraction = 0.0
    """Dropout on the bottleneck's activations in training. The paper has none; the published code has 0.1."""

    @model_validator(mode="after")
    def _check_prompt_init(self) -> AdeptConfig:
        if (self.prompt_init == "text") != (self.prompt_init_text is not None):
            raise ValueError("prompt_init_text goes with prompt_init: text, and is needed there")
        if self.prompt_init_std is not None and self.prompt_init != "normal":
            raise ValueError("prompt_init_std goes with prompt_init: normal")
        return self


class FullConfig(PromptlessSettings):
    """Full fine-tuning: every weight of the backbone is trained, at the rate `train.learning_rate.backbone`."""

    works_quantized: ClassVar[bool] = False
    trains_backbone: ClassVar[bool] = True
    saves_model: ClassVar[bool] = True

    name: Literal["full"] = "full"
    """The method."""
    max_file_gb: PositiveFloat = 1.0
    """Largest weight file of the saved model, in GB; while saving, rank 0 holds as much in its host memory."""


def _named(section: Any) -> Any:
    return {"name": DEFAULT_METHOD, **section} if isinstance(section, dict) else section


MethodConfig = Annotated[AdeptConfig | FullConfig, Field(discriminator="name"), BeforeValidator(_named)]
"""Settings of any method, told apart by their `name`."""
