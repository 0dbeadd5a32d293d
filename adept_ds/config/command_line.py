"""The command line of an entry point that takes a config file: flags, `--section.key VALUE` overrides, help."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from textwrap import fill
from typing import NoReturn

from adept_ds.config.batch import batch_arithmetic
from adept_ds.config.loader import LoadedConfig, flatten, load_config, resolved_json
from adept_ds.config.schema import Setting, declared_settings, method_docs, section_docs, unknown_key_message
from adept_ds.errors import UserError, did_you_mean


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists all flags)")


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--dry_run`, `--world_size` and `--resume`."""
    parser.add_argument("--dry_run", action="store_true", help="say what the run would do, without weights, and end")
    parser.add_argument(
        "--resume",
        default="never",
        metavar="auto|never|FOLDER",
        help="checkpoint to start from; auto: the newest complete one of the run folder, if any (default: never)",
    )
    parser.add_argument(
        "--world_size",
        type=parse_count,
        default=launcher_world_size(),
        metavar="N",
        help="ranks to plan for in --dry_run (default: those of the launcher, or 1)",
    )


def parse_command_line(
    arguments: Sequence[str],
    program: str,
    description: str,
    add_flags: Callable[[argparse.ArgumentParser], object] = add_training_flags,
    check: Callable[[argparse.Namespace], object] = lambda flags: None,
) -> tuple[argparse.Namespace, LoadedConfig]:
    """Parse `arguments`, load the config file that they name, and apply their overrides.

    `--help` and `--print_config` print and end the program. Flags and keys may be written with dashes or underscores.

    Args:
        arguments: `sys.argv[1:]`.
        program: What is typed to run it, for the help.
        description: What it does, for the help.
        add_flags: Adds the entry point's own flags to the parser, with underscores in their names.
        check: Checks those flags; its `UserError` is told together with the config's problems.

    Returns:
        The flags and the config.

    Raises:
        UserError: All problems of flags, file and overrides.
    """
    parser = _Parser(
        prog=program,
        usage=f"{program} --config FILE [--section.key VALUE ...] [flags]",
        add_help=False,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="JSON file with the settings of the run")
    parser.add_argument("--help", "-h", action="store_true", help="print this help")
    parser.add_argument(
        "--print_config",
        nargs="?",
        const="json",
        choices=("json", "sources"),
        help="print the resolved settings and end: as JSON (default), or one a line with where each came from",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    add_flags(parser)

    flags, rest = parser.parse_known_args([_with_underscores(argument) for argument in arguments])
    if flags.help:
        print(parser.format_help() + "\n" + settings_help(), end="")
        raise SystemExit(0)
    overrides, problems = _overrides(rest, [f"--{name}" for name in vars(flags)])
    if flags.config is None:
        problems.append("--config FILE is needed, for example ds_configs/llama3_8b.json")
        raise UserError("\n".join(problems))
    try:
        check(flags)
    except UserError as error:
        problems.append(str(error))
    try:
        loaded = load_config(flags.config, overrides)
    except UserError as error:
        raise UserError("\n".join([*problems, str(error)])) from None
    if problems:
        raise UserError("\n".join(problems))
    if flags.print_config:
        as_json = flags.print_config == "json"
        print(resolved_json(loaded.run) if as_json else sources_text(loaded, launcher_world_size()), end="")
        raise SystemExit(0)
    return flags, loaded


def parse_flags(
    arguments: Sequence[str], program: str, description: str, add_flags: Callable[[argparse.ArgumentParser], object]
) -> argparse.Namespace:
    """Parse the flags of an entry point that reads no config file. Dashes and underscores are the same.

    Raises:
        UserError: A flag is unknown, or its value is not what it takes.
    """
    parser = _Parser(
        prog=program,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(parser)
    flags, rest = parser.parse_known_args([_with_underscores(argument) for argument in arguments])
    if rest:
        near = did_you_mean(rest[0], [f"--{name}" for name in vars(flags)])
        raise UserError(f"{rest[0]}: unknown flag{near}")
    return flags


def launcher_world_size() -> int:
    """Number of ranks that the launcher has set, or 1."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def parse_count(text: str) -> int:
    """Read the value of a flag that takes a number of things: an integer >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer >= 1")
    return int(text)


def settings_help() -> str:
    """Every setting by section, those of each method apart, from its declaration: type, default, meaning."""
    lines = ["settings, in the config file or as --section.key VALUE (read as JSON, else as a string):"]
    section = None
    for setting in declared_settings().values():
        parent = setting.key.rpartition(".")[0]
        if parent == "method" and setting.key != "method.name":
            continue
        if parent != section:
            section = parent
            lines += ["", f"{section}: {section_docs()[section]}" if section else "top level"]
        lines += _setting_help(setting)
        if setting.key == "method.name":
            for name, doc in method_docs().items():
                own = [other for key, other in declared_settings(name).items() if key.startswith("method.")]
                lines += ["", fill(f"method {name}: {doc}", 118, break_on_hyphens=False)]
                lines += [line for other in own if other.key != setting.key for line in _setting_help(other)]
    return "\n".join(lines) + "\n"


def _setting_help(setting: Setting) -> list[str]:
    default = "required" if setting.required else f"default {json.dumps(setting.default)}"
    doc = fill(setting.doc, 110, initial_indent=" " * 8, subsequent_indent=" " * 8, break_on_hyphens=False)
    return [f"  --{setting.key}  {setting.type}, {default}", doc]


def sources_text(loaded: LoadedConfig, world_size: int) -> str:
    """One line a value: `key = value  (source)`. Sizes that follow from the batch arithmetic are shown filled in."""
    values = flatten(loaded.run.model_dump(mode="json", by_alias=True))
    sources = dict(loaded.sources)
    batch = batch_arithmetic(loaded.run.train, world_size)
    for name in ("micro_batch_size", "gradient_accumulation_steps"):
        if values[f"train.{name}"] is None:
            values[f"train.{name}"] = getattr(batch, name)
            sources[f"train.{name}"] = f"derived for world size {world_size}"
    return "".join(f"{key} = {json.dumps(value)}  ({sources[key]})\n" for key, value in values.items())


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


def _overrides(arguments: Sequence[str], flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """Turn what is left of the command line into `key=value` overrides and problems."""
    overrides, problems = [], []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            problems.append(f"{argument}: unexpected; settings are given as --section.key VALUE")
            continue
        has_value = bool(equals) or (bool(waiting) and not waiting[0].startswith("--"))
        if not equals and has_value:
            value = waiting.pop(0)
        if "." not in name and name not in section_docs() and name not in declared_settings():
            near = did_you_mean(f"--{name}", flags)
            problems.append(f"--{name}: unknown flag{near or f' ({unknown_key_message(name)})'}")
        elif not has_value:
            problems.append(f"--{name}: expected a value behind it")
        else:
            overrides.append(f"{name}={value}")
    return overrides, problems
