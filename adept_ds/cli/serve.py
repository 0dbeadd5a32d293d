"""Serve adapters of one backbone by stock vLLM, each as a model of an OpenAI server.

    adept-ds serve --base exports/llama3-base --adapters qa=exports/qa-lora chat=runs/chat/best
    adept-ds serve --base exports/llama3-base --folder exports/tasks --tensor-parallel-size 4 -- --enforce-eager

An adapter is a folder that `adept-ds export --to lora` wrote for this serving base, or one as training left it, which
is exported first. All is checked before vLLM is started. What stands behind `--` is handed to vLLM as it is.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from adept_ds.config.command_line import parse_count, parse_flags
from adept_ds.errors import UserError
from adept_ds.serving.adapters import (
    ServedAdapter,
    ServingBase,
    check_adapter,
    exported,
    is_trained,
    named_folders,
    read_base,
)
from adept_ds.serving.command import (
    Options,
    announcement,
    check_further,
    server_command,
    server_environment,
)
from adept_ds.serving.vllm_environment import find_vllm

PROGRAM = "adept-ds serve"
HANDED_ON = {
    "tensor_parallel_size": "GPUs that share the backbone",
    "max_model_len": "most tokens of a request, prompt and answer",
    "gpu_memory_utilization": "share of a GPU's memory",
    "max_num_seqs": "requests that are computed at once",
    "dtype": "precision, of the base and the adapters",
    "api_key": "what clients must show; VLLM_API_KEY in the environment is not seen in lists of processes",
}
"""Flags of vLLM that are given as here, and what they mean."""
SPARE = 8


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All arguments."""
    parser.add_argument("--base", type=Path, metavar="FOLDER", help="serving base, made by `adept-ds export`")
    parser.add_argument("--adapters", nargs="+", default=[], metavar="NAME=FOLDER", help="adapters and their names")
    parser.add_argument("--folder", type=Path, help="folder of exported adapters, each by its own folder's name")
    parser.add_argument("--base_name", default=Options.name, metavar="NAME", help="of the base (default: base)")
    parser.add_argument("--host", default=Options.host, help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=parse_count, default=Options.port, help="(default: 8000)")
    parser.add_argument("--python", metavar="PATH", help="interpreter that has vLLM (default: see docs/serving.md)")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="for exported adapters (default: beside each)")
    parser.add_argument("--max_loras", type=parse_count, metavar="N", help="adapters computed at once (default: fits)")
    parser.add_argument(
        "--max_lora_rank", type=parse_count, metavar="R", help="of adapters to be added (default: fits)"
    )
    parser.add_argument("--allow_runtime_updates", action="store_true", help="let clients add and remove adapters")
    parser.add_argument("--spare", type=parse_count, metavar="N", help=f"adapters to be added so (default: {SPARE})")
    for name, meaning in HANDED_ON.items():
        parser.add_argument(f"--{name}", metavar="X", help=f"vLLM's: {meaning}")


def main(arguments: Sequence[str]) -> None:
    """Check everything, and become vLLM."""
    own, further = list(arguments), []
    if "--" in own:
        at = own.index("--")
        own, further = own[:at], own[at + 1 :]
    flags = parse_flags(own, PROGRAM, __doc__ or "", add_flags)
    if flags.base is None:
        raise UserError("--base FOLDER is needed, made by `adept-ds export --serving-base --rows L --base MODEL`")
    if flags.spare is not None and not flags.allow_runtime_updates:
        raise UserError("--spare is for adapters that are added while the server runs: --allow-runtime-updates")
    options = Options(
        name=flags.base_name,
        host=flags.host,
        port=flags.port,
        slots=flags.max_loras,
        max_rank=flags.max_lora_rank,
        allow_runtime_updates=flags.allow_runtime_updates,
        spare=(flags.spare or SPARE) if flags.allow_runtime_updates else 0,
        further=[*_handed_on(flags), *further],
    )
    environment = find_vllm(flags.python)
    base = read_base(flags.base)
    adapters = _adapters(flags, base, options, further)
    command = server_command(environment, base, adapters, options)
    variables = server_environment(environment, base, adapters, options)
    print(announcement(adapters, options))
    print(f"vLLM {environment}")
    sys.stdout.flush()
    os.execve(command[0], command, variables)


def _handed_on(flags: argparse.Namespace) -> list[str]:
    given = {name: getattr(flags, name) for name in HANDED_ON}
    return [word for name, value in given.items() if value for word in (f"--{name.replace('_', '-')}", value)]


def _adapters(
    flags: argparse.Namespace, base: ServingBase, options: Options, further: Sequence[str]
) -> list[ServedAdapter]:
    """All adapters, or all that is wrong with them."""
    folders, problems, skipped = named_folders(flags.adapters, flags.folder)
    problems += check_further(further)
    trained = {name: folder for name, folder in folders.items() if is_trained(folder)}
    if options.name in folders:
        problems.append(f"adapter {options.name!r}: so is the base called; choose another name for it by --base-name")
    adapters = []
    for name, folder in folders.items():
        if name not in trained:
            try:
                adapters.append(check_adapter(name, folder, base))
            except UserError as error:
                problems.append(f"adapter {name!r}, {folder}: {error}")
    if not folders and not problems:
        problems.append("no adapter: expected --adapters NAME=FOLDER, or --folder FOLDER with exported ones in it")
    if problems:  # ahead of exports, which take their time
        raise UserError("\n".join(problems))
    for name, folder in trained.items():
        try:
            adapters.append(check_adapter(name, exported(folder, base, flags.cache), base))
        except UserError as error:
            problems.append(f"adapter {name!r}, {folder}: {error}; `adept-ds export --to lora` can be told more")
    if problems:
        raise UserError("\n".join(problems))
    if skipped:
        print(f"{flags.folder}: not served, since no export --to lora: {', '.join(skipped)}")
    return adapters
