"""Many clients at one server, malformed, oversized and cancelled requests among them: nothing is lost, nobody mixed up.

    python -m tests.serving_load --adapters 16 --clients 64 --requests 2000

makes a small random backbone with adapters, asks each of them in this process for the texts that it has to give, serves
all by `adept-ds serve`, and prints what came of the requests, and how long those took that were answered.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adept_ds.serving.vllm_environment import find_vllm
from tests.serving import (
    BASE,
    QUESTIONS,
    ROWS,
    TEXTS,
    Expected,
    live_answers,
    make_family,
    post,
    question,
    request_bytes,
    send,
    serving,
)

ANSWERED, MALFORMED, OVERSIZED, CANCELLED = "answered", "malformed", "oversized", "cancelled"
SHARES = {ANSWERED: 0.75, MALFORMED: 0.1, OVERSIZED: 0.05, CANCELLED: 0.1}


@dataclass(frozen=True)
class Load:
    """What is sent where."""

    port: int
    expected: Expected
    models: Sequence[str]
    clients: int
    requests: int
    seed: int = 0


@dataclass
class Report:
    """What came of it."""

    kinds: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    """Requests that were lost, or answered otherwise than they should be."""
    seconds: list[float] = field(default_factory=list)
    """Of each that was answered."""
    wall_seconds: float = 0.0

    def __str__(self) -> str:
        cuts = statistics.quantiles(self.seconds, n=100)
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        wrong = len(self.problems)
        return (
            f"{self.kinds.total()} requests ({kinds}) in {self.wall_seconds:.1f} s, {wrong} lost or wrong\n"
            f"seconds of those answered: median {cuts[49]:.2f}, 95 % {cuts[94]:.2f}, 99 % {cuts[98]:.2f}"
        )


async def run_load(load: Load) -> Report:
    """Send all requests, each client one after the other."""
    report = Report()
    numbers = iter(range(load.requests))

    async def client() -> None:
        for number in numbers:
            chance = random.Random(f"{load.seed}-{number}")
            kind = chance.choices([*SHARES], [*SHARES.values()])[0]
            report.kinds[kind] += 1
            try:
                await _SENDERS[kind](load, chance, report)
            except Exception as error:
                report.problems.append(f"request {number}, {kind}: {type(error).__name__} {error}")

    start = time.monotonic()
    await asyncio.gather(*(client() for _ in range(load.clients)))
    report.wall_seconds = time.monotonic() - start
    # Who went away has left nothing behind, and every model still answers.
    if waiting := await _still_computed(load.port):
        report.problems.append(f"{waiting} requests are computed for nobody")
    for model in load.models:
        await _good(load, random.Random(model), report, model)
    return report


async def _still_computed(port: int) -> float:
    """Requests that the server computes though no client is left, after some seconds at most."""
    for _ in range(50):
        metrics = (await send(port, b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")).body.decode()
        lines = re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} (.*)$", metrics, re.MULTILINE)
        assert lines
        if not (count := sum(map(float, lines))):
            break
        await asyncio.sleep(0.2)
    return count


async def _good(load: Load, chance: random.Random, report: Report, model: str | None = None) -> None:
    model = model or chance.choice(load.models)
    text = chance.choice(TEXTS + QUESTIONS)
    path, values = question(model, text, stream=chance.random() < 0.3)
    start = time.monotonic()
    answer = await post(load.port, path, values, chunked=chance.random() < 0.2)
    report.seconds.append(time.monotonic() - start)
    if answer.status != 200:
        report.problems.append(f"{model}, {text!r}: {answer.status} {answer.body[:200]!r}")
    elif answer.model != model or answer.ids != load.expected[model, text]:
        owners = [one for one in load.models if load.expected[one, text] == answer.ids]
        report.problems.append(f"{model}, {text!r}: answered as {answer.model}, with the text of {owners or 'nobody'}")


async def _malformed(load: Load, chance: random.Random, report: Report) -> None:
    model = chance.choice(load.models)
    path, values = question(model, chance.choice(TEXTS + QUESTIONS))
    whole = json.dumps(values).encode()
    body, content_type = chance.choice(
        [
            (whole[:-2], "application/json"),
            (b"\xff\xfe" + whole, "application/json"),
            (whole, "text/plain"),
            (b"", "application/json"),
            (b"[" * 5000, "application/json"),
            (json.dumps(values | {"model": "nobody"}).encode(), "application/json"),
            (json.dumps(values | {"model": 5}).encode(), "application/json"),
            (json.dumps(values | {"prompt": None, "messages": None}).encode(), "application/json"),
            (json.dumps(values | {"prompt": "<|adept_3|>", "messages": "<|adept_3|>"}).encode(), "application/json"),
            (json.dumps(values | {"temperature": "hot"}).encode(), "application/json"),
        ]
    )
    answer = await send(load.port, request_bytes(path, body, content_type=content_type))
    if not 400 <= answer.status < 500:
        report.problems.append(f"malformed {body[:80]!r}: {answer.status} {answer.body[:200]!r}")


async def _oversized(load: Load, chance: random.Random, report: Report) -> None:
    size = chance.choice([2_000, 200_000, 4_000_000])
    path, values = question(chance.choice(load.models), chance.choice(TEXTS))
    answer = await post(load.port, path, values | {"prompt": "x " * size})
    if not 400 <= answer.status < 500:
        report.problems.append(f"oversized by {size}: {answer.status} {answer.body[:200]!r}")


async def _cancelled(load: Load, chance: random.Random, report: Report) -> None:
    path, values = question(chance.choice(load.models), chance.choice(TEXTS + QUESTIONS), stream=chance.random() < 0.5)
    data = request_bytes(path, json.dumps(values | {"max_tokens": 100, "ignore_eos": True}).encode())
    _, writer = await asyncio.open_connection("127.0.0.1", load.port)
    writer.write(data[: chance.choice([len(data) - 20, len(data)])])
    await writer.drain()
    await asyncio.sleep(chance.uniform(0, 1))
    writer.transport.abort()


_SENDERS = {ANSWERED: _good, MALFORMED: _malformed, OVERSIZED: _oversized, CANCELLED: _cancelled}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2000)
    flags = parser.parse_args()
    sizes = {f"a{number}": (number * ROWS // flags.adapters, 1 + number % 7) for number in range(flags.adapters)}
    with tempfile.TemporaryDirectory() as folder:
        family = make_family(Path(folder), sizes)
        models = [BASE, *sizes]
        expected = live_answers(family, models)
        log = Path(folder) / "log"
        with serving(str(find_vllm().python), family, "--folder", str(family.tasks), log=log) as port:
            report = asyncio.run(run_load(Load(port, expected, models, flags.clients, flags.requests)))
    print(report, *report.problems[:20], sep="\n")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
