"""Training throughput of this project beside HF PEFT's prompt tuning, and where the time of a step goes.

All contenders train the same frozen backbone on the same examples in one plain torch process, without DeepSpeed. The
gradients are those of soft prompts of the same length; ADePT's offset network is on top of that.

    adept_ds         batches of like length; LM head and loss at the labelled positions only
    PEFT, dynamic    shuffled batches, padded to their longest row; the backbone's own loss
    PEFT, maximum    the same batches, every row padded to `data.max_length`
"""

from __future__ import annotations

import os
import platform
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm
from transformers import PreTrainedModel

from adept_ds.backbone import load_backbone, load_tokenizer
from adept_ds.config import RunConfig
from adept_ds.data import EncodedDataset, collate, global_batches, load_examples
from adept_ds.errors import UserError
from adept_ds.model import AdaptedModel, get_adept_model
from adept_ds.optimizer import build_optimizer, set_learning_rates

if TYPE_CHECKING:
    from peft import PeftModel

OURS, PEFT_DYNAMIC, PEFT_MAXIMUM = "adept_ds", "PEFT, dynamic padding", "PEFT, padded to the maximum"

LINEAR, ATTENTION, HEAD, OPTIMIZER, OTHER = "linear layers", "attention", "loss head", "optimizer", "other"
ELEMENTWISE, EMBEDDING = "norm, activation, rotary, mask", "embedding and offset"
GROUPS = (LINEAR, ATTENTION, ELEMENTWISE, EMBEDDING, HEAD, OPTIMIZER, OTHER)
"""Parts of a training step, forward and backward together."""

ATTENTION_OPERATORS = {"aten::scaled_dot_product_attention", "aten::matmul", "aten::bmm", "aten::softmax"}
"""Outside the linear layers and the head, products and softmax are the attention's."""

BACKBONE = "backbone"
BACKWARD = "autograd::engine::evaluate_function: "


@dataclass
class Contender:
    """A model in training on its own batches of the common examples; `seconds` has one entry for each round."""

    name: str
    model: AdaptedModel | PeftModel
    optimizer: torch.optim.Optimizer
    batches: list[dict[str, Tensor]]
    seconds: list[float] = field(default_factory=list)

    def step(self, batch: dict[str, Tensor]) -> float:
        """Take one optimizer step and return its loss."""
        loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    @property
    def real_tokens(self) -> int:
        """Tokens in all batches, without padding and soft prompt."""
        return sum(int(batch["attention_mask"].sum()) for batch in self.batches)

    @property
    def padding(self) -> float:
        """Share of padding in all batches."""
        return 1 - self.real_tokens / sum(batch["input_ids"].numel() for batch in self.batches)


def benchmark(run: RunConfig, steps: int, rounds: int) -> dict[str, Any]:
    """Measure all contenders and return what `text_report` prints, ready for JSON.

    Args:
        run: Backbone, dtype, data, soft-prompt length, batch size (`train.global_batch_size`), optimizer settings.
        steps: Batches a round and contender.
        rounds: Times that the batches are gone through, after a warm-up.

    Raises:
        UserError: The backbone is no causal model, or the data or the backbone cannot be read.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    contenders = build_contenders(run, steps, device)
    measure(contenders, rounds)
    ours = contenders[0]
    examples = sum(len(batch["input_ids"]) for batch in ours.batches)
    return {
        "model": run.model.name_or_path,
        "dtype": run.model.dtype,
        "machine": machine_facts(device),
        "batch_size": run.train.global_batch_size,
        "num_virtual_tokens": run.method.num_virtual_tokens,
        "max_length": run.data.max_length,
        "examples": examples,
        "mean_tokens": ours.real_tokens / examples,
        "contenders": {
            contender.name: {
                "examples_per_second": examples / median(contender.seconds),
                "tokens_per_second": contender.real_tokens / median(contender.seconds),
                "padding": contender.padding,
                # Contenders take turns, so a round's times belong together whatever else the machine does.
                "adept_ds_is_faster_by": median(
                    theirs / own for theirs, own in zip(contender.seconds, ours.seconds, strict=True)
                ),
                "seconds": contender.seconds,
            }
            for contender in contenders
        },
        "adept_ds_seconds_per_step": step_breakdown(ours, device),
    }


def build_contenders(run: RunConfig, steps: int, device: torch.device) -> list[Contender]:
    """Return the three contenders, this project first, each in training mode with its collated batches on `device`."""
    from peft import PromptTuningConfig, get_peft_model

    length, size = run.method.num_virtual_tokens, run.train.global_batch_size
    tokenizer = load_tokenizer(run.model)
    dataset = EncodedDataset(load_examples(run.data, "train"), tokenizer, run.data, length, encoder_decoder=False)
    grouped = choose_batches(dataset.lengths, size, steps, run.train.seed)
    shuffled = shuffle_examples(grouped, run.train.seed)

    def collated(batches: Iterable[Sequence[int]], multiple: int = 1) -> list[dict[str, Tensor]]:
        rows = ([dataset[index] for index in batch] for batch in batches)
        padded = (collate(batch, tokenizer.pad_token_id, pad_to_multiple_of=multiple) for batch in rows)
        return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in padded]

    backbone = load_backbone(run.model)
    if backbone.config.is_encoder_decoder:
        raise UserError(f"model.name_or_path is {run.model.name_or_path!r}; the benchmark expects a causal model")
    ours = get_adept_model(backbone, run.method, tokenizer, run.train.seed).to(device).train()
    optimizer = build_optimizer(ours, run.train)
    set_learning_rates(optimizer, 1.0)

    prompt_tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)
    peft = get_peft_model(load_backbone(run.model), prompt_tuning).to(device).train()
    peft_optimizer = torch.optim.AdamW(
        [parameter for parameter in peft.parameters() if parameter.requires_grad],
        lr=run.train.learning_rate.soft_prompt,
        betas=run.train.adam_betas,
        eps=run.train.adam_eps,
        weight_decay=run.train.weight_decay,
    )
    return [
        Contender(OURS, ours, optimizer, collated(grouped)),
        Contender(PEFT_DYNAMIC, peft, peft_optimizer, collated(shuffled)),
        # No row is longer than this multiple, so it is every row's length.
        Contender(PEFT_MAXIMUM, peft, peft_optimizer, collated(shuffled, run.data.max_length - length)),
    ]


def choose_batches(lengths: Sequence[int], size: int, count: int, seed: int) -> list[list[int]]:
    """Return `count` full batches of the first epoch, evenly spaced over their lengths, as training would see them."""
    epoch = global_batches(lengths, size, seed, epoch=0, group_by_length=True)
    full = sorted((batch for batch in epoch if len(batch) == size), key=lambda batch: lengths[batch[0]])
    if count > len(full):
        raise UserError(f"--steps is {count}, but the data has {len(full)} batches of {size} examples; expected: less")
    return [full[(2 * i + 1) * len(full) // (2 * count)] for i in range(count)]


def shuffle_examples(batches: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
    """Return batches of the same examples and size without regard to length."""
    size, order = len(batches[0]), [index for batch in batches for index in batch]
    random.Random(seed).shuffle(order)
    return [order[start : start + size] for start in range(0, len(order), size)]


def measure(contenders: Sequence[Contender], rounds: int) -> None:
    """Time `rounds` passes over the batches, after a warm-up step each on the longest batch.

    The contenders take turns step by step, so that what else runs on the machine is shared evenly.
    """
    for contender in contenders:
        contender.step(max(contender.batches, key=lambda batch: batch["input_ids"].numel()))
    steps = len(contenders[0].batches)
    with tqdm(total=rounds * steps * len(contenders), desc="measuring", unit="step") as progress:
        for _ in range(rounds):
            seconds = [0.0] * len(contenders)
            for step in range(steps):
                for i, contender in enumerate(contenders):
                    # Reading the loss waits for the device, so a step's time is whole.
                    started = time.perf_counter()
                    contender.step(contender.batches[step])
                    seconds[i] += time.perf_counter() - started
                    progress.update()
            for contender, total in zip(contenders, seconds, strict=True):
                contender.seconds.append(total)


def step_breakdown(contender: Contender, device: torch.device) -> dict[str, float]:
    """Return the mean seconds of a step by `GROUPS`, from a profile of one pass over the batches.

    On a GPU these are the seconds of its kernels. The profiler's own cost is in the figures.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with _named_ranges(contender.model.backbone), profile(activities=activities) as profiler:
        for batch in contender.batches:
            contender.step(batch)
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CPU]
    groups = event_groups(events)
    total = dict.fromkeys(GROUPS, 0.0)
    for event, group in zip(events, groups, strict=True):
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        total[group] += own / 1e6 / len(contender.batches)
    return total


@contextmanager
def _named_ranges(backbone: PreTrainedModel) -> Iterator[None]:
    """Record the forward pass of the parts that are modules under the names of their groups."""
    names: dict[nn.Module, str] = {m: LINEAR for m in backbone.modules() if isinstance(m, nn.Linear)}
    names |= {backbone: BACKBONE, backbone.get_input_embeddings(): EMBEDDING, backbone.get_output_embeddings(): HEAD}
    open_ranges: list[record_function] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            open_ranges.append(record_function(name))
            open_ranges[-1].__enter__()

        return hook

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    handles = []
    for module, name in names.items():
        handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def event_groups(events: Sequence[FunctionEvent]) -> list[str]:
    """Return the group of each event: that of the range or operator around it, in the backward pass that of the
    forward operator that its node belongs to."""
    # A node has the number of the operator that made it. An operator that made none shows the number of the next node,
    # so the last operator with a number is the one.
    maker_of: dict[int, str] = {}
    groups = [OTHER] * len(events)
    for i in sorted(range(len(events)), key=lambda i: events[i].time_range.start):
        lineage = list(_with_ancestors(events[i]))
        node = next((event for event in lineage if event.name.startswith(BACKWARD)), None)
        if node is None:
            groups[i] = _forward_group([event.name for event in lineage])
            maker_of[events[i].sequence_nr] = groups[i]
        elif node.sequence_nr >= 0:
            groups[i] = maker_of[node.sequence_nr]
    return groups


def _with_ancestors(event: FunctionEvent | None) -> Iterator[FunctionEvent]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _forward_group(lineage: Sequence[str]) -> str:
    """Group of an operator outside the backward pass; `lineage` is its name and those of all around it."""
    named = next((name for name in lineage if name in GROUPS), None)
    if named is not None:
        return named
    if ATTENTION_OPERATORS.intersection(lineage):
        return ATTENTION
    if any(name.startswith("Optimizer.") for name in lineage):
        return OPTIMIZER
    return ELEMENTWISE if BACKBONE in lineage else OTHER


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What the figures depend on beside the code."""
    facts: dict[str, Any] = {"torch": torch.__version__}
    if device.type == "cuda":
        return facts | {"device": torch.cuda.get_device_name(device)}
    # Linux alone has this file; elsewhere the platform module knows the name.
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return facts | {
        "device": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load_average": os.getloadavg()[0],
    }


def text_report(result: dict[str, Any]) -> str:
    """Return the figures of `benchmark` as a table."""
    machine = ", ".join(
        f"{value}" if name == "device" else f"{name} {value}" for name, value in result["machine"].items()
    )
    lines = [
        f"training throughput of {result['model']} in {result['dtype']}, one process, plain torch",
        f"machine: {machine}",
        f"{result['examples']} examples of {result['mean_tokens']:.0f} tokens on average, batches of "
        f"{result['batch_size']}, {result['num_virtual_tokens']} soft-prompt tokens, maximum {result['max_length']}",
        "",
        f"{'':28}{'examples/s':>12}{'tokens/s':>12}{'padding':>10}{'adept_ds is faster by':>24}",
    ]
    for name, figures in result["contenders"].items():
        ratio = "" if name == OURS else f"{figures['adept_ds_is_faster_by']:.2f} x"
        lines.append(
            f"{name:28}{figures['examples_per_second']:12.3f}{figures['tokens_per_second']:12.1f}"
            f"{figures['padding']:10.1%}{ratio:>24}"
        )
    rounds = len(next(iter(result["contenders"].values()))["seconds"])
    lines += [
        f"medians of {rounds} rounds; the ratio is the median of each round's",
        "",
        "where adept_ds spends a step:",
    ]
    seconds = result["adept_ds_seconds_per_step"]
    total = sum(seconds.values())
    lines += [f"  {group:32}{own * 1e3:10.1f} ms{own / total:8.1%}" for group, own in seconds.items()]
    return "\n".join(lines)
