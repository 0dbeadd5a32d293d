"""Completions for problems: decoding with the KV cache, over all ranks, the same whatever is decoded beside a row."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from adept_ds.config import run as settings
from adept_ds.contexts import attribute_set
from adept_ds.data.encode import Encoded, collate, task_number
from adept_ds.distributed import World, gather_objects
from adept_ds.evaluation.answers import Answers, StopStrings, StopWhenComplete
from adept_ds.evaluation.refill import Job, Progress, Refill
from adept_ds.evaluation.sampling import Sampling, SeededSampling, sample_seed
from adept_ds.formats import Example, Sample
from adept_ds.model.adapted_model import AdaptedModel
from adept_ds.model.slots import refusal

STATIC_ROWS = 16
"""Rows of a batch that is decoded to its end, where the settings do not say."""


def generate_samples(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Example],
    config: settings.GenerationConfig,
    data: settings.DataConfig,
    world: World,
    adapter: str | None = None,
    task: int | None = None,
) -> list[Sample]:
    """Decode `num_samples` completions of each problem; every rank gets all of them, in the problems' order.

    Longest prompts come first, and problems are dealt out to the ranks. Where the backbone allows it, a row that is
    done makes room for the next one; else batches are decoded to their ends, which is told. `adapter`: of several that
    the model has, the one that decodes. `task`: number of the task whose parameters read the problems, where they do
    not say it themselves. Collective.
    """
    theirs, length = model.backbone.generation_config, model.prompt_length(adapter)
    answers = Answers(tokenizer, problems, config, data, length, theirs, model.is_encoder_decoder)
    task_ids = [task_number(problem, model.prompt_tasks) if task is None else task for problem in problems]
    by_length = sorted(range(len(problems)), key=lambda number: -len(answers.prompts[number]))
    jobs = [(number, index) for number in by_length for index in range(config.num_samples)]
    seeds = {(number, index): sample_seed(config.seed, problems[number].task_id, index) for number, index in jobs}
    reason = refusal(model) if all(answers.prompts) else "a prompt has no token"
    was_training = model.training
    model.eval()
    with model.method.unchanging():
        if reason is None:
            mine = set(by_length[world.rank :: world.world_size])
            own = {job: seed for job, seed in seeds.items() if job[0] in mine}
            progress = Progress(len(own), world)
            completions = Refill(model, answers, task_ids, own, config, world, adapter, progress).run()
        else:
            if world.is_main:
                _tell(type(model.backbone).__name__, reason)
            size = config.batch_size or STATIC_ROWS
            batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
            progress = Progress(sum(map(len, batches[world.rank :: world.world_size])), world)
            completions = _decode_batches(
                model, tokenizer, answers, task_ids, batches, seeds, config, world, adapter, progress
            )
    progress.close()
    model.train(was_training)
    for of_rank in gather_objects(completions, world):
        completions.update(of_rank)
    in_order = ((number, index) for number in range(len(problems)) for index in range(config.num_samples))
    return [Sample(problems[number].task_id, completions[number, index]) for number, index in in_order]


@cache
def _tell(backbone: str, reason: str) -> None:
    """Say once in a process what decoding there is."""
    print(f"{backbone} is decoded in batches that wait for their longest row: {reason}", file=sys.stderr)


class _CountTokens(StoppingCriteria):
    """Ends nothing; counts a token for each row of a batch."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Return that no row is done [B]."""
        self._progress.update(0, len(input_ids))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _decode_batches(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    answers: Answers,
    task_ids: Sequence[int | None],
    batches: Sequence[Sequence[Job]],
    seeds: dict[Job, int],
    config: settings.GenerationConfig,
    world: World,
    adapter: str | None,
    progress: Progress,
) -> dict[Job, str]:
    """Decode this rank's share of the batches. All ranks make the same number of calls, as sharded weights need."""
    completions: dict[Job, str] = {}
    for first in range(0, len(batches), world.world_size):
        place = first + world.rank
        batch = batches[place] if place < len(batches) else batches[0][:1]
        numbers = [number for number, _ in batch]
        rows = [
            Encoded(answers.prompts[number], [], False, False, model.is_encoder_decoder, task_ids[number])
            for number in numbers
        ]
        sampled = [seeds[job] for job in batch]
        texts = _complete(model, tokenizer, answers, numbers, rows, config, sampled, world.device, adapter, progress)
        if place < len(batches):
            completions.update(zip(batch, texts, strict=True))
            progress.update(len(batch), 0)
    return completions


def _complete(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    answers: Answers,
    numbers: Sequence[int],
    rows: list[Encoded],
    config: settings.GenerationConfig,
    seeds: Sequence[int],
    device: torch.device,
    adapter: str | None,
    progress: Progress,
) -> list[str]:
    """Decode one batch: the examples of these numbers."""
    # As in training, for encoders whose positions count padding, too.
    batch = collate(rows, tokenizer.pad_token_id, padding_side="right" if model.is_encoder_decoder else "left")
    del batch["labels"]
    read = 1 if model.is_encoder_decoder else batch["input_ids"].shape[1]
    criteria: list[StoppingCriteria] = [_CountTokens(progress)]
    if answers.stop:
        criteria.append(StopStrings(answers.decode, answers.stop, read))
    is_complete = [answers.is_complete(number) for number in numbers]
    if any(is_complete):
        criteria.append(StopWhenComplete(answers.decode, is_complete, read))
    greedy = GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        do_sample=False,
        eos_token_id=answers.ends or None,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=model.backbone.generation_config.decoder_start_token_id,
    )
    inputs: dict[str, Any] = {name: tensor.to(device) for name, tensor in batch.items()}
    if model.adapter_names:
        inputs["adapter_names"] = [adapter] * len(rows)
    sampling = Sampling.of(config)
    processors = LogitsProcessorList([SeededSampling(seeds, sampling)] if sampling else [])
    # In the place of the backbone's own, from which `generate` would fill in whatever is not given (a repetition
    # penalty, say): a score follows from the settings alone.
    with attribute_set(model.backbone, "generation_config", greedy):
        sequences = model.generate(
            **inputs, logits_processor=processors, stopping_criteria=StoppingCriteriaList(criteria)
        )
    written = sequences[:, read:].tolist()
    return [answers.text(number, ids) for number, ids in zip(numbers, written, strict=True)]
