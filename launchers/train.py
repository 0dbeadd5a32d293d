"""Fine-tune a language model with ADePT under DeepSpeed.

    deepspeed launchers/train.py --config ds_configs/llama3_8b.json
    deepspeed launchers/train.py --config ds_configs/llama3_8b.json --train.learning_rate.soft_prompt 3e-3
    python launchers/train.py --config ds_configs/llama3_8b.json --dry-run

A run that SIGTERM, SIGUSR1 or Ctrl-C stops is saved and ends with status 0; status.json in its folder says
"interrupted", and --resume auto goes on with it. Status 2 is a mistake in the settings, told in the last lines.
"""

from __future__ import annotations

from collections.abc import Sequence

from adept_ds.config.command_line import parse_command_line
from adept_ds.entry_point import run_entry_point
from adept_ds.rank_environment import is_main_rank


def main(arguments: Sequence[str]) -> None:
    """Parse, check, and start."""
    flags, loaded = parse_command_line(arguments, "deepspeed launchers/train.py", __doc__ or "")
    # The libraries behind these take seconds to load; a mistake in the config is told before.
    if flags.dry_run:
        from adept_ds.planner.dry_run import dry_run

        if is_main_rank():
            print(dry_run(loaded, flags.world_size))
        return
    from adept_ds.training.recipe import train

    train(loaded.run, flags.resume)


if __name__ == "__main__":
    run_entry_point(main)
