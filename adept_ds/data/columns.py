"""Which columns of a user's own rows are what, and the example that a row makes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from adept_ds.config.run import DataConfig
from adept_ds.errors import UserError, did_you_mean
from adept_ds.files import parse_json
from adept_ds.formats import ASSISTANT, Conversation, Example, Message, Row
from adept_ds.formats.rows import check_columns, clean_text

CHATS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "question", "instruction", "query")
TARGETS = ("completion", "response", "answer", "output", "target")
VAGUE_PROMPTS = ("input", "inputs", "source", "text", "document", "article", "sentence")
VAGUE_TARGETS = ("outputs", "targets", "label", "summary")
"""Names that count where none of the clearer ones is there."""
INSTRUCTION = "instruction"
CONTEXTS = {INSTRUCTION: ("input", "context"), "question": ("context",), "query": ("context",)}
"""By the prompt's name: what holds more text for it."""
COMPLETED = "prompt"
"""Name of a prompt that its target goes on from; any other is something that is answered."""

ROLES = {
    **{role: role for role in ("system", "user", ASSISTANT, "tool", "developer")},
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model"), ASSISTANT),
}
"""Names of roles in OpenAI's and ShareGPT's chats to those that chat templates know."""
NOT_TRAINED = ("tool_calls", "function_call")

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
"""As published with Stanford's Alpaca."""


@dataclass(frozen=True)
class Columns:
    """The columns that are taken, and how an example is made of a row."""

    settings: dict[str, str]
    """What would be set to name them."""
    text: str
    """What is what, for the user."""
    example: Callable[[Row], Example]
    asked: Callable[[str], Example]
    """Shows a prompt that somebody types as the rows show theirs; it has no target."""

    @property
    def taken(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self.settings.values())


def find_columns(cfg: DataConfig, present: Sequence[str], fields: tuple[str, str] | None, source: str) -> Columns:
    """Return the columns that the settings name, or else those whose names leave no doubt.

    Args:
        cfg: The settings of fields.
        present: The columns that are there.
        fields: Prompt and target where the settings name none; None guesses.
        source: File or data set, for messages.

    Raises:
        UserError: A column that the settings name is not there, or there is doubt; tells all columns.
    """
    named = (cfg.prompt_field, cfg.context_field, cfg.target_field, cfg.messages_field)
    check_columns([name for name in named if name is not None], present, source)
    if fields is not None:
        return _pair(cfg.prompt_field or fields[0], None, cfg.target_field or fields[1], "plain", numbers=False)
    if cfg.messages_field is not None:
        return _chat(cfg.messages_field)
    prompts = [cfg.prompt_field] if cfg.prompt_field else _named(present, PROMPTS) or _named(present, VAGUE_PROMPTS)
    targets = [cfg.target_field] if cfg.target_field else _named(present, TARGETS) or _named(present, VAGUE_TARGETS)
    chats = [] if any(named) else _named(present, CHATS)
    if len(chats) == 1 and not (prompts and targets):
        return _chat(chats[0])
    if not chats and len(prompts) == len(targets) == 1:
        contexts = _named(present, CONTEXTS.get(_plain(prompts[0]), ()))
        if cfg.context_field is not None or len(contexts) < 2:
            return _pair(prompts[0], cfg.context_field or next(iter(contexts), None), targets[0], cfg.prompt_style)
    raise UserError(_doubt(source, present, chats, prompts, targets))


def _plain(name: str) -> str:
    return name.strip().lower()


def _named(present: Iterable[str], names: Sequence[str]) -> list[str]:
    return [name for name in present if _plain(name) in names]


def _doubt(
    source: str, present: Sequence[str], chats: Sequence[str], prompts: Sequence[str], targets: Sequence[str]
) -> str:
    kinds = {"the chat": chats, "the prompt": prompts, "the target": targets}
    found = [f"{' or '.join(map(repr, names))} as {kind}" for kind, names in kinds.items() if names]
    return (
        f"{source}: which columns are what cannot be told from their names ({', '.join(present)}); "
        + (f"found {'; '.join(found)}. " if found else "")
        + "Say it by data.prompt_field and data.target_field (and data.context_field, if there is more text for the "
        "prompt), or by data.messages_field for chats"
    )


def _pair(prompt: str, context: str | None, target: str, style: str | None, numbers: bool = True) -> Columns:
    """Rows with a prompt, perhaps more text for it, and a target; `numbers` says whether those are taken for texts.

    Where no style is asked for, what is answered becomes a user's turn that has a form without a chat template too.
    """
    if style is None and _plain(prompt) == COMPLETED:
        style = "plain"
    is_instruction = context is not None or _plain(prompt) == INSTRUCTION

    def shown(where: str, request: str, more: str, answer: str) -> Example:
        joined = f"{request}\n\n{more}" if more else request
        if style == "plain":
            return Example(where, joined, answer)
        alpaca = (ALPACA_WITH_INPUT if more else ALPACA).format(instruction=request, input=more)
        if style == "alpaca":
            return Example(where, alpaca, answer)
        otherwise = "" if style == "chat" else alpaca if is_instruction else f"{joined}\n"
        answered = (Message(ASSISTANT, answer),) if answer else ()
        return Conversation(where, otherwise, answer, messages=(Message("user", joined), *answered))

    def example(row: Row) -> Example:
        more = _text(row, context, may_be_empty=True) if context is not None else ""
        return shown(row.where, _text(row, prompt, numbers=numbers), more, _text(row, target, numbers=numbers))

    without = "Alpaca's template" if is_instruction else "a line break after it"
    how = {
        "plain": "as it stands",
        "alpaca": "in Alpaca's template",
        "chat": "as a user's turn",
        None: f"as a user's turn, or with {without} where the tokenizer has no chat template",
    }[style]
    settings = {"prompt_field": prompt, "target_field": target}
    if context is not None:
        settings["context_field"] = context
    asked = " + ".join(name for name in (prompt, context) if name is not None)
    return Columns(
        settings,
        f"{asked} is the prompt ({how}), {target} the target",
        example,
        lambda text: shown("prompt", text, "", ""),
    )


def _text(row: Row, column: str, may_be_empty: bool = False, numbers: bool = True) -> str:
    """A cell as text, numbers as Python writes them."""
    if may_be_empty and row.values.get(column) is None:
        return ""
    value = row.get(column, object)
    if numbers and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        what = type(value).__name__ if not isinstance(value, float) or math.isfinite(value) else str(value)
        raise UserError(f"{row.where}: {column} must be a text, not {what}")
    return clean_text(value).strip() if may_be_empty else row.get_text(column)


def _chat(column: str) -> Columns:
    return Columns(
        {"messages_field": column},
        f"{column} is a chat",
        lambda row: conversation(row, column),
        lambda text: Conversation("prompt", "", "", messages=(Message("user", text),)),
    )


def conversation(row: Row, column: str) -> Conversation:
    """Return the chat in a column: a list of {role, content} or of {from, value}, or such a list written as JSON.

    Raises:
        UserError: It is no chat, or has no turn of the assistant's.
    """
    value = row.get(column, object)
    if isinstance(value, str):
        with suppress(json.JSONDecodeError):
            value = parse_json(value)
    if not isinstance(value, list) or not value:
        raise UserError(f"{row.where}: {column} must be a list of messages, with one at least")
    messages = tuple(_message(item, f"{row.where}: {column}[{number}]") for number, item in enumerate(value))
    while messages and messages[-1].role != ASSISTANT:  # Nothing is learnt from what comes after the last answer.
        messages = messages[:-1]
    if not messages:
        raise UserError(f"{row.where}: {column} has no turn of the assistant's to learn from")
    return Conversation(row.where, "", messages[-1].content, messages=messages)


def _message(item: Any, where: str) -> Message:
    pairs = (("role", "content"), ("from", "value"))
    who, what = next((pair for pair in pairs if isinstance(item, dict) and pair[0] in item), ("", ""))
    if not who:
        raise UserError(f"{where} must be an object with role and content, or with from and value")
    role, content = item[who], item.get(what)
    if role not in ROLES:
        near = did_you_mean(str(role), ROLES)
        raise UserError(f"{where}: {who} is {role!r}; expected one of {', '.join(ROLES)}{near}")
    for name in NOT_TRAINED:
        if item.get(name):
            raise UserError(f"{where}: has {name}, which cannot be trained on; expected {what} alone")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise UserError(f"{where}: {what} must be a text, not {type(content).__name__}")
    if not content.strip() and ROLES[role] != "system":
        raise UserError(f"{where}: {what} is empty")
    return Message(ROLES[role], clean_text(content))
