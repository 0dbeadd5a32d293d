"""The middleware in front of vLLM's server: whose prompt goes in front of what, and what is refused. Around a small
application that answers as vLLM does; tests/test_serve_vllm.py has the real one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from adept_ds.serving.vllm_plugin.adept_prompt import VARIABLE, AdeptPrompt

START, PROMPT = 2, [900, 901, 902, 903]
NAMES = {f"<|adept_{number}|>": token for number, token in enumerate(PROMPT)}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "ab"}]


def read(text: str) -> list[int]:
    for name, token in NAMES.items():
        text = text.replace(name, chr(token))
    return list(map(ord, text))


class Server:
    """Reads texts letter by letter behind a start token; keeps what reaches its endpoints."""

    def __init__(self) -> None:
        self.reached: list[tuple[str, Any]] = []
        self.loaded: dict[str, str] = {}
        self.key: bytes | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        headers = dict(scope["headers"])
        assert headers.get(b"content-length", b"0") == str(len(body)).encode()
        if self.key is not None and headers.get(b"authorization") != self.key:
            status, answer = 401, {"error": "Unauthorized"}
        else:
            status, answer = self.answer(scope["path"].removeprefix(scope["root_path"]), body)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {}
        try:
            values = json.loads(body)
        except (ValueError, RecursionError):
            values = None
        if path.endswith("/render"):
            rows = values and self.rows(values, path.startswith(CHAT))
            return (200, rows) if rows else (400, {"error": "not rendered"})
        self.reached.append((path, body if values is None else values))
        if path == "/v1/load_lora_adapter":
            if values["lora_name"] in self.loaded or "fails" in values["lora_path"]:
                return 400, {}
            self.loaded[values["lora_name"]] = values["lora_path"]
        if path == "/v1/unload_lora_adapter":
            return (200, {}) if self.loaded.pop(values["lora_name"], None) else (404, {})
        return (400, {}) if values is None else (200, {})

    @staticmethod
    def rows(values: dict[str, Any], is_chat: bool) -> Any:
        if is_chat:
            if not isinstance(values.get("messages"), list):
                return None
            length = (values.get("chat_template_kwargs") or {}).get("adept", 0)
            ids = [*PROMPT[:length], START, *read("".join(message["content"] for message in values["messages"]))]
            return {"token_ids": [START, *ids] if values.get("add_special_tokens") else ids}
        prompt = values.get("prompt")
        if not prompt:
            return None
        one = isinstance(prompt, str) or isinstance(prompt[0], int)
        rows = [[START, *read(each)] if isinstance(each, str) else each for each in ([prompt] if one else prompt)]
        last = values.get("truncate_prompt_tokens") or 0
        return [{"token_ids": row[-last:]} for row in rows]


Post = Callable[..., Any]


class Client:
    """Talks to the middleware around a server."""

    def __init__(self, **changes: Any) -> None:
        adapters = {
            name: {"length": length, "digest": name} for name, length in {"none": 0, "two": 2, "all": 4}.items()
        }
        settings = {
            "bases": ["base"],
            "prompt_token_ids": PROMPT,
            "embedding_fingerprint": "f",
            "adapters": adapters,
            "max_rank": 8,
            "runtime_updates": False,
            "loads_left": None,
        }
        self.server = Server()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(VARIABLE, json.dumps(settings | changes))
            self.middleware = AdeptPrompt(self.server)
        self.sent: list[Any] = []

    def post(self, path: str, values: Any, method: str = "POST", root: str = "", **headers: str) -> tuple[int, Any]:
        """Return status and answer; `values` may be bytes, which come in pieces."""
        return asyncio.run(self.call(path, values, method, root, **headers))

    async def call(
        self, path: str, values: Any, method: str = "POST", root: str = "", **headers: str
    ) -> tuple[int, Any]:
        body = values if isinstance(values, bytes) else json.dumps(values).encode()
        pieces = [body[at : at + 7] for at in range(0, len(body), 7)] or [b""]
        waiting = [
            {"type": "http.request", "body": piece, "more_body": number < len(pieces)}
            for number, piece in enumerate(pieces, 1)
        ]
        sent: list[Any] = []

        async def receive() -> Any:
            return waiting.pop(0) if waiting else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": method, "path": root + path, "root_path": root, "headers": pairs}
        await self.middleware(scope, receive, send)
        assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
        return sent[0]["status"], json.loads(sent[1]["body"])

    def reaches(self, path: str, values: Any, **more: Any) -> Any:
        """What reaches the server of a request that it answers well."""
        status, answer = self.post(path, values, **more)
        assert status == 200, answer
        return self.server.reached[-1][1]

    def refused(self, path: str, values: Any, **more: Any) -> str:
        """Why a request is refused before it reaches the server."""
        before = len(self.server.reached)
        status, answer = self.post(path, values, **more)
        assert 400 <= status < 500
        assert answer["error"]["code"] == status
        assert len(self.server.reached) == before
        return answer["error"]["message"]


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.mark.parametrize(
    ("prompt", "rows"),
    [
        ("ab", [[START, 97, 98]]),
        (["a", "b"], [[START, 97], [START, 98]]),
        ([97, 98], [[97, 98]]),
        ([[97], [START, 98]], [[97], [START, 98]]),
    ],
    ids=["text", "texts", "ids", "rows"],
)
@pytest.mark.parametrize(("model", "length"), [("two", 2), ("all", 4)])
def test_the_prompt_stands_in_front_of_the_start_token(
    client: Client, prompt: Any, rows: list[list[int]], model: str, length: int
) -> None:
    reached = client.reaches(COMPLETIONS, {"model": model, "prompt": prompt, "temperature": 0, "stream": True})
    expected = [[*PROMPT[:length], *row] for row in rows]
    assert reached == {"model": model, "prompt": expected, "temperature": 0, "stream": True}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("name", [{"model": "base"}, {"model": "none"}, {"model": ""}, {}], ids=str)
def test_who_has_no_prompt_gets_the_request_as_it_is(client: Client, path: str, name: dict[str, str]) -> None:
    asked = {**name, "prompt": "ab", "messages": HELLO}
    assert client.reaches(path, asked) == asked


def test_the_chat_template_is_told_the_length(client: Client) -> None:
    asked = {"model": "two", "messages": HELLO, "chat_template_kwargs": {"thinking": False}}
    assert client.reaches(CHAT, asked)["chat_template_kwargs"] == {"thinking": False, "adept": 2}


def test_what_is_cut_is_the_text(client: Client) -> None:
    reached = client.reaches(COMPLETIONS, {"model": "two", "prompt": "abc", "truncate_prompt_tokens": 2})
    assert reached == {"model": "two", "prompt": [[900, 901, 98, 99]]}


@pytest.mark.parametrize("model", ["base", "two"])
def test_no_client_chooses_the_length(client: Client, model: str) -> None:
    for value in (0, 4):
        asked = {"model": model, "messages": HELLO, "chat_template_kwargs": {"adept": value}}
        assert "'adept' is set by the server" in client.refused(CHAT, asked)


def test_a_chat_without_its_prompt_in_front_is_refused(client: Client) -> None:
    asked = {"model": "two", "messages": HELLO, "add_special_tokens": True}
    assert "does not begin with the 2 prompt tokens of 'two'" in client.refused(CHAT, asked)


@pytest.mark.parametrize("model", ["base", "none", "two"])
@pytest.mark.parametrize("token", [0, 3], ids=["own", "of another adapter"])
def test_no_client_brings_prompt_tokens(client: Client, model: str, token: int) -> None:
    text = f"a<|adept_{token}|>"
    halves = [{"role": "user", "content": text[:5]}, {"role": "user", "content": text[5:]}]
    for path, asked in (
        (COMPLETIONS, {"prompt": text}),
        (COMPLETIONS, {"prompt": [[97], [97, PROMPT[token]]]}),
        (CHAT, {"messages": [{"role": "user", "content": text}]}),
        (CHAT, {"messages": halves}),
    ):
        assert "kept for soft prompts" in client.refused(path, {"model": model, **asked})


@pytest.mark.parametrize(
    ("path", "field"), [(COMPLETIONS, "echo"), (COMPLETIONS, "prompt_logprobs"), (CHAT, "prompt_logprobs")]
)
def test_what_would_count_the_prompts_tokens_is_refused(client: Client, path: str, field: str) -> None:
    asked = {"prompt": "ab", "messages": HELLO, field: 1}
    assert field in client.refused(path, {"model": "two", **asked})
    assert client.reaches(path, {"model": "base", **asked})[field] == 1
    assert field in client.reaches(path, {"model": "two", **asked, field: False})


@pytest.mark.parametrize(
    "path",
    ["/v1/responses", "/v1/embeddings", "/tokenize", "/pooling", "/v1/messages", "/new"],
)
def test_other_endpoints_are_the_bases(client: Client, path: str) -> None:
    asked = {"model": "two", "input": "ab"}
    assert f"{path} would not put the soft prompt of 'two' in front" in client.refused(path, asked)
    assert client.reaches(path, {**asked, "model": "base"}) == {**asked, "model": "base"}


CLOSED = ["/invocations", "/adapters/two", "/inference/v1/abort_requests", CHAT + "/render", "/v1/responses/derender"]


@pytest.mark.parametrize("path", CLOSED)
def test_what_names_its_model_elsewhere_or_is_for_the_server_alone_is_closed(client: Client, path: str) -> None:
    assert "not served" in client.refused(path, {"model": "base"})
    assert "not served" in client.refused(path, b"", method="DELETE")


def test_a_name_that_is_not_known_reaches_nobody(client: Client) -> None:
    assert client.refused(COMPLETIONS, {"model": "twoo", "prompt": "ab"}) == "The model `twoo` does not exist."
    assert client.refused("/v1/responses", {"model": "twoo"}) == "The model `twoo` does not exist."


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"model": "two", "n": ' + b"1" * 5000 + b"}", b"[]", b"null"],
    ids=["empty", "cut", "not UTF-8", "deep", "long number", "list", "null"],
)
def test_what_is_no_request_is_left_to_the_server(client: Client, body: bytes) -> None:
    client.post(COMPLETIONS, body)
    assert client.server.reached


@pytest.mark.parametrize("model", [5, ["two"], {"two": 1}, True])
def test_a_model_that_is_no_name_is_left_to_the_server(client: Client, model: Any) -> None:
    asked = {"model": model, "prompt": "ab"}
    assert client.reaches(COMPLETIONS, asked) == asked


def test_the_servers_own_refusal_is_the_answer(client: Client) -> None:
    assert client.post(COMPLETIONS, {"model": "two"}) == (400, {"error": "not rendered"})
    assert client.post(CHAT, {"model": "two", "messages": "ab", "chat_template_kwargs": 5})[0] == 400


def test_of_equal_keys_the_last_counts_as_for_the_server(client: Client) -> None:
    reached = client.reaches(COMPLETIONS, b'{"model": "base", "prompt": "a", "model": "two"}')
    assert reached == {"model": "two", "prompt": [[900, 901, START, 97]]}


def test_behind_a_root_path(client: Client) -> None:
    reached = client.reaches(COMPLETIONS, {"model": "two", "prompt": "a"}, root="/llm")
    assert reached["prompt"] == [[900, 901, START, 97]]


def test_a_client_that_goes_while_it_speaks_is_forgotten(client: Client) -> None:
    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        raise AssertionError(message)

    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    scope = {"type": "http", "method": "POST", "path": CHAT, "root_path": "", "headers": []}
    asyncio.run(client.middleware(scope, receive, send))
    assert not client.server.reached


def test_the_server_hears_that_the_client_has_gone() -> None:
    heard: list[Any] = []

    async def server(scope: Any, receive: Any, send: Any) -> None:
        heard.append([(await receive())["type"], (await receive())["type"]])

    client = Client()
    client.middleware.app = server
    with pytest.raises(AssertionError):  # it has not answered
        client.post("/v1/responses", {"model": "base"})
    assert heard == [["http.request", "http.disconnect"]]


def test_without_the_key_nothing_is_told(client: Client, tmp_path: Path) -> None:
    client = Client(runtime_updates=True)
    client.server.key = b"Bearer x"
    load = {"lora_name": "new", "lora_path": str(export(tmp_path, 2))}
    for path, asked in (
        (COMPLETIONS, {"model": "twoo"}),
        ("/tokenize", {"model": "two"}),
        ("/v1/load_lora_adapter", load),
    ):
        assert client.post(path, asked) == (401, {"error": "Unauthorized"})
    assert client.post(COMPLETIONS, {"model": "two", "prompt": "a"}, authorization="Bearer x")[0] == 200


def export(folder: Path, length: int, **changes: Any) -> Path:
    manifest = {
        "form": "lora",
        "prompt_token_ids": PROMPT[:length],
        "base": {"embedding_fingerprint": "f"},
        "files": {"adapter_model.safetensors": f"sha of {length}"},
    }
    folder.mkdir(exist_ok=True)
    rank = changes.pop("rank", 8)
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    (folder / "adept_export.json").write_text(json.dumps(manifest | changes))
    return folder


LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def load(name: str, folder: Path, **more: Any) -> dict[str, Any]:
    return {"lora_name": name, "lora_path": str(folder), **more}


def test_an_adapter_that_is_added_has_its_prompt_until_it_is_removed(tmp_path: Path) -> None:
    client = Client(runtime_updates=True)
    folder = export(tmp_path / "new", 3)
    asked = {"model": "new", "prompt": "a"}
    assert "does not exist" in client.refused(COMPLETIONS, asked)
    assert client.post(LOAD, load("new", folder))[0] == 200
    assert client.reaches(COMPLETIONS, asked)["prompt"] == [[900, 901, 902, START, 97]]
    assert client.post(UNLOAD, {"lora_name": "new"})[0] == 200
    assert "does not exist" in client.refused(COMPLETIONS, asked)


def test_one_that_the_server_does_not_load_is_not_known(tmp_path: Path) -> None:
    client = Client(runtime_updates=True)
    assert client.post(LOAD, load("new", export(tmp_path / "fails", 3)))[0] == 400
    assert "does not exist" in client.refused(COMPLETIONS, {"model": "new", "prompt": "a"})
    assert client.post(UNLOAD, {"lora_name": "two"})[0] == 404
    assert client.reaches(COMPLETIONS, {"model": "two", "prompt": "a"})["prompt"] == [[900, 901, START, 97]]


def test_of_two_loads_at_once_the_one_that_succeeds_counts(tmp_path: Path) -> None:
    client = Client(runtime_updates=True)

    async def both() -> list[int]:
        loads = [load("new", export(tmp_path / str(length), length)) for length in (1, 4)]
        answers: list[Awaitable[tuple[int, Any]]] = [client.call(LOAD, one) for one in loads]
        return [status for status, _ in await asyncio.gather(*answers)]

    assert sorted(asyncio.run(both())) == [200, 409]
    length = int(Path(client.server.loaded["new"]).name)
    reached = client.reaches(COMPLETIONS, {"model": "new", "prompt": "a"})
    assert reached["prompt"] == [[*PROMPT[:length], START, 97]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "folded"}, "has no adept_export.json of a LoRA"),
        ({"prompt_token_ids": [1, 2]}, "another serving base"),
        ({"prompt_token_ids": [*PROMPT, 904]}, "another serving base"),
        ({"base": {"embedding_fingerprint": "g"}}, "another serving base"),
        ({"base": None}, "another serving base"),
        ({"rank": 9}, "has rank 9 (prompt, bottleneck and 1), and the server was started for up to 8"),
        ({"rank": None}, "has rank None"),
    ],
    ids=str,
)
def test_what_has_no_prompt_of_this_base_is_not_loaded(tmp_path: Path, changes: Any, message: str) -> None:
    client = Client(runtime_updates=True)
    assert message in client.refused(LOAD, load("new", export(tmp_path, 2, **changes)))


def test_a_folder_that_is_none_is_not_loaded(tmp_path: Path) -> None:
    client = Client(runtime_updates=True)
    for folder in (tmp_path, tmp_path / "missing", Path("owner/name"), Path("a\0b"), Path("x" * 5000)):
        assert "has no adept_export.json of a LoRA" in client.refused(LOAD, load("new", folder))
    (tmp_path / "adept_export.json").write_bytes(b"\xff{")
    assert "has no adept_export.json of a LoRA" in client.refused(LOAD, load("new", tmp_path))


def test_a_name_stays_with_its_weights(tmp_path: Path) -> None:
    client = Client(runtime_updates=True)
    folder = export(tmp_path / "new", 3)
    assert "another name" in client.refused(LOAD, load("new", folder, load_inplace=True))
    for _ in range(2):
        assert client.post(LOAD, load("new", folder))[0] == 200
        assert client.post(UNLOAD, {"lora_name": "new"})[0] == 200
    export(folder, 2)
    assert "'new' was served with other weights" in client.refused(LOAD, load("new", folder))
    assert client.post(LOAD, load("newer", folder))[0] == 200


def test_no_more_are_added_than_there_are_slots(tmp_path: Path) -> None:
    client = Client(runtime_updates=True, loads_left=1)
    assert client.post(LOAD, load("new", export(tmp_path / "new", 3)))[0] == 200
    assert client.post(UNLOAD, {"lora_name": "new"})[0] == 200
    assert "larger --spare" in client.refused(LOAD, load("more", export(tmp_path / "more", 3)))


def test_without_leave_nothing_is_added(client: Client, tmp_path: Path) -> None:
    client.post(LOAD, load("new", export(tmp_path / "new", 3)))  # vLLM has no such endpoint then
    assert "does not exist" in client.refused(COMPLETIONS, {"model": "new", "prompt": "a"})
