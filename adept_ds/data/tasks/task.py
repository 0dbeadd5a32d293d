"""What a text-to-text task is: where its rows are, what the model reads and writes, and how it is scored.

The tasks of the paper are declared in `adept_ds.data.tasks.registry`; a user's own is a JSON file with the same fields.
"""

from __future__ import annotations

import re
import string
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from adept_ds.config.base import Count, Section
from adept_ds.data.tasks.prepare import PREPARE, text, texts
from adept_ds.errors import UserError, did_you_mean
from adept_ds.formats.records import Example
from adept_ds.formats.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Part = Literal["train", "validation", "test"]
MetricName = Literal["accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman", "exact_match", "token_f1"]
NAME = re.compile(r"[^/\\\x00-\x1f\x7f]{1,100}")
LABEL_METRICS = ("accuracy", "f1", "macro_f1", "matthews")

SPLIT_NAMES: dict[str, dict[Part, str]] = {
    "own": {"train": "train", "validation": "validation", "test": "test"},
    "half": {"train": "train", "validation": "validation", "test": "validation"},
    "1k": {"train": "train", "validation": "train", "test": "validation"},
}
"""By rule: the data set's split that each part is taken from."""


class Task(Section):
    """One text-to-text task."""

    name: str = Field(min_length=1)
    """What `data.tasks` and results call it; a task file's own name if it gives none."""
    dataset: str | None = None
    """Hub id of the data set."""
    subset: str | None = None
    """Configuration of the hub data set."""
    files: dict[Part, str] = Field(default={})
    """For a task of the user's own: JSON lines, CSV or Parquet files by split, relative to the task file's folder."""
    source: str = Field(min_length=1)
    """What the model reads: text with columns in braces."""
    target: str = "label"
    """Column with what the model is to write; of a list of answers, it is taught the first."""
    labels: dict[str, str] | None = None
    """For a classification: what the target column holds to the label word that the model writes. Of two label words
    the second is the positive one."""
    references: tuple[str, ...] | None = None
    """Columns whose texts all count as right answers; the target column if not given."""
    prepare: str | None = None
    """One of the functions on rows that `adept_ds.data.tasks.prepare` has."""
    splits: Literal["own", "half", "1k"] = "own"
    """Where validation and test come from: the data set's own splits; the two halves of its permuted validation split;
    or 1,000 permuted training examples, and the validation split as test."""
    split_names: dict[Part, str] = Field(default={})
    """The data set's split that a part is taken from, where it is not the usual one."""
    train_limit: Count | None = None
    """Most training examples; the rest of the permuted training split is not used."""
    train_size: Count | None = None
    """Training examples in the released data, for a plan that is made before the data is there."""
    example_per_answer: Literal["never", "train", "always"] = "never"
    """Whether a row with several answers is one example or, in training or always, one for each."""
    metrics: tuple[MetricName, ...] = Field(min_length=1)
    """What is measured; the first is the one that is reported."""
    selection_metric: MetricName | None = None
    """What checkpoints are chosen by; the reported metric if not given."""
    postprocess: Literal["first_line", "strip"] = "first_line"
    """What of a generated text is the answer: its first line, or all of it; without the space around it."""
    first_reference_only: bool = False
    """Compare with the first reference instead of the best one."""
    reference_tokens: Count | None = None
    """Cut references to so many tokens, EOS included, and compare with what they decode to."""
    max_source_length: Count = 256
    """Longest source in tokens, the soft prompt not included; a longer one is cut from the right."""
    max_target_length: Count = 20
    """Longest target in tokens, EOS included; label words are never cut."""
    faithful: dict[str, Any] = Field(default={})
    """Fields that have other values in the variant `faithful`, which does as the published code did."""

    @model_validator(mode="after")
    def _check(self) -> Task:
        if not NAME.fullmatch(self.name) or not self.name.strip("."):
            raise ValueError(
                f"name is {self.name!r}, and a folder of results is called by it; expected at most 100 letters, digits "
                "and signs without / and \\"
            )
        if (self.dataset is None) == (not self.files):
            raise ValueError("give exactly one of dataset and files")
        for _, field, specification, conversion in string.Formatter().parse(self.source):
            if field is not None and (not field.isidentifier() or specification or conversion):
                raise ValueError(f"source has {{{field}}}; expected the bare name of a column in braces")
        if not self._template_columns():
            raise ValueError("source shows no column; expected at least one name in braces, as in {sentence}")
        if self.prepare is not None and self.prepare not in PREPARE:
            raise ValueError(
                f"prepare is {self.prepare!r}; expected one of {', '.join(PREPARE)}"
                + did_you_mean(self.prepare, PREPARE)
            )
        for metric in (*self.metrics, *((self.selection_metric,) if self.selection_metric else ())):
            if (metric in LABEL_METRICS) != (self.labels is not None):
                raise ValueError(
                    f"metrics has {metric!r}, which "
                    + ("needs labels" if self.labels is None else f"is not for labels; expected {LABEL_METRICS}")
                )
        if "f1" in self.metrics and len(self.label_words) != 2:
            raise ValueError("metrics has 'f1', which needs two label words; macro_f1 takes any number")
        return self

    @property
    def label_words(self) -> tuple[str, ...]:
        """What a classifying model may write; empty for a task without labels."""
        return tuple(dict.fromkeys((self.labels or {}).values()))

    @property
    def chosen_by(self) -> MetricName:
        """The metric that checkpoints are chosen by; for all metrics, higher is better."""
        return self.selection_metric or self.metrics[0]

    @property
    def stop(self) -> tuple[str, ...]:
        """An answer ends before the first of these strings."""
        return ("\n",) if self.postprocess == "first_line" else ()

    def split_name(self, part: Part) -> str:
        """The data set's split that a part is taken from."""
        names = {**SPLIT_NAMES[self.splits], **self.split_names}
        if self.splits == "half":
            return names["train" if part == "train" else "validation"]
        return names["train" if self.splits == "1k" and part == "validation" else part]

    def variant(self, name: Literal["fixed", "faithful"]) -> Task:
        """Return the task as it should be (`fixed`) or as the published code has it (`faithful`)."""
        changes = self.faithful if name == "faithful" else {}
        return Task.model_validate({**self.model_dump(), **changes, "faithful": {}})

    def columns(self) -> list[str]:
        """The data set's columns that the task reads."""
        wanted = [*self._template_columns(), self.target, *(self.references or ())]
        if self.prepare:
            prepare = PREPARE[self.prepare]
            wanted = [column for column in wanted if column not in prepare.makes] + list(prepare.reads)
        return list(dict.fromkeys(wanted))

    def prepared(self, row: Row) -> Row:
        """Return the row with the columns that `prepare` makes."""
        if self.prepare is None:
            return row
        return Row(row.where, {**row.values, **PREPARE[self.prepare].function(row)})

    def show(self, row: Row) -> str:
        """Return what the model reads for a prepared row. UserError for a missing column or one that is no text."""
        return self.source.format_map({column: text(row, column) for column in self._template_columns()})

    def label_word(self, row: Row) -> str:
        """Return a prepared row's label word. UserError for a value that is not declared."""
        assert self.labels is not None
        value = text(row, self.target)
        if value not in self.labels:
            raise UserError(
                f"{row.where}: {self.target} is {value!r}; task {self.name} expects one of "
                f"{', '.join(map(repr, self.labels))}" + did_you_mean(value, self.labels)
            )
        return self.labels[value]

    def targets(self, row: Row) -> list[str]:
        """Return what the model may be taught to write for a prepared row, the preferred one first."""
        return [self.label_word(row)] if self.labels else texts(row, self.target)

    def right_answers(self, row: Row) -> tuple[str, ...]:
        """Return all that count as right for a prepared row, without repetitions."""
        if self.labels:
            return (self.label_word(row),)
        columns = self.references or (self.target,)
        return tuple(dict.fromkeys(answer for column in columns for answer in texts(row, column)))

    def answer(self, generated: str) -> str:
        """Return the answer in a generated text."""
        stripped = generated.strip()
        return stripped.partition("\n")[0].rstrip() if self.postprocess == "first_line" else stripped

    def max_target_tokens(self, configured: int | None) -> int | None:
        """Return how many tokens a target may have, EOS included; None for label words, which are never cut.

        `configured` is `data.max_target_length`, which goes before the task's own.
        """
        return None if self.labels else configured or self.max_target_length

    def max_answer_tokens(self, tokenizer: PreTrainedTokenizerBase, configured: int | None = None) -> int:
        """Return how many tokens an answer may have, EOS included: as many as a target, or as the longest label
        word."""
        longest = self.max_target_tokens(configured)
        if longest is not None:
            return longest
        return 1 + max(len(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in self.label_words)

    def _template_columns(self) -> list[str]:
        return [field for _, field, _, _ in string.Formatter().parse(self.source) if field is not None]


@dataclass(frozen=True)
class TaskExample(Example):
    """An example of a task, with what a generated answer is compared with."""

    _: KW_ONLY
    task: Task
    references: tuple[str, ...]

    @property
    def stop(self) -> tuple[str, ...]:
        """An answer ends before the first of these strings."""
        return self.task.stop


def cut_references(task: Task, references: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the references as the task's scores use them: all as they are or, in some `faithful` tasks, one cut.

    Cutting is to `reference_tokens` tokens, EOS included, and what is compared with is what they decode to.
    """
    used = references[:1] if task.first_reference_only else references
    if task.reference_tokens is None:
        return used
    limit = task.reference_tokens - 1
    ids = [tokenizer(reference, add_special_tokens=False)["input_ids"][:limit] for reference in used]
    return tuple(tokenizer.batch_decode(ids, skip_special_tokens=True))
