"""The command line of an entry point that takes a config file: flags, `--section.key VALUE` overrides, help."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from textwrap import fill
from types import MappingProxyType
from typing import Any, NoReturn

import argcomplete

from adept_ds.config.batch import batch_arithmetic
from adept_ds.config.loader import LoadedConfig, flatten, load_config, load_values, resolved_json
from adept_ds.config.recipes import config_path
from adept_ds.config.schema import Setting, declared_settings, method_docs, section_docs, unknown_key_message
from adept_ds.errors import UserError, did_you_mean

FITTED = "chosen for this model and data"
"""Source of settings that no file holds."""
FLAGS, ALL = "flags", "all"
"""What `--help` shows without a section, and with every one."""


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
    own_help: Mapping[str, Callable[[], str]] = MappingProxyType({}),
    without_config: Callable[[argparse.Namespace, Sequence[str]], Mapping[str, Any] | None] = lambda flags, overrides: (
        None
    ),
) -> tuple[argparse.Namespace, LoadedConfig]:
    """Parse `arguments`, load the config file that they name, and apply their overrides.

    `--help` and `--print_config` print and end the program. Flags and keys may be written with dashes or underscores.
    `--config` takes a file, or the name of a config that ships with the package.

    Args:
        arguments: `sys.argv[1:]`.
        program: What is typed to run it, for the help.
        description: What it does, for the help.
        add_flags: Adds the entry point's own flags to the parser, with underscores in their names.
        check: Checks those flags; its `UserError` is told together with the config's problems.
        own_help: What `--help` takes beside the sections of settings, and what it then shows.
        without_config: Gives the settings where there is no --config, from the flags and the overrides; None if they
            do not say enough for that.

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
    parser.add_argument("--config", metavar="FILE", help="JSON file with the settings, or the name of a shipped one")
    parser.add_argument(
        "--help",
        "-h",
        nargs="?",
        const=FLAGS,
        metavar="SECTION",
        help=f"print this help, or that of the settings of a section: {', '.join([*own_help, *help_sections()])}",
    )
    parser.add_argument(
        "--print_config",
        nargs="?",
        const="json",
        choices=("json", "sources"),
        help="print the resolved settings and end: as JSON (default), or one a line with where each came from",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    add_flags(parser)
    if is_completing():
        for setting in declared_settings().values():
            parser.add_argument(f"--{setting.key}", choices=setting.choices or None, help=setting.doc)
        argcomplete.autocomplete(parser)

    flags, rest = parser.parse_known_args([_with_underscores(argument) for argument in arguments])
    if flags.help:
        own = {FLAGS: parser.format_help, **own_help}.get(flags.help)
        print(own() if own else settings_help(flags.help), end="")
        raise SystemExit(0)
    overrides, problems = _overrides(rest, [f"--{name}" for name in vars(flags)])
    values = without_config(flags, overrides) if flags.config is None and not problems else None
    if flags.config is None and values is None:
        problems.append("--config FILE is needed, for example llama3_8b (`adept-ds recipes` lists those that ship)")
        raise UserError("\n".join(problems))
    try:
        check(flags)
    except UserError as error:
        problems.append(str(error))
    try:
        if values is None:
            loaded = load_config(config_path(flags.config), overrides)
        else:
            loaded = load_values(values, FITTED, overrides)
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
    if is_completing():
        argcomplete.autocomplete(parser)
    flags, rest = parser.parse_known_args([_with_underscores(argument) for argument in arguments])
    if rest:
        raise UserError(_unexpected(rest[0], vars(flags), " ".join(parser.format_usage().split())))
    return flags


def _unexpected(word: str, names: Iterable[str], usage: str) -> str:
    """Say what is wrong with a word that no argument takes, of those with these names."""
    flags = re.findall(r"--\w+", usage)
    without_flag = [name for name in names if f"--{name}" not in flags]
    name = word.partition("=")[0]
    if not word.startswith("-"):
        return f"{word}: unexpected; expected {'no more than that before it' if without_flag else 'flags'} (see --help)"
    if name.lstrip("-") in without_flag:
        return f"{name}: unknown flag; it is told without one: {usage}"
    return f"{word}: unknown flag{did_you_mean(name, flags)}"


def is_completing() -> bool:
    """Whether a shell asks for completions: then flags are told to it instead of being parsed."""
    return "_ARGCOMPLETE" in os.environ


def launcher_world_size() -> int:
    """Number of ranks that the launcher has set, or 1."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def parse_count(text: str) -> int:
    """Read the value of a flag that takes a number of things: an integer >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer >= 1")
    return int(text)


def help_sections() -> list[str]:
    """What `--help` takes: sections whose settings it then documents, and `all`."""
    sections = dict.fromkeys(key.partition(".")[0] for key in declared_settings())
    return [*(name for name in sections if not name.startswith("_")), ALL]


def settings_help(section: str = ALL) -> str:
    """The settings of a section, those of each method apart, from their declaration: type, default, meaning.

    Raises:
        UserError: There is no such section.
    """
    if section not in help_sections():
        raise UserError(
            f"--help {section}: expected one of {', '.join(help_sections())}{did_you_mean(section, help_sections())}"
        )
    lines = ["settings, in the config file or as --section.key VALUE (read as JSON, else as a string):"]
    last = None
    for setting in declared_settings().values():
        parent = setting.key.rpartition(".")[0]
        if section not in (ALL, setting.key.partition(".")[0]) or (parent == "method" and setting.key != "method.name"):
            continue
        if parent != last:
            last = parent
            lines += ["", f"{last}: {section_docs()[last]}" if last else "top level"]
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
