"""Settings for a model and rows of one's own, where no config file says any.

What is chosen follows from the rows, the model and the machine, and each choice is told with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from adept_ds.backbone.frozen_linear import has_fast_bf16
from adept_ds.backbone.load import load_architecture, load_tokenizer
from adept_ds.config.batch import warmup_steps
from adept_ds.config.loader import load_values
from adept_ds.config.run import RunConfig, TrainConfig
from adept_ds.data.encode import EncodedDataset
from adept_ds.data.own import OwnExamples, own_columns
from adept_ds.data.problems import load_examples
from adept_ds.formats import Example
from adept_ds.formats.row_files import suffix_of
from adept_ds.model.loss import IGNORE_INDEX

SHORT_PROMPT = {"name": "adept", "num_virtual_tokens": 7, "bottleneck": 1}
LONG_PROMPT = {"name": "adept", "num_virtual_tokens": 60, "bottleneck": 19}
"""The paper's for language models, and for T5."""

STEPS = 1_000
"""Steps that the number of epochs aims at; the paper's run on 487 examples has 1,220."""
MOST_EPOCHS = 20
ROWS_FOR_ONE = 64
"""A batch has one example for so many rows; the paper's has 4 of 487."""
LARGEST_BATCH = 16
WARMUP_RATIO = 0.06
RATES = {"soft_prompt": 1e-3, "network": 1e-3}
RATES_FOR_FEW_STEPS = {"soft_prompt": 5e-3, "network": 2e-3}
RATES_FOR_T5 = {"soft_prompt": 0.3, "network": 1e-4}
FEW_STEPS = 500
FEWEST_EVALUATIONS = 4

MEASURED_ROWS = 2_000
LONGEST = 2_048
"""Tokens that a row may have, whatever the model could read."""
PROMPT_ROOM = 128
"""Tokens that a prompt may have at least: one that is tried later may be longer than those of the rows."""
TOKENS_IN_PASS = 8_192
"""Tokens of one forward pass of a rank, at most."""
UNLIMITED = 10**9


@dataclass(frozen=True)
class ChosenSettings:
    """What was chosen, and why."""

    settings: dict[str, Any]
    """Sections and their settings, as in a config file."""
    reasons: tuple[str, ...]
    """For the user, a line for each choice."""


def settings_for_own_data(model: str, data: str, overrides: Sequence[str] = (), world_size: int = 1) -> ChosenSettings:
    """Return settings that suit the rows of `data`, the model and the machine.

    The overrides are still to be put on them, by `load_values`.

    Args:
        model: Hub id or folder of the backbone.
        data: File or folder of rows, or hub id of a data set.
        overrides: `key=value`, as for `load_config`. What they set is taken into account in the rest.
        world_size: Ranks.

    Raises:
        UserError: Model or data is not there, the data has mistakes, or an override has.
    """
    given = {override.partition("=")[0] for override in overrides}
    settings: dict[str, Any] = {
        "model": {"name_or_path": model},
        "method": SHORT_PROMPT,
        "data": {"format": "own", "path": data},
        "train": {"sharding": "auto"},
        "logging": {"run_dir": f"runs/{_name(model)}-{_name(data)}"},
    }
    if not given & {"train.warmup_steps", "train.warmup_ratio"}:
        settings["train"]["warmup_ratio"] = WARMUP_RATIO
    if not given & {"train.epochs", "train.max_steps"}:
        settings["train"]["epochs"] = 1  # Until the rows are counted.
    architecture = load_architecture(load_values(settings, "settings", overrides).run.model)
    is_t5 = architecture.is_encoder_decoder
    settings["model"]["dtype"], precision = _precision(is_t5)
    settings["method"] = LONG_PROMPT if is_t5 else SHORT_PROMPT
    run = load_values(settings, "settings", overrides).run

    examples, held_out = (load_examples(run.data, split) for split in ("train", "validation"))
    notes = examples.notes if isinstance(examples, OwnExamples) else ()
    limits, longest, lengths = _limits([*examples, *held_out], run, architecture)
    settings["data"] |= {**own_columns(run.data).settings, **limits}

    chosen, epoch_steps, total = _steps(len(examples), longest, run.train, given, world_size)
    settings["train"] |= chosen
    every = min(epoch_steps, math.ceil(total / FEWEST_EVALUATIONS))
    if held_out and every < epoch_steps:
        settings["eval"] = {"every_steps": every}
    settings["logging"]["every_steps"] = min(max(total // 50, 1), 10)
    rates = RATES_FOR_T5 if is_t5 else RATES if total > FEW_STEPS else RATES_FOR_FEW_STEPS
    if "method.name" not in given:
        settings["train"]["learning_rate"] = rates

    final = load_values(settings, "settings", overrides).run
    shown = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
    groups = "the method's own" if "method.name" in given else shown
    warmup = warmup_steps(final.train, total)
    best = f"by the loss on {len(held_out):,} held-out rows, every {every:,} steps" if held_out else "the last step"
    reasons = (
        *notes,
        lengths,
        f"steps: {total:,} of {final.train.global_batch_size} examples, {epoch_steps:,} an epoch (train.epochs, "
        f"train.global_batch_size): for {len(examples):,} rows about {STEPS:,} steps or {MOST_EPOCHS} epochs",
        f"warm-up: {warmup:,} steps (train.warmup_ratio {WARMUP_RATIO})",
        f"rates: {groups} (train.learning_rate)",
        f"precision: {precision} (model.dtype)",
        f"best: {best} (data.validation_fraction, eval.every_steps)",
        f"run folder: {final.logging.run_dir} (logging.run_dir)",
    )
    return ChosenSettings(settings, reasons)


def _steps(
    rows: int, longest: int, asked: TrainConfig, given: set[str], world_size: int
) -> tuple[dict[str, int], int, int]:
    """Return batch and epochs as far as they are not given, and the steps of an epoch and of the run."""
    chosen = {"global_batch_size": _batch_size(rows, world_size)}
    size = asked.global_batch_size if "train.global_batch_size" in given else chosen["global_batch_size"]
    micro = _micro_batch_size(size // world_size, longest)
    if micro < size // world_size and not given & {"train.micro_batch_size", "train.gradient_accumulation_steps"}:
        chosen["micro_batch_size"] = micro
    epoch_steps = math.ceil(rows / size)
    epochs = asked.epochs
    if not given & {"train.epochs", "train.max_steps"}:
        epochs = chosen["epochs"] = min(max(round(STEPS / epoch_steps), 1), MOST_EPOCHS)
    return chosen, epoch_steps, asked.max_steps or (epochs or 0) * epoch_steps


def _name(source: str) -> str:
    """The last part of a hub id or path, without what only says how a file is read."""
    path = Path(source.rstrip("/"))
    return Path(path.name.removesuffix(".gz")).stem if suffix_of(path) else path.name


def _precision(is_encoder_decoder: bool) -> tuple[str, str]:
    """`model.dtype` that this machine computes fast, and what to say of it."""
    if not torch.cuda.is_available():
        if has_fast_bf16():
            return "bf16", "bf16, which this CPU multiplies in hardware"
        return "fp32", "fp32, since this CPU has no bf16 instructions"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "bf16, which this GPU has"
    if is_encoder_decoder:
        return "fp32", "fp32, since this GPU has no bf16, and encoder-decoder models overflow in fp16"
    return "fp16", "fp16, since this GPU has no bf16"


def _batch_size(rows: int, world_size: int) -> int:
    """A power of two by the number of rows, made a multiple of the ranks."""
    wanted = min(2 ** max(0, (rows // ROWS_FOR_ONE).bit_length() - 1), LARGEST_BATCH)
    return math.ceil(wanted / world_size) * world_size


def _micro_batch_size(of_rank: int, longest: int) -> int:
    """The largest share of a rank's examples that one pass has room for, and one at least."""
    shares = [share for share in range(1, of_rank + 1) if of_rank % share == 0]
    return max([share for share in shares if share * longest <= TOKENS_IN_PASS], default=1)


def _limits(
    examples: Sequence[Example], run: RunConfig, architecture: PreTrainedConfig
) -> tuple[dict[str, int], int, str]:
    """Return the settings of lengths, how long the longest sequence then is, and what to say of them."""
    wide = run.data.model_copy(update={"max_prompt_length": UNLIMITED, "max_length": 2 * UNLIMITED})
    measured = examples[:: math.ceil(len(examples) / MEASURED_ROWS)]
    rows = EncodedDataset(measured, load_tokenizer(run.model), wide, 0, architecture.is_encoder_decoder)
    soft_prompt = run.method.num_virtual_tokens
    answers = [_answer(rows[number].labels) for number in range(len(rows))]
    targets = [end - start for start, end in answers]
    most = LONGEST
    if architecture.is_encoder_decoder:
        prompts = [len(rows[number].input_ids) + soft_prompt for number in range(len(rows))]
    else:
        most = min(most, getattr(architecture, "max_position_embeddings", most))
        prompts = [start + soft_prompt for start, _ in answers]
    wholes = [prompt + target for prompt, target in zip(prompts, targets, strict=True)]
    max_prompt = min(max(max(prompts), PROMPT_ROOM), most * 3 // 4)
    # An encoder-decoder model's target has what max_length leaves beside the longest prompt.
    longest = max_prompt + max(targets) if architecture.is_encoder_decoder else max(wholes)
    max_whole = min(max(longest, max_prompt + 1), most)
    cut = sum(prompt > max_prompt or whole > max_whole for prompt, whole in zip(prompts, wholes, strict=True))
    of = f"{len(measured):,} rows" + (f" (of {len(examples):,})" if len(measured) < len(examples) else "")
    text = (
        f"lengths: of {of} the longest has {max(wholes):,} tokens with the soft prompt, its prompt at most "
        f"{max(prompts):,}; data.max_length {max_whole:,} and data.max_prompt_length {max_prompt:,} cut {cut:,} of them"
    )
    return {"max_prompt_length": max_prompt, "max_length": max_whole}, min(max(wholes), max_whole), text


def _answer(labels: Sequence[int]) -> tuple[int, int]:
    """Where the last stretch of labels begins and ends."""
    end = max(number for number, label in enumerate(labels, 1) if label != IGNORE_INDEX)
    start = max((number for number, label in enumerate(labels[:end], 1) if label == IGNORE_INDEX), default=0)
    return start, end
