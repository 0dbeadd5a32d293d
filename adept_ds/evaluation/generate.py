"""Completions for problems: batched decoding with the KV cache, over all ranks, the same whatever the batches are."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from adept_ds.config import run as settings
from adept_ds.contexts import attribute_set
from adept_ds.data.continuation import CONTEXT_TOKENS, ContinuationDecoder, end_tokens, until_end
from adept_ds.data.encode import Encoded, collate, encode_prompts, end_of_answers, task_number
from adept_ds.data.tasks import TaskExample
from adept_ds.distributed import World, gather_objects
from adept_ds.formats import Example, Problem, Sample, stop_at
from adept_ds.model.adapted_model import AdaptedModel

FENCES = ("```", "~~~")
FENCE_TOKENS = 4
"""A fence has three characters; a fourth token may end a line of tildes."""


class SeededSampling(LogitsProcessor):
    """Draws each row's next token from its own random stream and leaves it as the only possible one.

    With it greedy decoding samples: the token depends on the row's seed, step and scores, not on the rows beside it.
    (Scores themselves may differ in the last bits between batch shapes, which can turn a draw on the very edge.)
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Take scores [B, V] after temperature and truncation; return them with all but one token at -inf."""
        cumulative = scores.double().softmax(-1).cumsum(-1)
        draws = torch.stack([torch.rand(1, generator=generator, dtype=torch.float64) for generator in self._generators])
        drawn = torch.searchsorted(cumulative, draws.to(scores.device) * cumulative[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


class StopStrings(StoppingCriteria):
    """Ends a row once its generated text contains a stop string.

    Args:
        decode: Gives the end of each row; a token has at least one character, so as many tokens as the longest
            stop string has characters are enough, and a few more for characters of several tokens.
        stop: The strings.
        start: Column of the first generated token, the soft prompt not counted.
    """

    def __init__(self, decode: ContinuationDecoder, stop: Sequence[str], start: int) -> None:
        self._decode = decode
        self._stop = stop
        self._start = start
        self._tail = max(map(len, stop)) + 4

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Return whether each row is done [B]."""
        tails = _texts_from(self._decode, input_ids, max(self._start, input_ids.shape[1] - self._tail))
        return torch.tensor([any(stop in tail for stop in self._stop) for tail in tails], device=input_ids.device)


class StopWhenComplete(StoppingCriteria):
    """Ends a row once its answer is complete.

    Args:
        decode: Gives the rows' texts.
        is_complete: For each row, whether its text is a complete answer; None if that is not asked. It is asked only
            when a fence has been written, which alone can close a program.
        start: Column of the first generated token, the soft prompt not counted.
    """

    def __init__(
        self, decode: ContinuationDecoder, is_complete: Sequence[Callable[[str], bool] | None], start: int
    ) -> None:
        self._decode = decode
        self._is_complete = is_complete
        self._start = start

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Return whether each row is done [B]."""
        tails = _texts_from(self._decode, input_ids, max(self._start, input_ids.shape[1] - FENCE_TOKENS))
        done = [
            is_complete is not None
            and any(fence in tail for fence in FENCES)
            and is_complete(_texts_from(self._decode, row[None], self._start)[0])
            for tail, row, is_complete in zip(tails, input_ids, self._is_complete, strict=True)
        ]
        return torch.tensor(done, device=input_ids.device)


def _texts_from(decode: ContinuationDecoder, ids: Tensor, start: int) -> list[str]:
    """Texts of the ids [B, S] from column `start` on, as they go on with those before it."""
    rows = ids[:, max(0, start - CONTEXT_TOKENS) :].tolist()
    before = min(start, CONTEXT_TOKENS)
    return [decode(row[:before], row[before:]) for row in rows]


class StepProgress(StoppingCriteria):
    """Ends nothing; moves a progress bar on by one for each token that a batch is decoded by."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Return that no row is done [B]."""
        self._bar.update()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def sample_seed(seed: int, task_id: str, index: int) -> int:
    """Seed of one sample's random stream."""
    digest = hashlib.sha256(f"{seed}/{task_id}/{index}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def generate_samples(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Example],
    config: settings.GenerationConfig,
    data: settings.DataConfig,
    world: World,
) -> list[Sample]:
    """Decode `num_samples` completions of each problem; every rank gets all of them, in the problems' order.

    Prompts of like length go together, and batches are dealt out to the ranks. All ranks make the same number of
    calls, as sharded weights need. Collective.
    """
    own_stop = problems[0].stop if isinstance(problems[0], Problem | TaskExample) else ()
    stop = own_stop if config.stop is None else config.stop
    by_id = {problem.task_id: problem for problem in problems}
    encoded = encode_prompts(problems, tokenizer, data, model.num_virtual_tokens, model.is_encoder_decoder)
    prompts = {problem.task_id: ids for problem, ids in zip(problems, encoded.ids, strict=True)}
    task_ids = {problem.task_id: task_number(problem, model.prompt_tasks) for problem in problems}
    jobs = [(problem.task_id, index) for problem in problems for index in range(config.num_samples)]
    by_length = sorted(jobs, key=lambda job: -len(prompts[job[0]]))
    batches = [by_length[start : start + config.batch_size] for start in range(0, len(jobs), config.batch_size)]
    rounds = -(-len(batches) // world.world_size)
    completions: dict[tuple[str, int], str] = {}
    was_training = model.training
    model.eval()
    steps = rounds * config.max_new_tokens
    bar = tqdm(total=steps, desc=f"generate ({len(jobs)} samples)", unit="step", disable=not world.is_main)
    for turn in range(rounds):
        number = turn * world.world_size + world.rank
        batch = batches[number] if number < len(batches) else batches[0][:1]
        rows = [Encoded(prompts[name], [], False, False, model.is_encoder_decoder, task_ids[name]) for name, _ in batch]
        examples = [by_id[name] for name, _ in batch]
        texts = _complete(model, tokenizer, rows, batch, examples, config, stop, world.device, bar)
        bar.update((turn + 1) * config.max_new_tokens - bar.n)  # Most batches end before the longest allowed.
        if number < len(batches):
            completions.update(zip(batch, texts, strict=True))
    bar.close()
    model.train(was_training)
    for of_rank in gather_objects(completions, world):
        completions.update(of_rank)
    return [Sample(task_id, completions[task_id, index]) for task_id, index in jobs]


def _complete(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Encoded],
    jobs: Sequence[tuple[str, int]],
    examples: Sequence[Example],
    config: settings.GenerationConfig,
    stop: Sequence[str],
    device: torch.device,
    bar: tqdm,
) -> list[str]:
    """Decode one batch."""
    # As in training, for encoders whose positions count padding, too.
    batch = collate(rows, tokenizer.pad_token_id, padding_side="right" if model.is_encoder_decoder else "left")
    del batch["labels"]
    decode = ContinuationDecoder(tokenizer)
    read = 1 if model.is_encoder_decoder else batch["input_ids"].shape[1]
    openings = [_begun_answer(example, row, tokenizer) for example, row in zip(examples, rows, strict=True)]
    criteria: list[StoppingCriteria] = [StepProgress(bar)]
    if stop:
        criteria.append(StopStrings(decode, stop, read))
    if config.stop is None:
        is_complete = [_completeness(example, opening) for example, opening in zip(examples, openings, strict=True)]
        if any(is_complete):
            criteria.append(StopWhenComplete(decode, is_complete, read))
    theirs = model.backbone.generation_config
    ends = [*end_tokens(tokenizer, theirs), *end_of_answers(examples, tokenizer)]
    greedy = GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=theirs.decoder_start_token_id,
    )
    # In the place of the backbone's own, from which `generate` would fill in whatever is not given (a repetition
    # penalty, say): a score follows from the settings alone.
    inputs: dict[str, Any] = {name: tensor.to(device) for name, tensor in batch.items()}
    with attribute_set(model.backbone, "generation_config", greedy):
        sequences = model.generate(
            **inputs,
            logits_processor=_sampling(config, jobs),
            stopping_criteria=StoppingCriteriaList(criteria),
        )
    written = [until_end(ids, ends, tokenizer.pad_token_id) for ids in sequences[:, read:].tolist()]
    before = [[] if model.is_encoder_decoder else row.input_ids for row in rows]
    texts = [decode(*pair) for pair in zip(before, written, strict=True)]
    return [opening + stop_at(text, stop) for opening, text in zip(openings, texts, strict=True)]


def _begun_answer(example: Example, row: Encoded, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template has written of an answer with a program: the mark that thinking begins, or nothing.

    It goes in front of the completion, in which thinking that never ends could not be told from the answer without it.
    """
    if not (isinstance(example, Problem) and example.chat):
        return ""
    found = re.search(r"<(?:think|thinking|thought|reasoning)>\s*\Z", tokenizer.batch_decode([row.input_ids[-16:]])[0])
    return found[0] if found else ""


def _completeness(example: Example, opening: str) -> Callable[[str], bool] | None:
    """Whether a text is a complete answer; None for an example whose answers have no such end."""
    if not isinstance(example, Problem) or example.continues_prompt:
        return None
    return lambda text: example.answer(opening + text).is_complete


def _sampling(config: settings.GenerationConfig, jobs: Sequence[tuple[str, int]]) -> LogitsProcessorList:
    """Processors that make greedy decoding sample as configured; none for greedy decoding itself."""
    if not config.do_sample:
        return LogitsProcessorList()
    processors: list[LogitsProcessor] = [TemperatureLogitsWarper(config.temperature)]
    if config.top_k:
        processors.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        processors.append(TopPLogitsWarper(config.top_p))
    seeds = [sample_seed(config.seed, task_id, index) for task_id, index in jobs]
    return LogitsProcessorList([*processors, SeededSampling(seeds)])
