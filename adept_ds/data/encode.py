"""From text to token ids, with every truncation counted, and from examples to padded tensors.

Soft-prompt ids are not added here; the limits leave room for them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from adept_ds.config.run import DataConfig
from adept_ds.data.chat import ChatTemplate, tokenise_learnt
from adept_ds.data.continuation import tokenise, tokenise_continuation
from adept_ds.data.own import OwnExamples
from adept_ds.data.tasks import TaskExample, TaskExamples, longest_lengths
from adept_ds.errors import UserError, did_you_mean
from adept_ds.formats import FORMATS, Conversation, Example
from adept_ds.model.loss import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pieces = list[tuple[list[int], bool]]
"""An example in its order: token ids, and whether they are learnt."""

CHUNK = 1_000
"""Examples tokenised in one call."""


@dataclass(frozen=True)
class Encoded:
    """One example as token ids.

    Causal: `input_ids` are prompt and target, `labels` the same with -100 on the prompt. Encoder-decoder: `input_ids`
    are the prompt, `labels` the target.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_truncated: bool
    target_truncated: bool
    encoder_decoder: bool
    task_id: int | None = None
    """Which of the tasks with parameters of their own it is of; None where all are trained alike."""


@dataclass(frozen=True)
class EncodedPrompts:
    """What completions are generated from."""

    ids: list[list[int]]
    """Token ids of each example's prompt."""
    truncated: int
    """How many of them were cut."""

    def note(self, cfg: DataConfig) -> str | None:
        """Say how many prompts were cut, and by which setting; nothing where none was."""
        if not self.truncated:
            return None
        key = "data.max_source_length" if FORMATS[cfg.format].has_tasks else "data.max_prompt_length"
        return f"truncated: {self.truncated} of {len(self.ids)} prompts are longer than {key} allows and were cut"


def encode_prompts(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    cfg: DataConfig,
    num_virtual_tokens: int,
    encoder_decoder: bool,
) -> EncodedPrompts:
    """Encode the prompts of examples, each as `encode_prompt`."""
    encoded = list(_encode_prompts(examples, tokenizer, cfg, num_virtual_tokens, encoder_decoder))
    return EncodedPrompts([ids for ids, _ in encoded], sum(is_cut for _, is_cut in encoded))


def encode_prompt(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    cfg: DataConfig,
    num_virtual_tokens: int,
    encoder_decoder: bool,
) -> tuple[list[int], bool]:
    """Return the ids that a completion is generated from, and whether they were truncated.

    At most `max_prompt_length - num_virtual_tokens` ids; a longer prompt is cut from the left, its BOS stays in front
    and, for an encoder-decoder model, its EOS at the end. An example with limits of its own has at most those, is cut
    from the right, and ends with a line break where the model is causal. BOS is added if the tokenizer does so, and
    never twice. Raises UserError for a chat example if the tokenizer has no chat template.
    """
    return next(_encode_prompts([example], tokenizer, cfg, num_virtual_tokens, encoder_decoder))


def longest_example(cfg: DataConfig, num_virtual_tokens: int, encoder_decoder: bool) -> tuple[int, int]:
    """Return how many positions the backbone reads and how many labels there are, at most: the longest example that the
    settings allow, soft prompt included. For encoder-decoder models the former are the encoder's."""
    if FORMATS[cfg.format].has_tasks:
        source, target = longest_lengths(cfg)
        return num_virtual_tokens + source + (0 if encoder_decoder else target), target
    target = cfg.max_length - cfg.max_prompt_length
    if encoder_decoder:
        return cfg.max_prompt_length, target
    own = FORMATS[cfg.format].rows
    return cfg.max_length, cfg.max_length - num_virtual_tokens if own and own.fields is None else target


def most_labels(row_size: int, num_virtual_tokens: int, longest_target: int) -> int:
    """Return how many labels the examples of a packed row have at most, if one has no more than `longest_target`."""
    before = max(1, num_virtual_tokens)  # the first position of an example is predicted by none
    count, rest = divmod(row_size, longest_target + before)
    return count * longest_target + max(0, rest - before)


def encode(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    cfg: DataConfig,
    num_virtual_tokens: int,
    encoder_decoder: bool,
) -> Encoded:
    """Return the ids and labels of an example: the prompt as `encode_prompt`, then target and EOS without a BOS.

    Causal: prompt and target have at most `max_length - num_virtual_tokens` ids; encoder-decoder: the target has at
    most `max_length - max_prompt_length`; an example with limits of its own has those. A longer target is cut from the
    right and then has no EOS, so that the model does not learn to stop at the cut.

    A conversation is learnt in all its assistant's turns by a causal model, and cut from the right too, perhaps to no
    label at all. For an encoder-decoder model its last turn is the target.

    Raises UserError if the target has no token, or for a chat if the tokenizer has no chat template.
    """
    return next(_encode_all([example], tokenizer, cfg, num_virtual_tokens, encoder_decoder))


def _encode_all(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    cfg: DataConfig,
    num_virtual_tokens: int,
    encoder_decoder: bool,
) -> Iterator[Encoded]:
    """Encode a handful of examples, as `encode`; one call of the tokenizer for many is far quicker than many."""
    is_chat = [_learns_several_turns(example, tokenizer, encoder_decoder) for example in examples]
    of_chats = _chat_pieces([one for one, chat in zip(examples, is_chat, strict=True) if chat], tokenizer)
    of_pairs = _pair_pieces(
        [one for one, chat in zip(examples, is_chat, strict=True) if not chat],
        tokenizer,
        cfg,
        num_virtual_tokens,
        encoder_decoder,
    )
    for example, chat in zip(examples, is_chat, strict=True):
        pieces, prompt_truncated = (next(of_chats), False) if chat else next(of_pairs)
        if encoder_decoder:
            (prompt, _), (target, _) = pieces
            limit = example.limits.target if example.limits else cfg.max_length - cfg.max_prompt_length
            yield Encoded(prompt, target[:limit], prompt_truncated, len(target[:limit]) < len(target), True)
            continue
        ids: list[int] = []
        labels: list[int] = []
        for piece, is_learnt in pieces:
            ids += piece
            labels += piece if is_learnt else [IGNORE_INDEX] * len(piece)
        limit = cfg.max_length - num_virtual_tokens
        if example.limits:
            limit = None if example.limits.target is None else len(pieces[0][0]) + example.limits.target
        yield Encoded(ids[:limit], labels[:limit], prompt_truncated, len(ids[:limit]) < len(ids), False)


def _learns_several_turns(example: Example, tokenizer: PreTrainedTokenizerBase, encoder_decoder: bool) -> bool:
    return isinstance(example, Conversation) and not encoder_decoder and _is_rendered(example, tokenizer)


def _is_rendered(example: Example, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template is put around an example; a chat may have a form for tokenizers without one."""
    has_other_form = isinstance(example, Conversation) and example.prompt != ""
    return bool(example.turns) and (tokenizer.chat_template is not None or not has_other_form)


def _chat_pieces(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Iterator[Pieces]:
    """Chats in pieces: the assistant's turns, which are learnt, and what stands between them."""
    if examples:
        template = _chat_template(tokenizer)
        learnt = [template.learnt(one.messages, one.task_id) for one in examples if isinstance(one, Conversation)]
        texts, spans = zip(*learnt, strict=True)
        yield from tokenise_learnt(tokenizer, texts, spans)


def _pair_pieces(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    cfg: DataConfig,
    num_virtual_tokens: int,
    encoder_decoder: bool,
) -> Iterator[tuple[Pieces, bool]]:
    """Prompt and target with EOS, and whether the prompt was truncated."""
    if not examples:
        return
    prompts = _encode_prompts(examples, tokenizer, cfg, num_virtual_tokens, encoder_decoder)
    # What an encoder-decoder model writes begins with nothing before it.
    tokenise_targets = tokenise if encoder_decoder else tokenise_continuation
    targets = tokenise_targets(tokenizer, [example.target for example in examples])
    eos = _eos(tokenizer)
    for example, (prompt, prompt_truncated), target in zip(examples, prompts, targets, strict=True):
        if not target:
            raise UserError(f"{example.task_id}: the target {example.target!r} has no token for this tokenizer")
        yield [(prompt, False), ([*target, eos], True)], prompt_truncated


def _encode_prompts(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    cfg: DataConfig,
    num_virtual_tokens: int,
    encoder_decoder: bool,
) -> Iterator[tuple[list[int], bool]]:
    is_rendered = [_is_rendered(example, tokenizer) for example in examples]
    template = _chat_template(tokenizer) if any(is_rendered) else None
    texts = [
        template.prompt(example.turns, example.task_id) if template and rendered else example.prompt
        for example, rendered in zip(examples, is_rendered, strict=True)
    ]
    # Whether the tokenizer puts BOS in front is seen on a text; a trailing EOS of its own is not taken over.
    bos = [id for id in tokenizer("a")["input_ids"][:1] if id == tokenizer.bos_token_id]
    eos = [_eos(tokenizer)] if encoder_decoder else []
    # Without EOS, a line break tells a causal model where the source ends.
    end = eos or tokenise_continuation(tokenizer, ["\n"])[0]
    for example, rendered, ids in zip(examples, is_rendered, tokenise(tokenizer, texts), strict=True):
        # A chat template writes the special tokens itself.
        head = [] if rendered or ids[: len(bos)] == bos else bos
        if example.limits:
            # At the least a token of the text itself: a limit below that makes room by leaving out what is around it.
            around = (head, end) if example.limits.prompt > len(head) + len(end) else ([], [])
            room = example.limits.prompt - sum(map(len, around))
            yield [*around[0], *ids[:room], *around[1]], len(ids) > room or around != (head, end)
            continue
        ids = [*head, *ids, *eos]
        limit = cfg.max_prompt_length - num_virtual_tokens
        if len(ids) <= limit:
            yield ids, False
        else:
            head = [id for id in ids[:1] if id == tokenizer.bos_token_id]
            yield head + ids[len(ids) - limit + len(head) :], True


def end_of_answers(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer to these examples: in a chat, the token that ends its turn."""
    if not any(_is_rendered(example, tokenizer) for example in examples):
        return []
    end = _chat_template(tokenizer).turn_end()
    return [] if end is None else [end]


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    if tokenizer.chat_template is None:
        raise UserError(
            f"the data needs a chat template, and the tokenizer {tokenizer.name_or_path!r} has none; expected the "
            "tokenizer of an instruction-tuned model (model.tokenizer, or another model), or data with a prompt and a "
            "target that are shown as they stand"
        )
    return ChatTemplate(tokenizer)


def _chat_notes(example: Example, tokenizer: PreTrainedTokenizerBase, encoder_decoder: bool) -> list[str]:
    """What is to be known of how chats are learnt, told by one of them; nothing for other examples."""
    if not isinstance(example, Conversation):
        return []
    if not _is_rendered(example, tokenizer):
        return ["the tokenizer has no chat template, so prompts are shown without one"]
    if encoder_decoder:
        return ["the last turn of the assistant's is the target, what comes before it the source"]
    return [f"the loss is on the assistant's turns, found by {ChatTemplate(tokenizer).how}"]


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {tokenizer.name_or_path!r} has no EOS token, which ends every target")
    return tokenizer.eos_token_id


def task_number(example: Example, prompt_tasks: Sequence[str]) -> int | None:
    """Return which of the tasks with parameters of their own an example is of; None if there are no such tasks.

    Raises:
        UserError: It is of another one.
    """
    if not prompt_tasks:
        return None
    name = example.task.name if isinstance(example, TaskExample) else None
    if name not in prompt_tasks:
        known = ", ".join(prompt_tasks)
        raise UserError(
            f"{example.task_id}: the method has values for each of {known} (method.tasks), and this is an "
            f"example of {name or 'no task'}{did_you_mean(name or '', prompt_tasks)}"
        )
    return prompt_tasks.index(name)


class EncodedDataset:
    """The encoded examples of a split, with their lengths and the number of truncated prompts and targets.

    Ids lie one after another in flat int32 arrays, so hundreds of thousands of examples take four bytes a token; an
    example that a mixture repeats is there once.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        cfg: DataConfig,
        num_virtual_tokens: int,
        encoder_decoder: bool,
        show_progress: bool = False,
        prompt_tasks: Sequence[str] = (),
    ) -> None:
        """Encode all examples. Raises UserError if there is none, one without a target token, or one of a task that
        is not among those with parameters of their own, where there are any."""
        if not examples:
            raise UserError(f"no examples to encode (data.format {cfg.format}, data.path {cfg.path})")
        self._encoder_decoder = encoder_decoder
        self.notes: tuple[str, ...] = ()
        if isinstance(examples, OwnExamples):
            self.notes = (*examples.notes, *_chat_notes(examples[0], tokenizer, encoder_decoder))
        unique, positions = examples.unique() if isinstance(examples, TaskExamples) else (examples, None)
        inputs, labels = array("i"), array("i")
        ends, truncated, has_label = [(0, 0)], [], []
        self._task_ids: list[int | None] = []
        bar = tqdm(total=len(unique), desc="tokenising", disable=not show_progress)
        remaining = iter(unique)
        while chunk := list(islice(remaining, CHUNK)):
            for row in _encode_all(chunk, tokenizer, cfg, num_virtual_tokens, encoder_decoder):
                inputs.extend(row.input_ids)
                labels.extend(row.labels)
                ends.append((len(inputs), len(labels)))
                truncated.append((row.prompt_truncated, row.target_truncated))
                has_label.append(any(label != IGNORE_INDEX for label in reversed(row.labels)))
            self._task_ids.extend(task_number(example, prompt_tasks) for example in chunk)
            bar.update(len(chunk))
        bar.close()
        self._inputs, self._labels = np.frombuffer(inputs, np.int32), np.frombuffer(labels, np.int32)
        self._ends, self._truncated = np.array(ends), np.array(truncated)
        positions = np.arange(len(unique)) if positions is None else positions
        self._positions = positions[np.array(has_label)[positions]]
        self.left_out = len(positions) - len(self._positions)
        if not len(self._positions):
            raise UserError(
                f"of the {self.left_out} chats none has a turn of the assistant's within data.max_length "
                f"{cfg.max_length}; expected more"
            )
        sizes = np.diff(self._ends, axis=0)
        self.lengths: list[int] = (sizes.sum(1) if encoder_decoder else sizes[:, 0])[self._positions].tolist()
        self.truncated_prompts, self.truncated_targets = self._truncated[self._positions].sum(0).tolist()

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Encoded:
        row = self._positions[index]
        (first_input, first_label), (last_input, last_label) = self._ends[row : row + 2].tolist()
        prompt_truncated, target_truncated = self._truncated[row].tolist()
        return Encoded(
            self._inputs[first_input:last_input].tolist(),
            self._labels[first_label:last_label].tolist(),
            prompt_truncated,
            target_truncated,
            self._encoder_decoder,
            self._task_ids[row],
        )

    def highest_id(self) -> int:
        """Return the highest token id of all examples."""
        return int(max(self._inputs.max(initial=0), self._labels.max(initial=0)))

    def longest(self) -> tuple[int, int]:
        """Return the most tokens that are read of an example, and the most labels."""
        source, target = np.diff(self._ends, axis=0)[self._positions].max(0).tolist()
        return source, target

    def summary(self) -> str:
        """Return a line on size, lengths and truncation, and what else is to be known of the data a line each."""
        left_out = (
            f"; left out: {self.left_out} chats without an answer within data.max_length" if self.left_out else ""
        )
        notes = "".join(f"\n  {note}" for note in self.notes)
        return (
            f"{len(self)} examples, {sum(self.lengths)} tokens (mean {sum(self.lengths) / len(self):.1f}, "
            f"longest {max(self.lengths)}); "
            f"truncated: {self.truncated_prompts} prompts, {self.truncated_targets} targets{left_out}{notes}"
        )


def collate(
    batch: Sequence[Encoded],
    pad_token_id: int,
    padding_side: Literal["right", "left"] = "right",
    pad_to_multiple_of: int = 1,
) -> dict[str, Tensor]:
    """Pad a batch to its longest row, rounded up to a multiple.

    Returns `input_ids`, `attention_mask` [B, S] and `labels` [B, S] (encoder-decoder: [B, T]), all int64; padded
    labels are -100. Labels of an encoder-decoder model are padded on the right whatever the side of the inputs. Rows
    of tasks with parameters of their own come with `task_ids` [B].
    """
    inputs = [row.input_ids for row in batch]
    labels_side = "right" if batch[0].encoder_decoder else padding_side
    tensors = {
        "input_ids": _pad(inputs, pad_token_id, padding_side, pad_to_multiple_of),
        "attention_mask": _pad([[1] * len(ids) for ids in inputs], 0, padding_side, pad_to_multiple_of),
        "labels": _pad([row.labels for row in batch], IGNORE_INDEX, labels_side, pad_to_multiple_of),
    }
    task_ids = [row.task_id for row in batch if row.task_id is not None]
    return tensors | ({"task_ids": torch.tensor(task_ids)} if task_ids else {})


def collate_packed(
    rows: Sequence[Sequence[Encoded]], row_size: int, num_virtual_tokens: int, pad_token_id: int
) -> dict[str, Tensor]:
    """Put the examples of each row one behind another, with room for a soft prompt in front of each.

    Returns, all int64 and of one shape whatever the examples [R, row_size]: `input_ids`; `example_ids`, which of the
    row's examples a position is of, from 1 on, and 0 behind the last; `attention_mask`, 1 for tokens, and 0 in the room
    for prompts and behind the last example; `labels`, -100 there; and `task_ids` [R, N], where N is the most examples
    that a row has room for: the number of each example's task, 0 where one prompt serves all.
    """
    shape = len(rows), row_size
    input_ids = torch.full(shape, pad_token_id)
    labels = torch.full(shape, IGNORE_INDEX)
    example_ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    task_ids = torch.zeros(len(rows), row_size // (num_virtual_tokens + 1), dtype=torch.long)
    for number, row in enumerate(rows):
        end = 0
        for place, example in enumerate(row):
            start, first = end, end + num_virtual_tokens
            end = first + len(example.input_ids)
            input_ids[number, first:end] = torch.tensor(example.input_ids)
            labels[number, first:end] = torch.tensor(example.labels)
            mask[number, first:end] = 1
            example_ids[number, start:end] = place + 1
            task_ids[number, place] = example.task_id or 0
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "labels": labels,
        "example_ids": example_ids,
        "task_ids": task_ids,
    }


def _pad(rows: Sequence[Sequence[int]], value: int, side: str, multiple: int) -> Tensor:
    width = -(-max(map(len, rows)) // multiple) * multiple
    padded = torch.full((len(rows), width), value, dtype=torch.long)
    for i, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        padded[i, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
    return padded
