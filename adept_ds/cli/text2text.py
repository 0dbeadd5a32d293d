"""Generate answers to text-to-text tasks and score them by each task's metrics.

    adept-ds text2text --config t5_base --adapter runs/t5_base/best --out results/adept
    adept-ds text2text --config t5_base --task cola mrpc --out results/base
    adept-ds text2text --config t5_base --task cola mrpc --adapters cola=runs/cola/best mrpc=runs/mrpc/best --out all

Decodes on every rank's own copy of the backbone, or on one that --eval.sharding zero3 splits over all ranks; without
--adapter it evaluates the backbone alone. The tasks are those of the config's data.tasks, or of --task. A folder
OUT/TASK then holds predictions.jsonl and summary.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from adept_ds.cli.local_ranks import add_ranks_flag, run_ranks, starts_ranks
from adept_ds.config.command_line import parse_command_line
from adept_ds.config.run import DataConfig, RunConfig
from adept_ds.errors import UserError
from adept_ds.serving.adapters import named_folders


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags beside --config and the settings."""
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where predictions and scores go")
    parser.add_argument(
        "--adapter",
        type=Path,
        metavar="FOLDER",
        help="adapter (hub id too), or fully tuned model, to evaluate (default: the backbone alone)",
    )
    parser.add_argument(
        "--adapters",
        nargs="+",
        metavar="TASK=FOLDER",
        help="an adapter for each task, all on one backbone that is loaded once, in place of --adapter",
    )
    parser.add_argument("--task", nargs="+", metavar="TASK", help="tasks to evaluate (default: data.tasks)")
    parser.add_argument(
        "--split",
        default="test",
        choices=("train", "validation", "test"),
        help="examples that count (default: test)",
    )
    add_ranks_flag(parser)


def with_tasks(run: RunConfig, tasks: Sequence[str] | None) -> RunConfig:
    """Return the run with other tasks; the settings that tasks share stay. UserError if there is none at all."""
    if tasks is None and not run.data.tasks:
        raise UserError("--task TASK is needed, since the config's data.format is " + run.data.format)
    if tasks is None:
        return run
    shared = run.data.model_dump() if run.data.tasks else {"format": "tasks"}
    return run.model_copy(update={"data": DataConfig.model_validate({**shared, "tasks": tuple(tasks)})})


def _adapters(flags: argparse.Namespace) -> dict[str, Path]:
    """The adapter of each task, as --adapters names them."""
    if flags.adapters and flags.adapter:
        raise UserError("--adapters gives each task its own adapter, --adapter one to all; expected one of the two")
    folders, problems, _ = named_folders(flags.adapters or (), None)
    if problems:
        raise UserError("\n".join(problems))
    return folders


def main(arguments: Sequence[str]) -> int | None:
    """Parse, check, evaluate."""
    flags, loaded = parse_command_line(arguments, "adept-ds text2text", __doc__ or "", add_flags)
    if flags.out is None:
        raise UserError("--out FOLDER is needed, for example results/rte")
    run = with_tasks(loaded.run, flags.task)
    adapters = _adapters(flags)
    if starts_ranks(flags):
        return run_ranks(flags.ranks, "text2text", arguments)
    # The libraries behind this take seconds to load; a mistake on the command line is told before.
    from adept_ds.evaluation.text2text import evaluate_tasks

    evaluate_tasks(run, flags.adapter, flags.out, flags.split, adapters)
    return None
