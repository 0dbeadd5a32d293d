"""The paper's analyses of trained adapters: size of embeddings against offsets (table 2), inference speed (table 8),
the same weights under other settings (DePT's cyclic shift in table 1, no offsets in table 11).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from adept_ds.config.base import validation_problems
from adept_ds.config.run import RunConfig
from adept_ds.data.encode import EncodedDataset, collate
from adept_ds.data.tasks import TaskExamples
from adept_ds.distributed import World
from adept_ds.errors import UserError, did_you_mean
from adept_ds.evaluation.generate import generate_samples
from adept_ds.evaluation.text2text import greedy
from adept_ds.model.adapted_model import AdaptedModel
from adept_ds.storage.adapter_folder import load_adapter, save_adapter

BATCH_SIZE = 32


@dataclass
class Moments:
    """Running mean and variance of the absolute values of all elements it is given, in fp64."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: Tensor) -> None:
        """Count the elements of a tensor of any shape."""
        values = values.double().abs()
        self.count += values.numel()
        self.total += float(values.sum())
        self.squares += float(values.square().sum())

    @property
    def mean(self) -> float:
        """Mean of |x|."""
        return self.total / self.count

    @property
    def variance(self) -> float:
        """Variance of |x|, over `count`."""
        return self.squares / self.count - self.mean**2


class _ReadError(Exception):
    """Ends a forward pass once the embedding has been read; not an error."""


@torch.no_grad()
def embedding_sizes(
    model: AdaptedModel, examples: EncodedDataset, pad_token_id: int, device: torch.device
) -> tuple[Moments, Moments]:
    """Return the sizes of the elements of input embeddings and of offsets, over all tokens of the inputs.

    The offset of a token is what the method adds to its embedding; the soft prompt is not counted. No layer runs.
    """
    plain_sizes, offset_sizes = Moments(), Moments()
    for start in tqdm(range(0, len(examples), BATCH_SIZE), desc="embed", unit="batch"):
        members = range(start, min(start + BATCH_SIZE, len(examples)))
        batch = collate([examples[index] for index in members], pad_token_id)
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        tuned = _input_embeddings(model, ids, mask)[:, model.num_virtual_tokens :]
        with model.disable_adapter():
            plain = _input_embeddings(model, ids, mask)
        is_token = mask.bool()
        plain_sizes.add(plain[is_token])
        offset_sizes.add(tuned[is_token].float() - plain[is_token].float())
    return plain_sizes, offset_sizes


def _input_embeddings(model: AdaptedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """What the first layer reads for right-padded ids, prompt included [B, l + S, d]."""
    reader = model.backbone.get_encoder() if model.is_encoder_decoder else model.backbone
    read: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        read.append(output)
        raise _ReadError

    ids, mask = model.add_prompt(ids, mask)
    handle = reader.get_input_embeddings().register_forward_hook(keep)
    try:
        reader(input_ids=ids, attention_mask=mask)
    except _ReadError:
        pass
    finally:
        handle.remove()
    return read[0]


def samples_per_second(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: TaskExamples,
    run: RunConfig,
    world: World,
    rounds: int,
) -> list[float]:
    """Time the evaluation of a task's examples, `rounds` times after one that is not counted. Collective.

    Everything that an evaluation does up to the texts is timed: tokenising, padding, decoding.
    """
    task = examples[0].task
    decoding = greedy(task, tokenizer, run)
    rates = []
    for _ in range(1 + rounds):
        _synchronise(world.device)
        start = time.perf_counter()
        generate_samples(model, tokenizer, examples, decoding, run.data, world)
        _synchronise(world.device)
        rates.append(len(examples) / (time.perf_counter() - start))
    return rates[1:]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def write_variant(adapter: Path, changes: Sequence[str], out: Path) -> None:
    """Write an adapter with the weights of another and other settings of its method.

    Args:
        adapter: Adapter folder.
        changes: `key=value` with settings of the method, values as JSON.
        out: The new adapter folder. What it was made from is in its config.

    Raises:
        UserError: A setting is unknown or has a wrong value. One that does not go with the weights is told when the new
            adapter is loaded.
    """
    source = load_adapter(adapter)
    settings = source.method.model_dump(mode="json")
    for key, value in _parsed(changes):
        if key not in settings or key == "name":
            known = [name for name in settings if name != "name"]
            expected = f"expected one of {', '.join(known)}{did_you_mean(key, known)}"
            raise UserError(f"--set {key}: no setting of method {source.method.name!r}; {expected}")
        settings[key] = value
    try:
        method = type(source.method).model_validate(settings)
    except ValidationError as error:
        raise UserError(f"--set {' '.join(changes)}: {validation_problems(error)}") from None
    facts = {key: value for key, value in source.facts.items() if key not in ("tensors_sha256", "versions")}
    save_adapter(out, method, source.tensors, source.backbone, {**facts, "variant_of": str(adapter)})


def _parsed(changes: Iterable[str]) -> Iterable[tuple[str, Any]]:
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise UserError(f"--set {change}: expected key=value, for example cyclic_shift=50")
        try:
            yield key, json.loads(text)
        except json.JSONDecodeError:
            yield key, text
