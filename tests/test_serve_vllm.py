"""Adapters on a real vLLM server: every model gives what it gives in this process, whoever else is served with it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.serving import (
    BASE,
    QUESTIONS,
    TEXTS,
    Answer,
    Expected,
    Family,
    live_answers,
    make_family,
    post,
    question,
    serving,
    vllm_or_skip,
)
from tests.serving_load import Load, run_load

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
SIZES = {"none": (0, 2), "short": (3, 1), "long": (24, 7), "wide": (5, 9)}
ADDED = {"added": (12, 4), "last": (2, 2)}


@dataclass(frozen=True)
class Running:
    """A server whose LoRA slots are as full as they may be: all are in use but the one that stays empty on a CPU."""

    port: int
    family: Family
    expected: Expected

    def ask(self, *requests: tuple[str, str], **more: object) -> list[Answer]:
        """Ask models for texts, all at once."""

        async def together() -> list[Answer]:
            asked = [question(model, text, **more) for model, text in requests]
            return list(await asyncio.gather(*(post(self.port, path, values) for path, values in asked)))

        return asyncio.run(together())

    def post(self, path: str, **values: object) -> Answer:
        return asyncio.run(post(self.port, path, values))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    python = vllm_or_skip()
    folder = tmp_path_factory.mktemp("served")
    family = make_family(folder, SIZES)
    for name, sizes in ADDED.items():
        family.add(name, *sizes, tasks=folder / "later")
    expected = live_answers(family, [BASE, *SIZES, *ADDED])
    flags = ["--folder", str(family.tasks), "--allow-runtime-updates", "--spare", str(len(ADDED))]
    with serving(python, family, *flags, log=folder / "log") as port:
        yield Running(port, family, expected)


def test_all_models_at_once_give_their_own_texts(running: Running) -> None:
    # The last two adapters fill the slots; who is in the base's place would be seen.
    for name in ADDED:
        folder = running.family.folder / "later" / name
        assert running.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(folder)).status == 200
    models = [BASE, *SIZES, *ADDED]
    requests = list(itertools.product(models, TEXTS + QUESTIONS)) * 2
    assert len({tuple(running.expected[model, TEXTS[0]]) for model in models}) == len(models)
    for more in ({}, {"stream": True}):
        answers = running.ask(*requests, **more)
        wrong = [
            request
            for request, answer in zip(requests, answers, strict=True)
            if (answer.status, answer.model, answer.ids) != (200, request[0], running.expected[request])
        ]
        assert not wrong


def test_the_prompt_is_in_front_of_the_start_token_and_counted(running: Running) -> None:
    for model, length in {BASE: 0, **{name: sizes[0] for name, sizes in SIZES.items()}}.items():
        without, chat_without = (running.ask((BASE, text))[0].json for text in (TEXTS[0], QUESTIONS[0]))
        given, chat = (running.ask((model, text))[0].json for text in (TEXTS[0], QUESTIONS[0]))
        ids, chat_ids = given["choices"][0]["prompt_token_ids"], chat["prompt_token_ids"]
        assert ids[length:] == without["choices"][0]["prompt_token_ids"]
        assert chat_ids[length:] == chat_without["prompt_token_ids"]
        assert (
            ids[:length] == chat_ids[:length] == list(range(ids[length - 1] - length + 1, ids[length - 1] + 1))[:length]
        )
        assert given["usage"]["prompt_tokens"] - without["usage"]["prompt_tokens"] == length


def test_who_is_being_answered_is_answered_to_the_end(running: Running) -> None:
    async def removed_meanwhile() -> tuple[Answer, Answer]:
        asked = question("added", TEXTS[0], stream=True)
        answer = asyncio.create_task(post(running.port, asked[0], asked[1] | {"max_tokens": 150, "ignore_eos": True}))
        await asyncio.sleep(0.3)
        return await post(running.port, "/v1/unload_lora_adapter", {"lora_name": "added"}), await answer

    removal, answer = asyncio.run(removed_meanwhile())
    assert (removal.status, answer.status, answer.model) == (200, 200, "added")
    expected = running.expected["added", TEXTS[0]]
    assert answer.ids[: len(expected)] == expected


def test_an_adapter_that_is_removed_is_gone_for_good(running: Running) -> None:
    assert running.post("/v1/unload_lora_adapter", lora_name="last").status == 200
    assert running.ask(("last", TEXTS[0]))[0].status == 404
    # Its slot is not free: one more would take the place that the base's requests read.
    folder = str(running.family.folder / "later" / "last")
    assert running.post("/v1/load_lora_adapter", lora_name="last", lora_path=folder).status == 409
    assert running.ask((BASE, TEXTS[0]))[0].ids == running.expected[BASE, TEXTS[0]]


def test_what_no_adapter_may_be_asked(running: Running) -> None:
    hello = [{"role": "user", "content": "x"}]
    for path, values, status in (
        ("/v1/responses", {"input": "x"}, 400),
        ("/tokenize", {"prompt": "x"}, 400),
        ("/inference/v1/generate", {"token_ids": [5]}, 404),
        ("/inference/v1/abort_requests", {"request_ids": ["x"]}, 404),
        ("/v1/completions/render", {"prompt": "x"}, 404),
        ("/v1/completions", {"prompt": "<|adept_1|>"}, 400),
        ("/v1/chat/completions", {"messages": hello, "chat_template_kwargs": {"adept": 0}}, 400),
        ("/v1/chat/completions", {"messages": hello, "add_special_tokens": True}, 400),
        ("/v1/chat/completions", {"messages": hello, "truncate_prompt_tokens": 3}, 400),
        ("/invocations", {"prompt": "x"}, 404),
    ):
        answer = running.post(path, model="short", **values)
        assert answer.status == status, (path, values, answer.body)


def test_under_load_nothing_is_lost_or_mixed_up(running: Running) -> None:
    report = asyncio.run(run_load(Load(running.port, running.expected, [BASE, *SIZES], clients=16, requests=200)))
    assert not report.problems, report.problems
    assert report.kinds["answered"] > 100
