"""Fine-tune a language model with ADePT under DeepSpeed.

    adept-ds train --config llama3_8b --ranks 4
    adept-ds train --config my.json --train.learning_rate.soft_prompt 3e-3 --resume auto
    adept-ds train --config llama3_8b --dry-run
    deepspeed launchers/train.py --config ds_configs/llama3_8b.json

A run that SIGTERM, SIGUSR1 or Ctrl-C stops is saved and ends with status 0; status.json in its folder says
"interrupted", and --resume auto goes on with it. Status 2 is a mistake in the settings, told in the last lines.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from adept_ds.cli.local_ranks import add_ranks_flag, run_ranks, starts_ranks
from adept_ds.config.command_line import add_training_flags, parse_command_line
from adept_ds.rank_environment import is_main_rank


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags beside --config and the settings."""
    add_training_flags(parser)
    add_ranks_flag(parser)


def main(arguments: Sequence[str]) -> int | None:
    """Parse, check, and start."""
    flags, loaded = parse_command_line(arguments, "adept-ds train", __doc__ or "", add_flags)
    # The libraries behind these take seconds to load; a mistake in the config is told before.
    if flags.dry_run:
        from adept_ds.planner.dry_run import dry_run

        if is_main_rank():
            print(dry_run(loaded, flags.world_size))
        return None
    if starts_ranks(flags):
        return run_ranks(flags.ranks, "train", arguments)
    from adept_ds.training.recipe import train

    train(loaded.run, flags.resume)
    return None
