"""Hides soft-prompt ids from all that looks at ids in generation: logits processors, stopping criteria, the caller."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.logits_process import LogitsProcessorList

from adept_ds.contexts import attribute_set


def plain_ids(ids: Any, vocabulary_size: int) -> Any:
    """Take the prompt's out of integer ids [B, l + S] -> [B, S]. Every row has as many, so the rest is rectangular."""
    return ids[ids < vocabulary_size].view(ids.shape[0], -1)


@contextmanager
def prompt_hidden(backbone: Any, vocabulary_size: int, columns: int) -> Iterator[None]:
    """Within the block, `backbone.generate` shows its logits processors and stopping criteria ids without the prompt.

    They look up scores and strings by id, and an id above V is out of range. They also compare the number of columns
    with `max_length` and `min_length`, so those count no prompt tokens either.

    Args:
        backbone: The `transformers` model.
        vocabulary_size: V; ids from there on are the prompt's.
        columns: Prompt tokens among the ids that generation goes on from: none for encoder-decoder models.
    """
    prepare_length = backbone._prepare_generated_length
    make_processors, make_criteria = backbone._get_logits_processor, backbone._get_stopping_criteria

    class PlainProcessors(LogitsProcessorList):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return super().__call__(plain_ids(input_ids, vocabulary_size), scores, **kwargs)

    class PlainCriteria(StoppingCriteriaList):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return super().__call__(plain_ids(input_ids, vocabulary_size), scores, **kwargs)

    def lengthened(config: GenerationConfig, by: int) -> GenerationConfig:
        config = copy.copy(config)
        for name in ("max_length", "min_length"):
            if getattr(config, name):
                setattr(config, name, getattr(config, name) + by)
        return config

    def prepare_with_prompt(
        generation_config: GenerationConfig, has_default_max_length: bool, **kwargs: Any
    ) -> GenerationConfig:
        config = lengthened(generation_config, columns)
        if has_default_max_length:
            # It counts from the end of what is read, prompt included.
            config.max_length = generation_config.max_length
        return prepare_length(generation_config=config, has_default_max_length=has_default_max_length, **kwargs)

    def plain_processors(
        generation_config: GenerationConfig, input_ids_seq_length: int, encoder_input_ids: Tensor, **kwargs: Any
    ) -> LogitsProcessorList:
        processors = make_processors(
            generation_config=lengthened(generation_config, -columns),
            input_ids_seq_length=input_ids_seq_length - columns,
            encoder_input_ids=plain_ids(encoder_input_ids, vocabulary_size),
            **kwargs,
        )
        return PlainProcessors(processors)

    def plain_criteria(generation_config: GenerationConfig, **kwargs: Any) -> StoppingCriteriaList:
        return PlainCriteria(make_criteria(generation_config=lengthened(generation_config, -columns), **kwargs))

    with (
        attribute_set(backbone, "_prepare_generated_length", prepare_with_prompt),
        attribute_set(backbone, "_get_logits_processor", plain_processors),
        attribute_set(backbone, "_get_stopping_criteria", plain_criteria),
    ):
        yield
