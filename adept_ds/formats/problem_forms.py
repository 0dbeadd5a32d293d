"""How a record becomes a problem: what the model reads, what it is to write, and where its answer ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adept_ds.errors import UserError
from adept_ds.formats.evalplus import HumanEvalPlusRecord, MbppPlusRecord, PlusRecord
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
            continues_prompt=self.record is not MbppRecord,
            stop=self.stop,
            cases=record.cases if isinstance(record, PlusRecord) else None,
        )

    def _own_record(self, record: Record) -> Record:
        if isinstance(record, self.record):
            return record
        if isinstance(record, MbppRecord) and self.record is HumanEvalRecord:
            return to_humaneval(record)
        raise UserError(
            f"{record.where}: this file has {_FORMS[type(record)]}, and data.format asks for {_FORMS[self.record]}; "
            f"expected another file, or data.format {_FORMATS[type(record)]}"
        )


_FORMS: dict[type[Record], str] = {
    MbppRecord: "MBPP's original form (text, code, test_list)",
    HumanEvalRecord: "HumanEval's form (prompt, canonical_solution, test)",
    MbppPlusRecord: "the form of EvalPlus's MBPP+ (base_input, plus_input; Mbpp/2)",
    HumanEvalPlusRecord: "the form of EvalPlus's HumanEval+ (base_input, plus_input; HumanEval/0)",
}
_FORMATS: dict[type[Record], str] = {
    MbppRecord: "mbpp",
    HumanEvalRecord: "mbpp-paper",
    MbppPlusRecord: "mbpp_plus",
    HumanEvalPlusRecord: "humaneval_plus",
}
"""A format for a file of each form."""


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

HUMANEVAL_PLUS = replace(CONTINUATION, record=HumanEvalPlusRecord)
"""As HumanEval's, so that the figures on its own tests are comparable."""

MBPP_PLUS = replace(
    CONTINUATION,
    record=MbppPlusRecord,
    stop=('\n"""', "\nassert", "\nif __name__", "\ndef main(", "\nprint(", "\n```"),
)
"""A docstring with the task and one assert, to be gone on with by a program; decoding stops where EvalPlus's does."""

OWN_FORM: dict[type[Record], ProblemForm] = {
    HumanEvalRecord: CONTINUATION,
    MbppRecord: FEW_SHOT,
    MbppPlusRecord: MBPP_PLUS,
    HumanEvalPlusRecord: HUMANEVAL_PLUS,
}
"""The form of a record for which no format is asked for."""
