"""The work that all contenders share: which examples, in which batches, padded how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from adept_ds.backbone.load import load_tokenizer
from adept_ds.config.batch import BatchArithmetic
from adept_ds.config.run import RunConfig
from adept_ds.data.batches import global_batches
from adept_ds.data.encode import Encoded, EncodedDataset
from adept_ds.data.micro_batches import MicroBatches
from adept_ds.data.problems import load_examples
from adept_ds.errors import UserError
from adept_ds.model.loss import IGNORE_INDEX

SYNTHETIC_TARGET_SHARE = 0.3
"""Share of a synthetic example's tokens that have a label, for decoder-only models; MBPP's is 57 of 188."""

SYNTHETIC_TARGET_TOKENS = 20
"""Length of a synthetic example's target, for encoder-decoder models."""

Batch = dict[str, Tensor]
Step = list[Batch]
"""The micro-batches of one optimizer step."""


@dataclass(frozen=True)
class Work:
    """The batches of one round on this rank, and what they are over all ranks."""

    steps: list[Step]
    labels_of_step: list[int]
    """Label tokens of each step, over all ranks."""
    examples: list[tuple[int, int]]
    """(Input tokens, label tokens) of each example, over all ranks."""
    encoder_decoder: bool
    tokenizer: PreTrainedTokenizerBase | None
    packed_steps: list[Step] | None = None
    """The same steps in packed rows, where `train.packing` asks for a comparison."""

    @property
    def tokens(self) -> int:
        """Tokens without padding and soft prompt; of an encoder-decoder model's targets too."""
        return sum(inputs + (labels if self.encoder_decoder else 0) for inputs, labels in self.examples)


def build_work(
    run: RunConfig,
    architecture: PreTrainedConfig,
    steps: int,
    synthetic: Sequence[int],
    arithmetic: BatchArithmetic,
    rank: int = 0,
    beside_packed: bool = False,
) -> Work:
    """Choose `steps` batches of `train.global_batch_size` examples and split each as training would.

    Args:
        run: Data, lengths, batch sizes, seed.
        architecture: Vocabulary, and whether there is a decoder beside an encoder.
        steps: Batches in a round.
        synthetic: Lengths of examples of random tokens, in turn, in place of the data; no tokenizer is loaded then.
        arithmetic: Micro-batches, accumulation, ranks.
        rank: The rank whose micro-batches are returned.
        beside_packed: Where `arithmetic` is of packed rows, make the same steps of rows of one example each too, so
            many in a micro-batch that it never has more positions.

    Raises:
        UserError: The data or the tokenizer cannot be read, or the data has fewer batches.
    """
    dataset: EncodedDataset | list[Encoded]
    if synthetic:
        tokenizer, pad = None, 0
        dataset = synthetic_examples(run, architecture, steps * arithmetic.global_batch_size, synthetic)
        lengths = [len(example.input_ids) for example in dataset]
    else:
        tokenizer = load_tokenizer(run.model)
        pad = tokenizer.pad_token_id
        dataset = EncodedDataset(
            load_examples(run.data, "train"),
            tokenizer,
            run.data,
            run.method.num_virtual_tokens,
            architecture.is_encoder_decoder,
            prompt_tasks=run.method.prompt_tasks,
        )
        lengths = dataset.lengths
    batches = choose_batches(lengths, arithmetic.global_batch_size, steps, run.train.seed, run.train.group_by_length)
    prompt = run.method.num_virtual_tokens
    longest = max(lengths) + prompt
    if arithmetic.packing is not None and longest > arithmetic.packing:
        raise UserError(
            f"train.packing is {arithmetic.packing}, and the longest example has {longest} tokens with its soft "
            f"prompt; expected {longest} at least"
        )
    packed_steps = None
    if beside_packed and arithmetic.packing is not None:
        packed_steps = _of_rank(MicroBatches(dataset, arithmetic, prompt, pad), batches, rank)
        arithmetic = _unpacked(arithmetic, longest)
    counts = [[(len(row.input_ids), _labels(row)) for row in (dataset[i] for i in batch)] for batch in batches]
    return Work(
        steps=_of_rank(MicroBatches(dataset, arithmetic, prompt, pad), batches, rank),
        labels_of_step=[sum(labels for _, labels in batch) for batch in counts],
        examples=[example for batch in counts for example in batch],
        encoder_decoder=architecture.is_encoder_decoder,
        tokenizer=tokenizer,
        packed_steps=packed_steps,
    )


def _of_rank(make: MicroBatches, batches: Sequence[Sequence[int]], rank: int) -> list[Step]:
    return [make.of_rank(batch, rank) for batch in batches]


def _unpacked(packed: BatchArithmetic, longest: int) -> BatchArithmetic:
    """Split global batches into micro-batches of examples, so many that all can have the `longest` one's size."""
    assert packed.packing is not None
    per_rank, most = packed.global_batch_size // packed.world_size, packed.micro_batch_size * packed.packing // longest
    micro = max(number for number in range(1, per_rank + 1) if per_rank % number == 0 and number <= most)
    return BatchArithmetic(packed.global_batch_size, micro, per_rank // micro, packed.world_size)


def synthetic_examples(
    run: RunConfig, architecture: PreTrainedConfig, count: int, lengths: Sequence[int]
) -> list[Encoded]:
    """Return `count` examples of random tokens, whose lengths are those given in turn.

    Decoder-only: the last 30 % have labels. Encoder-decoder: the target has 20 more.
    """
    generator = torch.Generator().manual_seed(run.train.seed)

    def tokens(number: int) -> list[int]:
        return torch.randint(architecture.vocab_size, (number,), generator=generator).tolist()

    def example(length: int) -> Encoded:
        ids = tokens(length)
        if architecture.is_encoder_decoder:
            return Encoded(ids, tokens(SYNTHETIC_TARGET_TOKENS), False, False, True)
        source = length - max(1, round(length * SYNTHETIC_TARGET_SHARE))
        return Encoded(ids, [IGNORE_INDEX] * source + ids[source:], False, False, False)

    return [example(lengths[number % len(lengths)]) for number in range(count)]


def _labels(row: Encoded) -> int:
    return sum(label != IGNORE_INDEX for label in row.labels)


def choose_batches(
    lengths: Sequence[int], size: int, count: int, seed: int, group_by_length: bool = True
) -> list[list[int]]:
    """Return `count` full batches of the first epoch, evenly spaced over their lengths, as training would see them."""
    epoch = global_batches(lengths, size, seed, 0, group_by_length)
    full = sorted((batch for batch in epoch if len(batch) == size), key=lambda batch: lengths[batch[0]])
    if count > len(full):
        raise UserError(f"--steps is {count}, but the data has {len(full)} batches of {size} examples; expected: less")
    return [full[(2 * i + 1) * len(full) // (2 * count)] for i in range(count)]


def padded_to(step: Step, inputs: int, labels: int) -> Step:
    """Pad every micro-batch on the right to `inputs` columns, its labels to `labels` columns."""
    widths = {"input_ids": (inputs, 0), "attention_mask": (inputs, 0), "labels": (labels, IGNORE_INDEX)}
    return [
        {
            name: F.pad(batch[name], (0, max(0, width - batch[name].shape[1])), value=value)
            for name, (width, value) in widths.items()
        }
        for batch in step
    ]


def with_prompt_positions(step: Step, count: int, encoder_decoder: bool) -> Step:
    """Put `count` ordinary tokens in front of every row: what a soft prompt of that length costs the backbone."""

    def longer(batch: Batch) -> Batch:
        ids = torch.arange(count).expand(len(batch["input_ids"]), -1)
        in_front = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if not encoder_decoder:
            in_front["labels"] = torch.full_like(ids, IGNORE_INDEX)
        return batch | {name: torch.cat([columns, batch[name]], 1) for name, columns in in_front.items()}

    return [longer(batch) for batch in step]


def padded_tokens(steps: Sequence[Step], prompt: int, encoder_decoder: bool) -> int:
    """Positions of all rows, with padding and `prompt` more each where they are not packed, and of an encoder-decoder
    model's targets."""
    return sum(
        batch["input_ids"].numel()
        + (prompt * len(batch["input_ids"]) if "example_ids" not in batch else 0)
        + (batch["labels"].numel() if encoder_decoder else 0)
        for step in steps
        for batch in step
    )
