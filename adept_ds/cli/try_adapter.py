"""Decode a prompt with and without an adapter, side by side, to see what was learnt.

    adept-ds try --adapter runs/my/best "Write a haiku about sharding."
    adept-ds try --adapter runs/my/best < prompt.txt
    adept-ds try --adapter runs/my/best

The last form asks for prompts until Ctrl-D; in a chat, each side goes on from its own answers. Prompts get the form
that the adapter was trained with (a chat turn or plain text), and decoding is greedy unless --temperature says
otherwise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from adept_ds.backbone.hub import hub_adapter
from adept_ds.config.command_line import parse_count, parse_flags
from adept_ds.errors import UserError, did_you_mean_path

PROGRAM = "adept-ds try"
WITHOUT, WITH = "without the adapter", "with the adapter"
WIDE_ENOUGH = 80
"""Columns of a terminal in which two answers stand beside one another."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All arguments."""
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="what the model reads (default: standard input)")
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="adapter (hub id too), or fully tuned model")
    parser.add_argument("--base", metavar="MODEL", help="its backbone (default: the one on record)")
    parser.add_argument("--task", metavar="NAME", help="of an adapter with parameters of each task: the one to use")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="precision (default: the run's)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--chat", action="store_true", help="put the chat template around the prompt")
    form.add_argument("--plain", action="store_true", help="let the model go on with the prompt as it is")
    parser.add_argument("--max_new_tokens", type=parse_count, default=256, metavar="N", help="default: 256")
    parser.add_argument("--temperature", type=float, metavar="T", help="sample at this temperature")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling (default: 0)")


def main(arguments: Sequence[str]) -> None:
    """Parse, load, decode each prompt twice."""
    flags = parse_flags(arguments, PROGRAM, __doc__ or "", add_flags)
    if flags.adapter is None:
        raise UserError("--adapter FOLDER is needed, for example runs/my/best")
    if hub_adapter(flags.adapter) is None and not flags.adapter.is_dir():
        raise UserError(f"--adapter {flags.adapter}: no such folder{did_you_mean_path(str(flags.adapter))}")
    if flags.temperature is not None and flags.temperature <= 0:
        raise UserError(f"--temperature {flags.temperature}: expected more than 0; leave it out to decode greedily")
    # The libraries behind these take seconds to load; a mistake on the command line is told before.
    from adept_ds.config.run import GenerationConfig
    from adept_ds.distributed import init_world
    from adept_ds.evaluation.side_by_side import SideBySide, origin_of
    from adept_ds.formats.records import ASSISTANT, Conversation, Example, Message

    origin = origin_of(flags.adapter, flags.base)
    if flags.dtype:
        origin = replace(origin, model=origin.model.model_copy(update={"dtype": flags.dtype}))
    sampling = {} if flags.temperature is None else {"temperature": flags.temperature}
    generation = GenerationConfig(
        do_sample=bool(sampling), max_new_tokens=flags.max_new_tokens, seed=flags.seed, stop=(), **sampling
    )
    console = Console()
    models = SideBySide(flags.adapter, origin, init_world(), flags.task)
    # In a chat each side goes on from its own answers.
    chats: dict[str, list[Message]] = {WITHOUT: [], WITH: []}
    for prompt in _prompts(flags.prompt, console):
        asked = None if flags.chat or flags.plain else origin.asked(prompt)
        if asked is None:
            if not (flags.chat or flags.plain or any(chats.values())):
                print("The training data are not here: prompts are read as they are, or see --chat.", file=sys.stderr)
            asked = Example("prompt", prompt, "", chat=flags.chat)
        answers = {}
        for side, messages in chats.items():
            example = asked
            if asked.turns and models.tokenizer.chat_template:
                messages += asked.turns
                example = Conversation("prompt", "", "", chat=True, messages=tuple(messages))
            answers[side] = models.write(example, side == WITH, generation)
            messages.append(Message(ASSISTANT, answers[side]))
        console.print(layout(answers, console))


def _prompts(words: Sequence[str], console: Console) -> Iterator[str]:
    """The prompt of the command line, else all of standard input, else what a person types line by line."""
    if words:
        yield " ".join(words)
    elif not sys.stdin.isatty():
        yield sys.stdin.read().rstrip("\n")
    else:
        while True:
            try:
                line = console.input("[bold]prompt> [/bold]")
            except (EOFError, KeyboardInterrupt):
                console.print()
                return
            if line.strip():
                yield line


def layout(answers: dict[str, str], console: Console) -> Table | Text:
    """The answers beside one another, or below where there is no room, or no terminal."""
    if len(set(answers.values())) == 1:
        answers = {f"{' and '.join(answers)}, the same": next(iter(answers.values()))}
    if not console.is_terminal or console.width < WIDE_ENOUGH:
        return Text("\n".join(f"--- {name} ---\n{answer}" for name, answer in answers.items()))
    grid = Table.grid(expand=True)
    for _ in answers:
        grid.add_column(ratio=1)
    grid.add_row(*(Panel(Text(answer), title=name) for name, answer in answers.items()))
    return grid
