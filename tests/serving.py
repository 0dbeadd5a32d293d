"""A small backbone with adapters on a server, what each of them answers in this process, and clients on sockets."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from adept_ds.config.run import ModelConfig
from adept_ds.errors import UserError
from adept_ds.export.export import export_lora, export_serving_base
from adept_ds.export.verification import chat_ids
from adept_ds.model.adapted_model import AdaptedModel
from adept_ds.serving.vllm_environment import find_vllm
from tests.models import EOS, llama_config, save, seeded
from tests.ranks import REPOSITORY, free_port
from tests.test_export import SIZE, adapter, backbone_in, request, tokenizer

NEW_TOKENS = 12
TEXTS = ("The capital of France is", "def add(a, b):", "1, 2, 3")
QUESTIONS = ("Who wrote Faust?", "Once upon a time")
ROWS = 24
"""Prompt tokens of the serving base."""
BASE = "base"


def vllm_or_skip() -> str:
    """The interpreter with vLLM; without one the test is skipped."""
    try:
        return str(find_vllm().python)
    except UserError as error:
        pytest.skip(str(error).splitlines()[0])


@dataclass
class Family:
    """A backbone, its serving base, and adapters: as trained, and as LoRA in `tasks`."""

    folder: Path
    trained: dict[str, Path] = field(default_factory=dict)

    @property
    def backbone(self) -> Path:
        return self.folder / "backbone"

    @property
    def serving(self) -> Path:
        return self.folder / "serving"

    @property
    def tasks(self) -> Path:
        return self.folder / "tasks"

    def add(self, name: str, length: int, bottleneck: int, tasks: Path | None = None) -> Path:
        """Make an adapter with random values; return its LoRA folder."""
        settings = {"name": "adept", "num_virtual_tokens": length, "bottleneck": bottleneck}
        made = adapter(self.backbone, self.folder / "trained" / name, seed=len(self.trained), **settings)
        self.trained[name] = made
        out = (tasks or self.tasks) / name
        export_lora(request(self.backbone, made, out, verify=False), self.serving)
        return out


def make_family(folder: Path, sizes: Mapping[str, tuple[int, int]]) -> Family:
    """Make a backbone and adapters of these names, prompt lengths and bottlenecks."""
    family = Family(folder)
    shape = {"vocab_size": SIZE, "hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = seeded(lambda: LlamaForCausalLM(llama_config(initializer_range=0.3, **shape)))
    save(model, tokenizer(is_t5=False), family.backbone)
    export_serving_base(ModelConfig(name_or_path=str(family.backbone), dtype="fp32"), ROWS, family.serving)
    for name, (length, bottleneck) in sizes.items():
        family.add(name, length, bottleneck)
    return family


Expected = dict[tuple[str, str], list[int]]


def live_answers(family: Family, names: Sequence[str]) -> Expected:
    """Greedy ids by model and text, each alone in `AdaptedModel.generate`; for the base without an adapter."""
    reader = AutoTokenizer.from_pretrained(family.backbone)
    inputs = {text: reader(text)["input_ids"] for text in TEXTS} | {text: chat_ids(reader, text) for text in QUESTIONS}
    answers: Expected = {}
    for name in names:
        backbone: Any = backbone_in(family.backbone)
        model = backbone if name == BASE else AdaptedModel.from_pretrained(backbone, family.trained[name])
        for text, ids in inputs.items():
            row = torch.tensor([ids])
            mask = torch.ones_like(row)
            out = model.generate(row, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
            answers[name, text] = until_end(out[0, len(ids) :].tolist())
    return answers


def until_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(EOS)] if EOS in ids else ids


@contextmanager
def serving(
    python: str, family: Family, *flags: str, log: Path, timeout: float = 240, further: Sequence[str] = ()
) -> Iterator[int]:
    """Run `adept-ds serve` on a free port, which is given once the server answers."""
    port = free_port()
    given = ["--base", str(family.serving), "--python", python, "--port", str(port), "--dtype", "float32", *flags]
    small = ["--max-model-len", "256", "--max-num-seqs", "64", "--", "--enforce-eager", *further]
    variables = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "adept_ds", "serve", *given, *small],
            env=variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + timeout
        while not is_up(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        yield port
        process.terminate()  # which reaches vLLM itself
        process.wait(60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """Of a streamed answer."""
        lines = [line.removeprefix(b"data: ") for line in self.body.splitlines() if line.startswith(b"data: {")]
        assert self.body.rstrip().endswith(b"data: [DONE]")
        return [json.loads(line) for line in lines]

    @property
    def ids(self) -> list[int]:
        """Tokens of the only choice."""
        parts = self.events if self.body.startswith(b"data: ") else [self.json]
        choices = [choice for part in parts for choice in part["choices"]]
        return until_end([token for choice in choices for token in choice.get("token_ids") or []])

    @property
    def model(self) -> str:
        return (self.events[0] if self.body.startswith(b"data: ") else self.json)["model"]


def request_bytes(path: str, body: bytes, chunked: bool = False, content_type: str = "application/json") -> bytes:
    """A whole request, its body in pieces if `chunked`."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: {content_type}\r\n"
    if not chunked:
        return head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    pieces = [body[at : at + 16] for at in range(0, len(body), 16)]
    coded = b"".join(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in pieces)
    return head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + coded + b"0\r\n\r\n"


async def send(port: int, data: bytes, timeout: float = 120) -> Answer:
    """Send a request and read the answer to its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        await writer.drain()
        whole = await asyncio.wait_for(reader.read(), timeout)
    finally:
        writer.close()
    head, _, body = whole.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head.lower():
        body = _joined(body)
    return Answer(int(head.split()[1]), body)


def _joined(body: bytes) -> bytes:
    parts = []
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        parts.append(body[:length])
        body = body[length + 2 :]
    return b"".join(parts)


def question(model: str, text: str, **more: Any) -> tuple[str, dict[str, Any]]:
    """Path and values of a greedy request: a chat if `text` is one of the questions."""
    values: dict[str, Any] = {
        "model": model,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "return_token_ids": True,
        **more,
    }
    if text in QUESTIONS:
        return "/v1/chat/completions", values | {"messages": [{"role": "user", "content": text}]}
    return "/v1/completions", values | {"prompt": text}


async def post(port: int, path: str, values: Any, **how: Any) -> Answer:
    """Send values as JSON."""
    return await send(port, request_bytes(path, json.dumps(values).encode(), **how))
