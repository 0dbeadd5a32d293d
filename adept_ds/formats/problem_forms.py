"""How a record becomes a problem: what the model reads, what it is to write, and where its answer ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from adept_ds.errors import UserError
from adept_ds.formats.mbpp import (
    HumanEvalRecord,
    MbppRecord,
    Record,
    few_shot_prompt,
    few_shot_target,
    instruct_prompt,
    instruct_target,
    to_humaneval,
)
from adept_ds.formats.records import Problem


@dataclass(frozen=True)
class ProblemForm:
    """What a problem of one form looks like."""

    record: type[Record]
    """The form of record that it is made of. MBPP's original form can be made into HumanEval's, not the other way."""
    prompt: Callable[[Any, Sequence[Any]], str]
    """Prompt of a record, given the worked examples that stand in front of it."""
    target: Callable[[Any], str]
    """What is trained on as the answer to it."""
    stop: tuple[str, ...]
    """A completion ends before the first of these strings; an answer also ends where its program is complete."""
    chat: bool = False
    """Whether the prompt is a user's turn, which the tokenizer's chat template is put around."""

    def problem(self, record: Record, shots: Sequence[Record] = ()) -> Problem:
        """Return the problem that a record is in this form. UserError if it cannot be made of such a record."""
        record, *shots = (self._own_record(each) for each in (record, *shots))
        return Problem(
            record.task_id,
            self.prompt(record, shots),
            self.target(record),
            chat=self.chat,
            tests=record.tests,
            continues_prompt=self.record is HumanEvalRecord,
            stop=self.stop,
        )

    def _own_record(self, record: Record) -> Record:
        if isinstance(record, self.record):
            return record
        if isinstance(record, MbppRecord):
            return to_humaneval(record)
        raise UserError(
            f"{record.where}: this file has HumanEval's form (prompt, canonical_solution, test), and data.format asks "
            "for MBPP's original form (text, code, test_list); expected another file, or data.format mbpp-paper"
        )


CONTINUATION = ProblemForm(
    HumanEvalRecord,
    prompt=lambda record, shots: record.prompt,
    target=lambda record: record.canonical_solution,
    stop=("\ndef", "\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```"),
)
"""A signature and docstring, to be continued by the function's body."""

FEW_SHOT = ProblemForm(MbppRecord, few_shot_prompt, few_shot_target, stop=("[DONE]",))
"""The MBPP paper's: the task in words and its asserts, perhaps after worked examples, to be answered by a program."""

INSTRUCT = ProblemForm(
    MbppRecord,
    prompt=lambda record, shots: instruct_prompt(record),
    target=instruct_target,
    stop=(),  # It ends with the fence that closes the program, which no string can tell from others.
    chat=True,
)
"""The task and its asserts as a user's turn, to be answered by a fenced program."""

OWN_FORM = {HumanEvalRecord: CONTINUATION, MbppRecord: FEW_SHOT}
"""The form of a record for which no format is asked for."""
