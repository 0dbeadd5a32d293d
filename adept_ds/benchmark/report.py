"""The benchmark's figures as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from adept_ds.benchmark.phases import PHASES

GIB = 2**30
_NAME = 43


def text_report(result: dict[str, Any]) -> str:
    """Return the figures of `benchmark` as tables."""
    return "\n".join(_lines(result))


def _lines(result: dict[str, Any]) -> Iterator[str]:
    machine = ", ".join(
        f"{value}" if name == "device" else f"{name} {value}" for name, value in result["machine"].items()
    )
    precision = " ".join(filter(None, (result["dtype"], result["quantization"])))
    weights = ", random weights" if result["random_init"] else ""
    place = "one process, plain torch"
    if result["zero_stage"] is not None:
        place = f"{result['ranks']} ranks under DeepSpeed, ZeRO stage {result['zero_stage']}"
    data = "random tokens" if result["synthetic"] else "examples"
    checkpointing = "on" if result["activation_checkpointing"] else "off"
    yield f"training of {result['model']} in {precision}{weights}; {place}"
    yield f"machine: {machine}"
    yield (
        f"a round: {result['steps']} steps of {result['batch_size']} {data} ({result['micro_batches']} micro-batches a "
        f"rank), {result['tokens'] / result['examples']:.0f} tokens each on average, "
        f"{result['label_tokens'] / result['examples']:.0f} of them with labels"
    )
    yield f"{result['num_virtual_tokens']} soft-prompt tokens; activation checkpointing {checkpointing}"
    if result["cpu_seconds"]:
        yield "times are seconds of the processor, not of the wall"
    yield ""
    yield (
        f"{'':{_NAME}}{'examples/s':>11}{'tokens/s':>10}{'with padding':>14}{'padding':>9}{'s/step':>9}"
        f"{'TFLOP/s':>9}{'MFU':>7}{'peak GiB':>10}{'= held':>8}{'+ step':>8}"
    )
    for name, own in result["contenders"].items():
        memory = {part: size / GIB for part, size in own["memory_bytes"].items()}
        mfu = "-" if own["mfu"] is None else f"{own['mfu']:.1%}"
        yield (
            f"{name:{_NAME}}{own['examples_per_second']:11.3f}{own['tokens_per_second']:10.1f}"
            f"{own['padded_tokens_per_second']:14.1f}{own['padding_share']:9.1%}{own['seconds_per_step']:9.3f}"
            f"{own['model_tflops_per_second']:9.3f}{mfu:>7}"
            f"{memory['peak']:10.3f}{memory['held']:8.3f}{memory['step']:8.3f}"
        )
    yield ""
    yield f"{'of a step':{_NAME}}{'CPU s':>10}{'collectives':>13}{'gathered GiB':>14}"
    for name, own in result["contenders"].items():
        gathered = own["gathered_bytes"] / GIB
        yield f"{name:{_NAME}}{own['cpu_seconds_per_step']:10.4f}{own['collectives']:13}{gathered:14.4f}"
    yield ""
    yield f"{'share of the time':{_NAME}}" + "".join(f"{phase:>10}" for phase in PHASES)
    for name, own in result["contenders"].items():
        yield f"{name:{_NAME}}" + "".join(f"{own['phase_shares'][phase]:10.1%}" for phase in PHASES)
    if result["ratios"]:
        yield ""
        yield "time of adept_ds's step over that of"
        for name, ratio in result["ratios"].items():
            spread = f"{ratio['median']:.3f} ({ratio['least']:.3f} to {ratio['most']:.3f})"
            yield f"  {name:{_NAME}}{spread}, CPU {ratio['cpu']:.3f}{_goal(ratio)}"
    rounds = len(next(iter(result["contenders"].values()))["round_seconds"])
    yield f"rates and ratios: median of {rounds} rounds; in brackets the least and the most"
    if result["operator_seconds"]:
        total = sum(result["operator_seconds"].values())
        yield ""
        yield "where adept_ds spends a step, forward and backward together, profiled:"
        for group, own in result["operator_seconds"].items():
            yield f"  {group:{_NAME}}{own * 1e3:10.1f} ms{own / total:8.1%}"
    for note in result["notes"]:
        yield f"note: {note}"


def _goal(ratio: dict[str, float | None]) -> str:
    if ratio["goal"] is None or ratio["median"] is None:
        return ""
    return f"   goal: at most {ratio['goal']:.3g}, {'met' if ratio['median'] <= ratio['goal'] else 'missed'}"
