"""Fine-tune a language model with ADePT under DeepSpeed.

    adept-ds train --model HuggingFaceTB/SmolLM2-135M-Instruct --data my.jsonl
    adept-ds train --config llama3_8b --ranks 4
    adept-ds train --config my.json --train.learning_rate.soft_prompt 3e-3 --resume auto
    adept-ds train --config llama3_8b --dry-run
    deepspeed launchers/train.py --config ds_configs/llama3_8b.json

The first form chooses settings that suit the model, the rows and the machine, and says which; --print_config shows them
all, as a config file to start from. Any of them can be given as --section.key VALUE.

A run that SIGTERM, SIGUSR1, SIGHUP or Ctrl-C stops is saved and ends with status 0; status.json in its folder says
"interrupted", and --resume auto goes on with it. A second signal ends it at once. Status 2 is a mistake in the
settings, told in the last lines.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from adept_ds.cli.local_ranks import add_ranks_flag, run_ranks, starts_ranks
from adept_ds.config.command_line import add_training_flags, parse_command_line
from adept_ds.errors import UserError
from adept_ds.rank_environment import is_main_rank
from adept_ds.training.stopping import StopRequest


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags beside --config and the settings."""
    parser.add_argument("--model", metavar="MODEL", help="hub id or folder of the backbone, instead of --config")
    parser.add_argument(
        "--data", metavar="DATA", help="your rows: JSON lines, JSON, CSV, TSV or Parquet, a folder, or a hub data set"
    )
    add_training_flags(parser)
    add_ranks_flag(parser)


def check(flags: argparse.Namespace) -> None:
    """Refuse a --config beside --model and --data, as `UserError`."""
    if flags.config and (flags.model or flags.data):
        raise UserError(
            "--model and --data stand for a config; beside --config give --model.name_or_path, --data.format own and "
            "--data.path"
        )


def own_settings(flags: argparse.Namespace, overrides: Sequence[str]) -> Mapping[str, Any] | None:
    """Settings that suit --model and --data; None without them.

    Raises:
        UserError: One of the two is missing, or they are not what they should be.
    """
    if flags.model is None and flags.data is None:
        return None
    if flags.model is None or flags.data is None:
        raise UserError("--model and --data go together: the backbone, and the rows to train it on")
    from adept_ds.data.defaults import settings_for_own_data

    starts = starts_ranks(flags)
    chosen = settings_for_own_data(flags.model, flags.data, overrides, flags.ranks if starts else flags.world_size)
    if is_main_rank() and not starts:
        # What --print_config prints is to be a file.
        print("\n".join(chosen.reasons), file=sys.stderr if flags.print_config else sys.stdout)
    return chosen.settings


def main(arguments: Sequence[str]) -> int | None:
    """Parse, check, and start."""
    flags, loaded = parse_command_line(
        arguments, "adept-ds train", __doc__ or "", add_flags, check, without_config=own_settings
    )
    # The libraries behind these take seconds to load; a mistake in the config is told before.
    if flags.dry_run:
        from adept_ds.planner.dry_run import dry_run

        if is_main_rank():
            print(dry_run(loaded, flags.world_size))
        return None
    if starts_ranks(flags):
        return run_ranks(flags.ranks, "train", arguments)
    stop = StopRequest()
    from adept_ds.training.recipe import train

    train(loaded.run, flags.resume, stop)
    return None
