"""Training throughput and memory of ADePT beside HF PEFT's methods and the bare backbone, and where a step's time goes.

One process: all contenders (`contenders`) do the same work (`work`) in turns, in plain torch without DeepSpeed. On the
ranks of a launcher: ADePT in DeepSpeed's engine (`ranks`), with the time spent waiting for split weights; on request
beside DeepSpeed's own gathers and plain torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, cast

import torch
from tqdm import tqdm

from adept_ds.backbone.fp8 import speed_note
from adept_ds.backbone.load import DTYPES, check_attention, load_architecture, resolve_architecture
from adept_ds.benchmark.collectives import count_collectives
from adept_ds.benchmark.contenders import (
    AGAINST,
    DENSE,
    FLOOR,
    PEFT_PROMPT,
    Contender,
    build_contenders,
    quantized_layers,
)
from adept_ds.benchmark.flops import ModelFlops, peak_flops
from adept_ds.benchmark.machine import machine_facts
from adept_ds.benchmark.memory import held_bytes, step_growth
from adept_ds.benchmark.operators import operator_seconds
from adept_ds.benchmark.phases import FORWARD, PHASES, STEP, PhaseClock, clocked
from adept_ds.benchmark.report import text_report
from adept_ds.benchmark.work import Work, build_work
from adept_ds.config.batch import batch_arithmetic
from adept_ds.config.deepspeed import complete
from adept_ds.config.run import RunConfig
from adept_ds.distributed import World, gather_objects, init_world, on_gpu
from adept_ds.model.adapted_model import AdaptedModel
from adept_ds.planner.memory import decide_sharding
from adept_ds.planner.packing import check_packing

__all__ = ["Options", "benchmark", "text_report"]

GOALS = {FLOOR: 1.05, PEFT_PROMPT: 0.8, DENSE: 1 / 1.35}
"""Contender to the largest part of its time that a step of ADePT should take; in fp8 that of 1.35 times the tokens/s,
which is meant for Llama3-8B on an H100 or H200."""

WARM_UP_STEPS = 2
"""The first allocates the optimizer's states; in it DeepSpeed also learns the order of its fetches."""


@dataclass(frozen=True)
class Options:
    """How a run is measured."""

    steps: int = 8
    """Optimizer steps in a round."""
    rounds: int = 5
    """Times that the same steps are taken, after a warm-up."""
    against: tuple[str, ...] = ()
    """What is measured too: in one process keys of `contenders.AGAINST`, on ranks those of `AGAINST_ON_RANKS`."""
    random_init: bool = False
    """Random weights in place of the checkpoint's; the architecture alone is read."""
    synthetic: tuple[int, ...] = ()
    """Lengths of examples of random tokens, in turn, in place of the data."""
    brief: bool = False
    """ADePT and the bare backbone alone, without the profile."""
    on_ranks: bool = False
    """Measure ADePT in DeepSpeed's engine on this launcher's ranks."""
    cpu_seconds: bool = False
    """On a CPU, the processor's time in place of the wall's."""


def benchmark(run: RunConfig, options: Options) -> dict[str, Any]:
    """Measure all contenders and return what `text_report` prints, ready for JSON. Collective if `on_ranks`.

    Args:
        run: Backbone, precision, method, data, batch sizes, optimizer, activation checkpointing; on ranks the
            `deepspeed` section too.
        options: How it is measured.

    Raises:
        UserError: Data, tokenizer or backbone cannot be read, the data has too few batches, the batch does not divide,
            or `against` does not go with the quantisation.
    """
    architecture = resolve_architecture(run.model)[0] if options.random_init else load_architecture(run.model)
    check_attention(run.model, architecture)
    check_packing(run, architecture)
    # PEFT's and stock models have a loss of their own, which is without.
    run = run.model_copy(update={"train": run.train.model_copy(update={"label_smoothing": 0.0})})
    world, notes = None, list[str]()
    if options.on_ranks:
        # Imports DeepSpeed, which one process does without.
        from adept_ds.benchmark.ranks import rank_contenders

        world = init_world()
        device, is_main = world.device, world.is_main
        run = decide_sharding(run, architecture, world)
        plan = complete(run, world.world_size, architecture.hidden_size)
        work = build_work(run, architecture, options.steps, options.synthetic, plan.batch, world.rank)
        contenders = rank_contenders(
            run, architecture, work, plan, options.against, options.random_init, world, notes.append
        )
        left_out = ", ".join(["the bare backbone", *(name for name in options.against if name in AGAINST)])
        notes.append(f"left out on ranks: {left_out}; they are measured in one process without a launcher")
    else:
        device, is_main = torch.device("cuda" if on_gpu() else "cpu"), True
        arithmetic = batch_arithmetic(run.train, world_size=1)
        work = build_work(run, architecture, options.steps, options.synthetic, arithmetic, beside_packed=True)
        if work.packed_steps is not None:
            notes.append(
                f"packed: {arithmetic.micro_batch_size} x {arithmetic.packing} positions a forward pass; others: "
                f"{len(work.steps[0][0]['input_ids'])} examples, of which as many as can be as long as the longest"
            )
        contenders = build_contenders(
            run, architecture, work, options.against, options.random_init, device, with_stock=not options.brief
        )
        if run.train.compile:
            cast(AdaptedModel, contenders[0].model).compile_blocks(notes.append)
        if run.model.quantization == "int8":
            notes.append("no stock backbone: bitsandbytes' 8-bit layers multiply in 8 bits too, which is other work")
        if run.model.quantization == "fp8":
            notes.append(f"{speed_note(device, DTYPES[run.model.dtype])}; MFU is of the rate of {run.model.dtype}")
        if run.model.quantization == "nf4" and not options.brief:
            here, stock = (quantized_layers(contender.backbone) for contender in contenders[1:3])
            if stock != here:
                notes.append(f"stock and PEFT have {stock} of the {here} linear layers in 4 bits; transformers' choice")

    alone = len(contenders) == 1
    memory = {contender.name: measure_memory(contender, device, alone) for contender in contenders}
    exchanged = {contender.name: count_collectives(last_step(contender)) for contender in contenders}
    measure(contenders, options.rounds, device, is_main, options.cpu_seconds)
    if world:
        for contender in contenders:
            _combine_ranks(contender, memory, world)
    machine = machine_facts(device)
    peak = peak_flops(machine["device"], DTYPES[run.model.dtype])
    if peak is None:
        notes.append(f"no MFU: the peak rate of {machine['device']} in {run.model.dtype} is not known here")
    ranks = world.world_size if world else 1
    flops = ModelFlops(architecture)
    return {
        "model": run.model.name_or_path,
        "random_init": options.random_init,
        "dtype": run.model.dtype,
        "quantization": run.model.quantization,
        "activation_checkpointing": run.train.activation_checkpointing,
        "compile": run.train.compile,
        "machine": machine,
        "ranks": ranks,
        "zero_stage": plan.config["zero_optimization"]["stage"] if world else None,
        "batch_size": run.train.global_batch_size,
        "micro_batches": len(work.steps[0]),
        "steps": options.steps,
        "num_virtual_tokens": run.method.num_virtual_tokens,
        "synthetic": list(options.synthetic),
        "packing": run.train.packing,
        "cpu_seconds": options.cpu_seconds and device.type == "cpu",
        "examples": len(work.examples),
        "tokens": work.tokens,
        "label_tokens": sum(work.labels_of_step),
        "contenders": {
            contender.name: _figures(contender, work, flops, ranks * peak if peak else None)
            | {"memory_bytes": memory[contender.name], **exchanged[contender.name]}
            for contender in contenders
        },
        "ratios": {other.name: _ratio(contenders[0], other) for other in contenders[1:]},
        "operator_seconds": None if world or options.brief else operator_seconds(contenders[0], device),
        "notes": notes,
    }


def timed_step(contender: Contender, number: int, clock: PhaseClock) -> dict[str, float]:
    """Take optimizer step `number`; return its seconds by phase. The contender's hooks for `clock` are in place."""
    clock.switch(FORWARD)
    contender.forward_backward(number)
    clock.switch(STEP)
    contender.update()
    return clock.stop()


def measure(
    contenders: Sequence[Contender],
    rounds: int,
    device: torch.device,
    show_progress: bool,
    cpu_seconds: bool = False,
) -> None:
    """Take all steps `rounds` times and note each contender's seconds by phase.

    The contenders take turns step by step, each time another one first, so that what else happens on the machine meets
    all of them alike.
    """
    clock, steps = PhaseClock(device, cpu_seconds), len(contenders[0].steps)
    progress = tqdm(total=rounds * steps * len(contenders), desc="measuring", unit="step", disable=not show_progress)
    with ExitStack() as hooks:
        for contender in contenders:
            head = contender.backbone.get_output_embeddings()
            hooks.enter_context(clocked(clock, contender.model, head, contender.fetches))
        for turn in range(rounds):
            for contender in contenders:
                contender.rounds.append(dict.fromkeys(PHASES, 0.0))
                contender.cpu_rounds.append(0.0)
            for number in range(steps):
                first = (turn * steps + number) % len(contenders)
                for contender in [*contenders[first:], *contenders[:first]]:
                    cpu = time.process_time()
                    for phase, seconds in timed_step(contender, number, clock).items():
                        contender.rounds[-1][phase] += seconds
                    contender.cpu_rounds[-1] += time.process_time() - cpu
                    progress.update()
    progress.close()


def last_step(contender: Contender) -> Callable[[], None]:
    """The contender's step on the longest batch, which is the last."""

    def step() -> None:
        contender.forward_backward(len(contender.steps) - 1)
        contender.update()

    return step


def measure_memory(contender: Contender, device: torch.device, alone: bool) -> dict[str, int]:
    """Warm up on the longest batch and return the memory of a step on it; see `memory`.

    Args:
        contender: Who takes the steps.
        device: Where.
        alone: Whether nothing else is on the device, so that all that is allocated is held by the contender.
    """

    step = last_step(contender)
    for _ in range(WARM_UP_STEPS):
        step()
    if alone and device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
    else:
        held = held_bytes(contender.model, contender.optimizer)
    growth = step_growth(step, device)
    return {"held": held, "step": growth, "peak": held + growth}


def _combine_ranks(contender: Contender, memory: dict[str, dict[str, int]], world: World) -> None:
    """Put the mean time of all ranks, the largest memory and the sum of tokens in place of this rank's. Collective."""
    own = (contender.rounds, contender.cpu_rounds, memory[contender.name], contender.padded_tokens)
    rounds, cpu_rounds, memories, tokens = zip(*gather_objects(own, world), strict=True)
    contender.rounds = [
        {phase: fmean(own[phase] for own in same_round) for phase in PHASES} for same_round in zip(*rounds, strict=True)
    ]
    contender.cpu_rounds = [fmean(same_round) for same_round in zip(*cpu_rounds, strict=True)]
    memory[contender.name] = max(memories, key=lambda own: own["peak"])
    contender.padded_tokens = sum(tokens)


def _figures(contender: Contender, work: Work, flops: ModelFlops, peak: float | None) -> dict[str, Any]:
    """Rates over the median round; `peak` is that of all devices, in FLOP/s."""
    seconds = contender.round_seconds
    typical = median(seconds)
    filled = work.tokens + contender.num_virtual_tokens * len(work.examples)
    needed = sum(flops.of_example(inputs + contender.num_virtual_tokens, labels) for inputs, labels in work.examples)
    return {
        "seconds_per_step": typical / len(contender.steps),
        "cpu_seconds_per_step": median(contender.cpu_rounds) / len(contender.steps),
        "examples_per_second": len(work.examples) / typical,
        "tokens_per_second": work.tokens / typical,
        "padded_tokens_per_second": contender.padded_tokens / typical,
        "padding_share": 1 - filled / contender.padded_tokens,
        "phase_shares": {phase: sum(own[phase] for own in contender.rounds) / sum(seconds) for phase in PHASES},
        "model_tflops_per_second": needed / typical / 1e12,
        "mfu": needed / typical / peak if peak else None,
        "round_seconds": seconds,
    }


def _ratio(ours: Contender, other: Contender) -> dict[str, float | None]:
    """Time of ADePT's step over the other's: median, least and most of the rounds', whose times belong together; and
    the median of CPU seconds."""
    ratios = [own / theirs for own, theirs in zip(ours.round_seconds, other.round_seconds, strict=True)]
    cpu = median(own / theirs for own, theirs in zip(ours.cpu_rounds, other.cpu_rounds, strict=True))
    spread = {"median": median(ratios), "least": min(ratios), "most": max(ratios)}
    return {**spread, "cpu": cpu, "goal": GOALS.get(other.name)}
