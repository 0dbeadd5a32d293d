"""The paper's analyses of trained adapters.

    adept-ds analyse sizes --config t5_base --adapter runs/rte/best             # table 2
    adept-ds analyse speed --config t5_base --data.tasks '["sst2"]' --adapter A B  # table 8
    adept-ds analyse variant --adapter runs/dept/best --set cyclic_shift=50 --out runs/dept/shift50   # table 1
    adept-ds analyse power runs/pt_* runs/adept_*        # how many runs and problems would decide between methods

`sizes` gives mean and variance of |element| of input embeddings and of the offsets that an adapter adds, over the
tokens of the training set. `speed` gives test examples per second of each adapter and of the backbone alone, on the
first of data.tasks. `variant` writes an adapter with other settings and the same weights: evaluated by
`adept-ds text2text` into eval/ of its run folder, it stands in its place in the tables of `adept-ds report`. `power`
needs finished runs of each method with two seeds or more, and their evaluations.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from adept_ds.config.command_line import parse_command_line, parse_count, parse_flags
from adept_ds.errors import UserError, did_you_mean

PROGRAM = "adept-ds analyse"


def add_sizes_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `sizes`."""
    parser.add_argument("--adapter", nargs="+", type=Path, metavar="FOLDER", help="adapters to measure")


def add_speed_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `speed`."""
    parser.add_argument("--adapter", nargs="*", type=Path, default=[], metavar="FOLDER", help="adapters to measure")
    parser.add_argument("--rounds", type=int, default=3, help="timed passes over the examples (default: 3)")


def add_variant_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `variant`."""
    parser.add_argument("--adapter", type=Path, required=True, metavar="FOLDER", help="adapter to take the weights of")
    parser.add_argument("--set", nargs="+", required=True, metavar="KEY=VALUE", help="settings of its method")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the new adapter")


def add_power_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `power`."""
    parser.add_argument("run_dir", nargs="+", type=Path, help="run folders, two of each method or more")
    parser.add_argument("--goal", type=float, default=0.8, metavar="SHARE", help="how often it is to be decided (0.8)")
    parser.add_argument("--seeds", nargs="+", type=parse_count, default=(), metavar="N", help="numbers of runs to try")
    parser.add_argument("--problems", nargs="+", type=parse_count, default=(), metavar="N", help="of problems")


def sizes(arguments: Sequence[str]) -> None:
    """Print table 2."""
    flags, loaded = parse_command_line(arguments, f"{PROGRAM} sizes", __doc__ or "", add_sizes_flags)
    if not flags.adapter:
        raise UserError("--adapter FOLDER is needed, for example runs/t5_base/best")
    from adept_ds.data.encode import EncodedDataset
    from adept_ds.data.problems import load_examples
    from adept_ds.distributed import init_world
    from adept_ds.evaluation.analysis import embedding_sizes
    from adept_ds.evaluation.tuned import load_tuned

    run, world = loaded.run, init_world()
    examples = load_examples(run.data, "train")
    print(f"{'':40}{'mean':>12}{'variance':>12}")
    for number, folder in enumerate(flags.adapter):
        model, tokenizer = load_tuned(run.model, folder, world)
        encoded = EncodedDataset(examples, tokenizer, run.data, model.num_virtual_tokens, model.is_encoder_decoder)
        plain, offsets = embedding_sizes(model, encoded, tokenizer.pad_token_id, world.device)
        if number == 0:
            print(f"{'input embeddings':40}{plain.mean:12.4f}{plain.variance:12.4f}")
        print(f"{f'offsets of {folder}':40}{offsets.mean:12.4f}{offsets.variance:12.4f}")


def speed(arguments: Sequence[str]) -> None:
    """Print table 8's examples per second."""
    flags, loaded = parse_command_line(arguments, f"{PROGRAM} speed", __doc__ or "", add_speed_flags)
    from statistics import median

    from adept_ds.data.tasks import load_task_examples
    from adept_ds.distributed import init_world
    from adept_ds.evaluation.analysis import samples_per_second
    from adept_ds.evaluation.tuned import load_tuned

    run = loaded.run
    if not run.data.tasks:
        raise UserError(f"data.format is {run.data.format!r}; speed is measured on a text-to-text task (data.tasks)")
    examples = load_task_examples(run.data, "test").by_task()[0][: run.eval.max_examples]
    world = init_world()
    for folder in [None, *flags.adapter]:
        model, tokenizer = load_tuned(run.model, folder, world)
        rates = samples_per_second(model, tokenizer, examples, run, world, flags.rounds)
        if world.is_main:
            span = f"{min(rates):.1f} to {max(rates):.1f} over {len(rates)} rounds"
            print(f"{folder or 'backbone alone'}: {median(rates):.1f} examples/s ({span}, {len(examples)} examples)")


def variant(arguments: Sequence[str]) -> None:
    """Write an adapter with other settings."""
    flags = parse_flags(arguments, f"{PROGRAM} variant", __doc__ or "", add_variant_flags)
    from adept_ds.evaluation.analysis import write_variant

    write_variant(flags.adapter, flags.set, flags.out)
    print(f"written: {flags.out}")


def power(arguments: Sequence[str]) -> None:
    """Print how often experiments of several sizes would tell methods apart."""
    flags = parse_flags(arguments, f"{PROGRAM} power", __doc__ or "", add_power_flags)
    if not 0 < flags.goal < 1:
        raise UserError(f"--goal {flags.goal}: expected a share between 0 and 1")
    from adept_ds.reports.power_report import power_text

    print(power_text(flags.run_dir, flags.goal, flags.seeds, flags.problems))


ANALYSES = {"sizes": sizes, "speed": speed, "variant": variant, "power": power}


def main(arguments: Sequence[str]) -> None:
    """Hand over to the analysis that the first word names."""
    name, *rest = arguments or ["--help"]
    if name in ("--help", "-h"):
        print(__doc__)
        return
    if name not in ANALYSES:
        raise UserError(f"{name}: expected one of {', '.join(ANALYSES)}{did_you_mean(name, ANALYSES)}")
    ANALYSES[name](rest)
