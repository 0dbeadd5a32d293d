"""Speed and memory of training steps beside HF PEFT's methods and the bare backbone, in one run.

    adept-ds throughput --config smollm2_135m --against peft --data.path mbpp.jsonl --out FILE
    adept-ds throughput --config llama3_8b --against peft --random-init --synthetic 512
    adept-ds throughput --config t5_3b --against peft --random-init --synthetic 512
    adept-ds throughput --config llama3_8b --random-init --synthetic 512 --ranks 8
    adept-ds throughput --config smollm2_135m --random-init --synthetic 60 90 400 --train.packing 1024
    adept-ds throughput --config llama3_8b --random-init --synthetic 512 --against plain by-weight \\
        --train.sharding global

Prints tables, and writes the same with every round's time as JSON with --out. The bare backbone (forward and gradient
of the input, no method, no optimizer) is measured always. On ranks adept_ds is measured in DeepSpeed's engine with
the config's sharding; the last line shows what ZeRO-3 costs beside plain torch, by layers as training has it and
by weights as DeepSpeed has it. See `adept_ds.benchmark` for what is compared and how. With --random-init and
--synthetic neither weights nor data nor tokenizer are needed; add --model.quantization nf4 for a 4-bit backbone. With
train.packing the same examples in packed rows are measured beside rows of one example each. Close everything else that
runs on the machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from adept_ds.cli.local_ranks import add_ranks_flag, run_ranks, starts_ranks
from adept_ds.config.command_line import launcher_world_size, parse_command_line, parse_count
from adept_ds.files import atomic_write
from adept_ds.rank_environment import is_main_rank

AGAINST = ("peft", "peft-prompt-tuning", "peft-lora", "peft-padded")
AGAINST_ON_RANKS = ("plain", "by-weight")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's own flags."""
    parser.add_argument(
        "--against",
        nargs="+",
        choices=AGAINST + AGAINST_ON_RANKS,
        default=[],
        help="measure these too: PEFT's prompt tuning and LoRA (peft), one of them, or prompt tuning on rows padded to "
        "the maximum that the data section allows (peft-padded); in DeepSpeed's engine, on one rank or more: adept_ds "
        "without DeepSpeed (plain) and with DeepSpeed's own gathers (by-weight)",
    )
    parser.add_argument("--steps", type=parse_count, default=8, metavar="N", help="steps a round (default: 8)")
    parser.add_argument(
        "--rounds", type=parse_count, default=5, metavar="N", help="rounds after the warm-up (default: 5)"
    )
    parser.add_argument(
        "--random_init", action="store_true", help="random weights of the model's architecture, no checkpoint"
    )
    parser.add_argument(
        "--synthetic",
        type=parse_count,
        nargs="+",
        default=[],
        metavar="LENGTH",
        help="examples of so many random tokens, of several lengths in turn; no data and no tokenizer",
    )
    parser.add_argument(
        "--cpu_seconds", action="store_true", help="on a CPU that does other work too: the process's own seconds"
    )
    parser.add_argument("--out", metavar="FILE", help="write the figures to this JSON file too")
    add_ranks_flag(parser)


def main(arguments: Sequence[str]) -> int | None:
    """Parse, measure, report."""
    flags, loaded = parse_command_line(arguments, "adept-ds throughput", __doc__ or "", add_flags)
    if starts_ranks(flags):
        return run_ranks(flags.ranks, "throughput", arguments)
    # The libraries behind this take seconds to load; a mistake in the config is told before.
    from adept_ds.benchmark import Options, benchmark, text_report

    options = Options(
        steps=flags.steps,
        rounds=flags.rounds,
        against=tuple(flags.against),
        random_init=flags.random_init,
        synthetic=tuple(flags.synthetic),
        cpu_seconds=flags.cpu_seconds,
        # The deepspeed launcher names each process's rank on its command line, a single one's too.
        on_ranks=flags.local_rank is not None
        or launcher_world_size() > 1
        or not set(AGAINST_ON_RANKS).isdisjoint(flags.against),
    )
    result = benchmark(loaded.run, options)
    if not is_main_rank():
        return None
    print(text_report(result))
    if flags.out:
        with atomic_write(flags.out) as file:
            json.dump(result, file, indent=2)
    return None
