"""Decoding with refill: a row that is done makes room for the next one while the others go on."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from adept_ds.backbone.sharding import is_sharded
from adept_ds.config.run import GenerationConfig
from adept_ds.distributed import World, sum_over_ranks
from adept_ds.evaluation.answers import Answers
from adept_ds.evaluation.sampling import Sampling, generator_of, next_tokens
from adept_ds.model.adapted_model import AdaptedModel
from adept_ds.model.slots import PromptReader, ReadPrompts, Slots

Job = tuple[int, int]
"""Number of an example, and of a sample of it."""
MOST_PLACES = 128
"""More rows at a time than that are no faster on a CPU, and few evaluations have them."""
READ_TOKENS = 4096
"""Tokens of prompts that are read in one call."""
_MEMORY_SHARE = 0.5
_FEWER = 0.8
"""Places are given up when so few of them are taken and nothing waits: that copies what stays."""


class Progress:
    """The progress bar of a rank's samples, with the tokens beside it."""

    def __init__(self, samples: int, world: World) -> None:
        whose = "" if world.world_size == 1 else f", 1 of {world.world_size} ranks"
        self._bar = tqdm(total=samples, desc=f"generate{whose}", unit="sample", disable=not world.is_main)
        self._tokens = 0

    def update(self, samples: int, tokens: int) -> None:
        """Count samples that are done and tokens that were generated."""
        self._tokens += tokens
        seconds = self._bar.format_dict["elapsed"]
        rate = f", {self._tokens / seconds:.0f}/s" if seconds else ""
        self._bar.set_postfix_str(f"{self._tokens} tokens{rate}", refresh=False)
        self._bar.update(samples)
        if not samples:
            self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


@dataclass
class _Row:
    """A sample that is being written."""

    job: Job
    ids: list[int]
    """The prompt, and what has been generated."""
    generator: torch.Generator
    is_done: Callable[[Sequence[int]], bool]


class Refill:
    """Decodes this rank's jobs, the keys of `seeds`, in their order; those of one example must follow one another."""

    def __init__(
        self,
        model: AdaptedModel,
        answers: Answers,
        task_ids: Sequence[int | None],
        seeds: Mapping[Job, int],
        config: GenerationConfig,
        world: World,
        adapter: str | None,
        progress: Progress,
    ) -> None:
        self._model, self._answers, self._seeds = model, answers, seeds
        self._config, self._world, self._progress = config, world, progress
        self._sampling, self._ends = Sampling.of(config), set(answers.ends)
        self._is_sharded = any(map(is_sharded, model.backbone.parameters()))
        self._reader = PromptReader(model, answers.prompts, task_ids, adapter, world.device)
        self._unread = deque(dict.fromkeys(number for number, _ in seeds))
        self._waiting = deque(seeds)
        self._shelf: dict[int, int] = {}
        """Row in `_read` of each example that has been read."""
        self._read: ReadPrompts | None = None
        self._slots: Slots | None = None
        self._rows: dict[int, _Row] = {}
        """By their places."""
        self._texts: dict[Job, str] = {}

    def run(self) -> dict[Job, str]:
        """Return the texts of all jobs.

        Where the weights are sharded, every rank calls the backbone as often as the others. Collective.
        """
        while self._is_any_busy():
            self._fill()
            if self._can_read():
                self._read_more()
            elif self._rows:
                self._step()
            elif self._is_sharded and not self._waiting:
                self._reader.read_nothing()
        return self._texts

    def _is_any_busy(self) -> bool:
        """Whether this rank has something to do, or one that it has to keep step with."""
        is_busy = bool(self._waiting or self._rows)
        return sum_over_ranks([float(is_busy)], self._world)[0] > 0 if self._is_sharded else is_busy

    def _can_read(self) -> bool:
        """Whether the next job is of an example that has not been read, and there would be a place for it."""
        if not self._waiting or self._waiting[0][0] in self._shelf:
            return False
        return self._slots is None or bool(self._slots.free)

    def _read_more(self) -> None:
        prompts, numbers, widest = self._answers.prompts, [self._unread.popleft()], 0
        while self._unread:
            widest = max(widest, len(prompts[numbers[-1]]), len(prompts[self._unread[0]]))
            if widest * (len(numbers) + 1) > READ_TOKENS:
                break
            numbers.append(self._unread.popleft())
        self._read = self._reader.read(numbers)
        self._shelf = {number: row for row, number in enumerate(numbers)}
        if self._slots is None:
            hidden, length = self._read.hidden, self._model.num_virtual_tokens
            longest = hidden + length + max(map(len, prompts))
            places = self._places(self._read, longest)
            self._slots = Slots(self._model, self._read, places, longest, self._config.max_new_tokens)

    def _places(self, read: ReadPrompts, longest: int) -> int:
        """How many rows are decoded at a time: as set, or as many as half of the free memory takes.

        A power of two then: that much memory is free again in the next run, which so comes to the same roundings.
        """
        most = self._config.batch_size
        if most is None:
            per_token = sum(states[0, :, 0].nbytes for both in read.layers for states in both)
            per_row = per_token * (longest + self._config.max_new_tokens) + 4 * read.scores[0].nbytes
            rows = max(1, int(_MEMORY_SHARE * _free_memory(self._world) / per_row))
            most = min(MOST_PLACES, 1 << (rows.bit_length() - 1))
        return min(most, len(self._seeds))

    def _fill(self) -> None:
        """Put rows that have been read into free places, and choose their first tokens."""
        while self._slots and self._read and self._waiting and self._waiting[0][0] in self._shelf:
            places: list[int] = []
            rows: list[int] = []
            for place in self._slots.free:
                if not self._waiting or self._waiting[0][0] not in self._shelf:
                    break
                job = self._waiting.popleft()
                prompt = self._answers.prompts[job[0]]
                is_done = self._answers.criterion(job[0])
                self._rows[place] = _Row(job, list(prompt), generator_of(self._seeds[job]), is_done)
                places.append(place)
                rows.append(self._shelf[job[0]])
            if not places:
                return
            self._slots.put(places, self._read, rows)
            self._append(places, self._read.scores[rows])

    def _step(self) -> None:
        slots = self._slots
        assert slots is not None
        if not self._waiting and len(self._rows) <= _FEWER * len(slots):
            kept = sorted(self._rows)
            slots.keep(kept)
            self._rows = {place: self._rows[old] for place, old in enumerate(kept)}
        scores = slots.step([self._rows[place].ids[-1] if place in self._rows else 0 for place in range(len(slots))])
        places = sorted(self._rows)
        self._append(places, scores if len(places) == len(slots) else scores[places])

    def _append(self, places: Sequence[int], scores: Tensor) -> None:
        """Choose the next token of the rows in these places, and take out those that are done."""
        assert self._slots is not None
        rows = [self._rows[place] for place in places]
        tokens = next_tokens(scores, self._sampling, [row.generator for row in rows]).tolist()
        done = 0
        for place, row, token in zip(places, rows, tokens, strict=True):
            row.ids.append(token)
            number = row.job[0]
            start = len(self._answers.prompts[number])
            if token in self._ends or len(row.ids) - start == self._config.max_new_tokens or row.is_done(row.ids):
                self._texts[row.job] = self._answers.text(number, row.ids[start:])
                del self._rows[place]
                self._slots.remove(place)
                done += 1
        self._progress.update(done, len(tokens))


def _free_memory(world: World) -> int:
    """Bytes that this rank may take."""
    if world.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(world.device)
        return free + torch.cuda.memory_reserved(world.device) - torch.cuda.memory_allocated(world.device)
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", world.world_size))
