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
        tails = _texts_from(self._decode, input_ids.tolist(), max(self._start, input_ids.shape[1] - self._tail))
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
        return torch.tensor(self.are_done(input_ids.tolist()), device=input_ids.device)

    def are_done(self, rows: Sequence[Sequence[int]]) -> list[bool]:
        """As the call, of rows of ids of one length."""
        tails = _texts_from(self._decode, rows, max(self._start, len(rows[0]) - FENCE_TOKENS))
        return [
            is_complete is not None
            and any(fence in tail for fence in FENCES)
            and is_complete(_texts_from(self._decode, [row], self._start)[0])
            for tail, row, is_complete in zip(tails, rows, self._is_complete, strict=True)
        ]


def _texts_from(decode: ContinuationDecoder, rows: Sequence[Sequence[int]], start: int) -> list[str]:
    """Texts of the rows of ids from column `start` on, as they go on with those before it."""
    first = max(0, start - CONTEXT_TOKENS)
    return [decode(row[first:start], row[start:]) for row in rows]


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


class Answers:
    """What is read for some examples, and how what is generated for them becomes answers, whatever generates it.

    Args:
        tokenizer: The backbone's.
        examples: All that are decoded together.
        config: Decoding.
        data: How prompts are made.
        num_virtual_tokens: Length of the soft prompt, which the limits on prompts leave room for.
        generation: The backbone's own settings, of which the tokens that end a text are taken.
        encoder_decoder: Whether answers stand by themselves, and not behind their prompts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        config: settings.GenerationConfig,
        data: settings.DataConfig,
        num_virtual_tokens: int,
        generation: GenerationConfig,
        encoder_decoder: bool = False,
    ) -> None:
        own_stop = examples[0].stop if isinstance(examples[0], Problem | TaskExample) else ()
        self.stop: Sequence[str] = own_stop if config.stop is None else config.stop
        """Strings that an answer ends before."""
        self.ends = [*end_tokens(tokenizer, generation), *end_of_answers(examples, tokenizer)]
        """Tokens that end one."""
        self.prompts = encode_prompts(examples, tokenizer, data, num_virtual_tokens, encoder_decoder).ids
        """Token ids of each example's prompt."""
        self.decode = ContinuationDecoder(tokenizer)
        self._examples = examples
        self._openings = [_begun_answer(*pair, tokenizer) for pair in zip(examples, self.prompts, strict=True)]
        self._ends_when_complete = config.stop is None
        self._pad_token_id = tokenizer.pad_token_id
        self._encoder_decoder = encoder_decoder

    def is_complete(self, number: int) -> Callable[[str], bool] | None:
        """What says whether a text is the complete answer to an example, behind which nothing is wanted; None if
        answers have no such end."""
        example = self._examples[number]
        if not self._ends_when_complete or not isinstance(example, Problem) or example.continues_prompt:
            return None
        return lambda text: example.answer(self._openings[number] + text).is_complete

    def text(self, number: int, ids: Sequence[int]) -> str:
        """The answer to an example, of ids that were generated until it was there."""
        return self._openings[number] + stop_at(self._whole(number, ids), self.stop)

    def cut_text(self, number: int, ids: Sequence[int]) -> tuple[str, bool]:
        """As `text`, of ids that go on behind the complete answer; and whether there was a stop string."""
        is_complete, prompt = self.is_complete(number), self.prompts[number]
        if is_complete is not None:
            criterion = StopWhenComplete(self.decode, [is_complete], len(prompt))
            row = [*prompt, *until_end(ids, self.ends, self._pad_token_id)]
            lengths = range(1, len(row) - len(prompt) + 1)
            complete = (length for length in lengths if criterion.are_done([row[: len(prompt) + length]])[0])
            ids = ids[: next(complete, len(ids))]
        whole = self._whole(number, ids)
        text = stop_at(whole, self.stop)
        return self._openings[number] + text, len(text) < len(whole)

    def _whole(self, number: int, ids: Sequence[int]) -> str:
        before = [] if self._encoder_decoder else self.prompts[number]
        return self.decode(before, until_end(ids, self.ends, self._pad_token_id))


def generate_samples(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Example],
    config: settings.GenerationConfig,
    data: settings.DataConfig,
    world: World,
    adapter: str | None = None,
) -> list[Sample]:
    """Decode `num_samples` completions of each problem; every rank gets all of them, in the problems' order.

    Prompts of like length go together, and batches are dealt out to the ranks. All ranks make the same number of
    calls, as sharded weights need. `adapter`: of several that the model has, the one that decodes. Collective.
    """
    theirs, length = model.backbone.generation_config, model.prompt_length(adapter)
    answers = Answers(tokenizer, problems, config, data, length, theirs, model.is_encoder_decoder)
    task_ids = [task_number(problem, model.prompt_tasks) for problem in problems]
    jobs = [(number, index) for number in range(len(problems)) for index in range(config.num_samples)]
    by_length = sorted(jobs, key=lambda job: -len(answers.prompts[job[0]]))
    batches = [by_length[start : start + config.batch_size] for start in range(0, len(jobs), config.batch_size)]
    rounds = -(-len(batches) // world.world_size)
    completions: dict[tuple[int, int], str] = {}
    was_training = model.training
    model.eval()
    steps = rounds * config.max_new_tokens
    bar = tqdm(total=steps, desc=f"generate ({len(jobs)} samples)", unit="step", disable=not world.is_main)
    for turn in range(rounds):
        place = turn * world.world_size + world.rank
        batch = batches[place] if place < len(batches) else batches[0][:1]
        seeds = [sample_seed(config.seed, problems[number].task_id, index) for number, index in batch]
        numbers = [number for number, _ in batch]
        rows = [
            Encoded(answers.prompts[number], [], False, False, model.is_encoder_decoder, task_ids[number])
            for number in numbers
        ]
        texts = _complete(model, tokenizer, answers, numbers, rows, config, seeds, world.device, bar, adapter)
        bar.update((turn + 1) * config.max_new_tokens - bar.n)  # Most batches end before the longest allowed.
        if place < len(batches):
            completions.update(zip(batch, texts, strict=True))
    bar.close()
    model.train(was_training)
    for of_rank in gather_objects(completions, world):
        completions.update(of_rank)
    return [Sample(problems[number].task_id, completions[number, index]) for number, index in jobs]


def _complete(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    answers: Answers,
    numbers: Sequence[int],
    rows: list[Encoded],
    config: settings.GenerationConfig,
    seeds: Sequence[int],
    device: torch.device,
    bar: tqdm,
    adapter: str | None,
) -> list[str]:
    """Decode one batch: the examples of these numbers."""
    # As in training, for encoders whose positions count padding, too.
    batch = collate(rows, tokenizer.pad_token_id, padding_side="right" if model.is_encoder_decoder else "left")
    del batch["labels"]
    read = 1 if model.is_encoder_decoder else batch["input_ids"].shape[1]
    criteria: list[StoppingCriteria] = [StepProgress(bar)]
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
    # In the place of the backbone's own, from which `generate` would fill in whatever is not given (a repetition
    # penalty, say): a score follows from the settings alone.
    with attribute_set(model.backbone, "generation_config", greedy):
        sequences = model.generate(
            **inputs,
            logits_processor=_sampling(config, seeds),
            stopping_criteria=StoppingCriteriaList(criteria),
        )
    written = sequences[:, read:].tolist()
    return [answers.text(number, ids) for number, ids in zip(numbers, written, strict=True)]


def _begun_answer(example: Example, prompt: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template has written of an answer with a program: the mark that thinking begins, or nothing.

    It goes in front of the completion, in which thinking that never ends could not be told from the answer without it.
    """
    if not (isinstance(example, Problem) and example.chat):
        return ""
    found = re.search(r"<(?:think|thinking|thought|reasoning)>\s*\Z", tokenizer.batch_decode([list(prompt[-16:])])[0])
    return found[0] if found else ""


def _sampling(config: settings.GenerationConfig, seeds: Sequence[int]) -> LogitsProcessorList:
    """Processors that make greedy decoding sample as configured; none for greedy decoding itself."""
    if not config.do_sample:
        return LogitsProcessorList()
    processors: list[LogitsProcessor] = [TemperatureLogitsWarper(config.temperature)]
    if config.top_k:
        processors.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        processors.append(TopPLogitsWarper(config.top_p))
    return LogitsProcessorList([*processors, SeededSampling(seeds)])
