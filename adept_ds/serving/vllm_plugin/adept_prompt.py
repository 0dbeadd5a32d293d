"""ASGI middleware for vLLM's OpenAI server: each request gets the soft prompt of the model that it names.

An adapter's LoRA is vLLM's own business. What vLLM cannot know is that the first l of the serving base's prompt tokens
stand in front of every input of an adapter with a prompt of l vectors. So here

    /v1/completions         becomes ids: those that vLLM itself reads from the request, behind the prompt's
    /v1/chat/completions    gets the variable `adept` of the serving base's chat template, which begins with the tokens

Before a request goes on, vLLM is asked which ids it makes of it (its render endpoints, within the process). A chat that
does not begin with its prompt, and an input with prompt tokens of its own, are refused. Whatever would reach an adapter
without its prompt is refused, too, other endpoints and names that are not known here among it.

This file runs in vLLM's environment and imports the standard library alone. Its settings are JSON in the variable
ADEPT_DS_SERVING; `adept_ds.serving.command` writes them.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

Message = Mapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Mapping[str, Any], Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

VARIABLE = "ADEPT_DS_SERVING"
COMPLETIONS, CHAT, RENDER = "/v1/completions", "/v1/chat/completions", "/render"
LOAD, UNLOAD, MODELS = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/models"
CLOSED, CLOSED_ENDS = ("/invocations", "/adapters", "/inference/"), (RENDER, "/derender")
"""Endpoints that name an adapter in a header or in the path, and those that the server has for this file's questions
alone: with them anybody could end the requests of others."""
TEMPLATE_LENGTH = "adept"
MANIFEST_NAME, CONFIG_NAME = "adept_export.json", "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
TYPES = {400: "BadRequestError", 404: "NotFoundError", 409: "ConflictError"}


class Refused(Exception):
    """A request that is answered here: status, what is wrong, and the field that it is about."""

    def __init__(self, status: int, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.field = status, field


class Answered(Exception):
    """An answer of vLLM that is the answer to the whole request: status, headers, body."""


class AdeptPrompt:
    """The middleware; vLLM makes it with the application that it stands around."""

    def __init__(self, app: App) -> None:
        self.app = app
        settings = json.loads(os.environ[VARIABLE])
        self._bases = frozenset(settings["bases"])
        self._prompt_ids = settings["prompt_token_ids"]
        self._reserved = frozenset(self._prompt_ids)
        self._fingerprint = settings["embedding_fingerprint"]
        self._max_rank = settings["max_rank"]
        self._lengths = {name: one["length"] for name, one in settings["adapters"].items()}
        # A name stays with its weights: a request may be on its way with their prompt, and vLLM keeps computed keys and
        # values by an adapter's name and path.
        self._digests = {name: one["digest"] for name, one in settings["adapters"].items()}
        self._may_load = settings["runtime_updates"]
        self._loads_left = settings["loads_left"]
        self._updating = asyncio.Lock()

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        body = await _body(receive)
        if body is None:  # the client is gone
            return
        request = _Request(self.app, scope, receive, send, body)
        try:
            try:
                await self._answer(request)
            except Refused as refusal:
                await request.check_key()
                await request.reply(*_error(refusal))
        except Answered as answer:
            await request.reply(*answer.args)

    async def _answer(self, request: _Request) -> None:
        path = request.path
        if path.startswith(CLOSED) or path.endswith(CLOSED_ENDS):
            raise Refused(404, f"{path} is not served; use {COMPLETIONS} or {CHAT}")
        values = _parsed(request.body)
        if values is None:  # vLLM says what is wrong with it
            await request.forward(request.body)
        elif path == LOAD and self._may_load:
            await self._load(request, values)
        elif path == UNLOAD and self._may_load:
            await self._unload(request, values)
        else:
            length = self._length(values)
            if path in (COMPLETIONS, CHAT):
                await request.forward(await self._prompted(request, values, length))
            elif length:
                raise Refused(
                    400,
                    f"{path} would not put the soft prompt of {values['model']!r} in front; expected {COMPLETIONS} or "
                    f"{CHAT}, or the base model",
                    "model",
                )
            else:
                await request.forward(request.body)

    def _length(self, values: dict[str, Any]) -> int:
        """Prompt tokens of the request's model; 0 also for what is no name, which vLLM refuses."""
        name = values.get("model")
        if not name or not isinstance(name, str) or name in self._bases:
            return 0
        if name not in self._lengths:
            # Not left to vLLM: it may know an adapter whose prompt is not known here.
            raise Refused(404, f"The model `{name}` does not exist.", "model")
        return self._lengths[name]

    async def _prompted(self, request: _Request, values: dict[str, Any], length: int) -> bytes:
        """The request's body with the prompt in front of its input."""
        is_chat = request.path == CHAT
        if is_chat:
            options = values.get("chat_template_kwargs")
            if isinstance(options, dict) and TEMPLATE_LENGTH in options:
                raise Refused(400, f"{TEMPLATE_LENGTH!r} is set by the server, from the model", "chat_template_kwargs")
            if length and (options is None or isinstance(options, dict)):
                values["chat_template_kwargs"] = {**(options or {}), TEMPLATE_LENGTH: length}
        if length:
            self._check_fields(values, is_chat)
        status, headers, rendered = await request.ask("POST", request.path + RENDER, _bytes(values))
        if status != 200:
            if length:
                raise Answered(status, headers, rendered)
            return request.body  # of the base, which may be asked for what cannot be rendered
        parts = json.loads(rendered)
        prompt = self._prompt_ids[:length]
        rows = [part["token_ids"] for part in (parts if isinstance(parts, list) else [parts])]
        if is_chat and any(row[:length] != prompt for row in rows):
            raise Refused(
                400,
                f"the chat does not begin with the {length} prompt tokens of {values['model']!r}: it is truncated on "
                "the left, has special tokens of its own in front, or a template of its own",
                "messages",
            )
        if not all(self._reserved.isdisjoint(row[length:] if is_chat else row) for row in rows):
            raise Refused(
                400, "the input has tokens that are kept for soft prompts, which the server puts in front itself"
            )
        if not length:
            return request.body
        if not is_chat:
            values["prompt"] = [[*prompt, *row] for row in rows]
            # The text has been cut; the prompt must not be.
            values.pop("truncate_prompt_tokens", None)
        return _bytes(values)

    @staticmethod
    def _check_fields(values: dict[str, Any], is_chat: bool) -> None:
        """Refuse what gives the input's tokens back one by one: clients count theirs, and these would be shifted."""
        for field in ("prompt_logprobs",) if is_chat else ("prompt_logprobs", "echo"):
            if values.get(field) not in (None, False):
                raise Refused(
                    400,
                    f"{field} would count the soft prompt's tokens with the text's; expected none with an adapter",
                    field,
                )

    async def _load(self, request: _Request, values: dict[str, Any]) -> None:
        name, folder = values.get("lora_name"), values.get("lora_path")
        if not (name and folder and isinstance(name, str) and isinstance(folder, str)):
            await request.forward(request.body)  # vLLM says what is missing
            return
        if values.get("load_inplace"):
            raise Refused(
                400,
                "load_inplace would answer running requests with another adapter's weights behind their prompt; choose "
                "another name",
                "load_inplace",
            )
        async with self._updating:
            await request.check_key()  # ahead of the look into the folder
            length, digest = self._read(folder)
            if self._digests.get(name, digest) != digest:
                raise Refused(
                    409,
                    f"{name!r} was served with other weights than those of {folder!r}, and requests may be on their "
                    "way to these; choose another name",
                    "lora_name",
                )
            if self._loads_left == 0 and name not in self._lengths:
                raise Refused(
                    409,
                    "all LoRA slots have been used, and with none left vLLM answers requests to the base wrongly on a "
                    "CPU (vllm#48421); start the server with a larger --spare",
                )
            if await request.forward(request.body) == 200:
                self._lengths[name], self._digests[name] = length, digest
                if self._loads_left is not None:
                    self._loads_left -= 1

    def _read(self, folder: str) -> tuple[int, str | None]:
        """Length of the prompt and digest of the weights of an exported adapter."""
        manifest, config = (_json_file(Path(folder) / name) for name in (MANIFEST_NAME, CONFIG_NAME))
        if manifest.get("form") != "lora":
            raise Refused(
                400,
                f"{folder!r} has no {MANIFEST_NAME} of a LoRA, which says how many prompt tokens the adapter has; "
                "expected a folder on the server's machine that `adept-ds export --to lora` wrote",
                "lora_path",
            )
        ids, base = manifest.get("prompt_token_ids"), manifest.get("base")
        if (
            not isinstance(ids, list)
            or ids != self._prompt_ids[: len(ids)]
            or not isinstance(base, dict)
            or base.get("embedding_fingerprint") != self._fingerprint
        ):
            raise Refused(400, f"{folder!r} was exported for another serving base", "lora_path")
        rank = config.get("r")
        if not isinstance(rank, int) or rank > self._max_rank:
            raise Refused(
                400,
                f"{folder!r} has rank {rank} (prompt, bottleneck and 1), and the server was started for up to "
                f"{self._max_rank}; start it with a larger --max-lora-rank",
                "lora_path",
            )
        return len(ids), (manifest.get("files") or {}).get(TENSORS_NAME)

    async def _unload(self, request: _Request, values: dict[str, Any]) -> None:
        async with self._updating:
            if await request.forward(request.body) == 200:
                self._lengths.pop(values.get("lora_name"), None)


class _Request:
    """A request whose body has been read."""

    def __init__(self, app: App, scope: Mapping[str, Any], receive: Receive, send: Send, body: bytes) -> None:
        self._app, self._scope, self._receive, self._send, self.body = app, scope, receive, send, body
        self._root = scope.get("root_path", "")
        self.path = scope["path"].removeprefix(self._root)

    async def forward(self, body: bytes) -> int | None:
        """Hand the request on with this body; return the status of the answer."""
        status: int | None = None

        async def send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await self._send(message)

        await self._app({**self._scope, "headers": self._headers(body)}, self._with(body), send)
        return status

    async def ask(self, method: str, path: str, body: bytes) -> tuple[int, Headers, bytes]:
        """Ask the application itself, as the client with its headers; return status, headers and body."""
        path = self._root + path
        scope = {**self._scope, "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
        start: dict[str, Any] = {}
        parts: list[bytes] = []

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            elif message["type"] == "http.response.body":
                parts.append(message.get("body", b""))

        await self._app({**scope, "headers": self._headers(body)}, self._with(body), send)
        return start["status"], list(start["headers"]), b"".join(parts)

    async def check_key(self) -> None:
        """Leave the answer to vLLM where it refuses the client: who may not ask learns nothing of models and folders.

        Raises:
            Answered: vLLM does.
        """
        status, *answer = await self.ask("GET", MODELS, b"")
        if status != 200:
            raise Answered(status, *answer)

    async def reply(self, status: int, headers: Headers, body: bytes) -> None:
        """Answer the client."""
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    def _headers(self, body: bytes) -> Headers:
        kept = [pair for pair in self._scope["headers"] if pair[0] not in (b"content-length", b"transfer-encoding")]
        return [*kept, (b"content-length", str(len(body)).encode())]

    def _with(self, body: bytes) -> Receive:
        """What gives the body and then waits for the client to go, as the server's own `receive`."""
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return waiting.pop() if waiting else await self._receive()

        return receive


async def _body(receive: Receive) -> bytes | None:
    """The request's body; None if the client goes before its end."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _parsed(body: bytes) -> dict[str, Any] | None:
    """The JSON object of a body, None if it is something else. Read as vLLM reads it: of equal keys the last counts."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _json_file(path: Path) -> dict[str, Any]:
    """What is in a file; nothing where there is none, or something else than JSON."""
    try:
        return (_parsed(path.read_bytes()) if path.is_file() else None) or {}
    except (OSError, ValueError):  # a path may have what no path has
        return {}


def _bytes(values: object) -> bytes:
    try:
        return json.dumps(values).encode()
    except RecursionError:  # a little less than what cannot be read
        raise Refused(400, "the request is nested too deeply") from None


def _error(refusal: Refused) -> tuple[int, Headers, bytes]:
    """The answer, in the form of vLLM's errors."""
    error = {"message": str(refusal), "type": TYPES[refusal.status], "param": refusal.field, "code": refusal.status}
    body = _bytes({"error": error})
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    return refusal.status, headers, body
