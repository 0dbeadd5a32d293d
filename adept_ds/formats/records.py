"""What is trained on (`Example`) and what can also be scored (`Problem`)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from adept_ds.formats.answers import Answer, continue_prompt, find_program
from adept_ds.formats.evalplus import Cases
from adept_ds.formats.tested import tested_names
from adept_ds.sandbox import Tests

ASSISTANT = "assistant"
"""Role of the turns that a model is trained to write."""


@dataclass(frozen=True)
class TokenLimits:
    """How long an example may be, in tokens, where it is not for the config alone to say."""

    prompt: int
    """Longest prompt, the soft prompt not included; a longer one is cut from the right."""
    target: int | None
    """Longest target, EOS included; None if it is never cut."""


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    """`system`, `user`, `assistant`, or what else the tokenizer's chat template knows."""
    content: str


@dataclass(frozen=True)
class Example:
    """A prompt and its target, before tokenisation."""

    task_id: str
    prompt: str
    """What the model reads; with `chat`, the user's turn that the tokenizer's chat template is put around."""
    target: str
    """What the model is trained to write, without the end-of-sequence token."""
    chat: bool = False
    limits: TokenLimits | None = None
    """Limits of its own; those of the config if None."""

    @property
    def turns(self) -> tuple[Message, ...]:
        """The turns that the model reads before it answers; none where the prompt stands for itself."""
        return (Message("user", self.prompt),) if self.chat else ()


@dataclass(frozen=True)
class Conversation(Example):
    """A chat, of which every assistant's turn is learnt. Its target is the last of them.

    A prompt that is not empty stands in for the turns where the tokenizer has no chat template.
    """

    chat: bool = True
    _: KW_ONLY
    messages: tuple[Message, ...]

    @property
    def turns(self) -> tuple[Message, ...]:
        """The turns that the last answer is given to, or is to be given to where the chat does not end with one."""
        return self.messages[:-1] if self.messages[-1].role == ASSISTANT else self.messages


@dataclass(frozen=True)
class Problem(Example):
    """An example whose completions can be run against tests."""

    _: KW_ONLY
    tests: Tests
    """For the sandbox, with a whole program that solves the problem as `tests.reference`."""
    continues_prompt: bool
    """Whether a completion goes on where the prompt ends (HumanEval form), or holds a program of its own."""
    stop: tuple[str, ...]
    """A completion of this form ends before the first of these strings, or where its program is complete."""
    cases: Cases | None = None
    """Inputs whose expected outputs are the reference's; every program fails `tests` until these are made of them."""

    def answer(self, completion: str, is_program: bool = False) -> Answer:
        """Return the program to run for a completion (already cut at the stop strings).

        `is_program`: whether the completion holds all of it, also where completions go on with the prompt.
        """
        if self.continues_prompt:
            return continue_prompt("" if is_program else self.prompt, completion, tested_names(self.tests))
        return find_program(completion, tested_names(self.tests))

    def program(self, completion: str) -> str:
        """Return the source of `answer`."""
        return self.answer(completion).program
