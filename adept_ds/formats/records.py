"""What is trained on (`Example`) and what can also be scored (`Problem`)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from adept_ds.formats.completions import extract_code
from adept_ds.sandbox import Tests


@dataclass(frozen=True)
class TokenLimits:
    """How long an example may be, in tokens, where it is not for the config alone to say."""

    prompt: int
    """Longest prompt, the soft prompt not included; a longer one is cut from the right."""
    target: int | None
    """Longest target, EOS included; None if it is never cut."""


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


@dataclass(frozen=True)
class Problem(Example):
    """An example whose completions can be run against tests."""

    _: KW_ONLY
    tests: Tests
    """For the sandbox, with a whole program that solves the problem as `tests.reference`."""
    continues_prompt: bool
    """Whether a completion goes on where the prompt ends (HumanEval form), or holds a program of its own."""
    stop: tuple[str, ...]
    """A completion of this form ends before the first of these strings."""

    def program(self, completion: str) -> str:
        """Return the source to run for a completion (already cut at the stop strings)."""
        return self.prompt + completion if self.continues_prompt else extract_code(completion)
