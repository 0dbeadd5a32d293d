"""What a GPU is needed for, in one go: the marked tests, then one table of training speed and memory at full size.

    make gpu-check                                      at most 6 minutes on one card; no network, no data, no weights
    python -m adept_ds.benchmark.gpu_check --device cpu --no-tests     tiny models, to try the script itself

Llama3-8B and T5-3B have the shapes that ship with the package, random weights and random tokens. A row is one setting,
measured by the parts of `adept-ds throughput`, in a process that others do not share with a row that failed: what goes
wrong in one, running out of memory for instance, stands in its place in the table. The most wanted rows come first;
those that the time does not suffice for are named. A setting that this version does not have is a row that says so.

The plan is that of the planner for the step's device memory, without CUDA's context; it does not know of compiling.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import resources
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from adept_ds.backbone.load import resolve_architecture
from adept_ds.benchmark import Options, benchmark
from adept_ds.benchmark.contenders import FLOOR, OURS
from adept_ds.benchmark.contenders import PACKED as PACKED_ROWS
from adept_ds.benchmark.work import SYNTHETIC_TARGET_SHARE
from adept_ds.config.command_line import parse_count
from adept_ds.config.run import RunConfig
from adept_ds.distributed import on_gpu
from adept_ds.errors import UserError
from adept_ds.files import atomic_write
from adept_ds.planner.memory import Cluster, MemoryModel

SECONDS = 360
ROW_SECONDS = 90
"""The most for a row, so that one that hangs does not take the others' time."""
LEAST_SECONDS = 5
SECONDS_TO_REPORT = 5
TEST_SHARE = 0.5
"""Of the time, which the tests may take at most."""
STEPS, ROUNDS = 4, 3
LENGTH, TINY_LENGTH = 512, 16
"""Of the examples, in tokens."""
LEFT_BYTES = 2**26
"""A process with more than this on the GPU behind a row is not used for another one."""
GIB = 2**30
ROW_FIELDS = ("state", "reason", "seconds", "figures", "floor", "plan_bytes", "machine")
MEASURED, ABSENT, REFUSED, FAILED, LEFT_OUT = "measured", "not here", "refused", "failed", "left out"

Settings = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Subject:
    """A model of the table."""

    name: str
    shape: str
    """Name of the shape that ships with the package."""
    virtual_tokens: int
    bottleneck: int
    batch: int
    targets: int
    """Of an encoder-decoder model's target; 0 for others."""
    tiny: dict[str, Any]
    """What the shape has on a CPU."""


SUBJECTS = (
    Subject(
        "Llama3-8B",
        "meta-llama-3-8b",
        virtual_tokens=7,
        bottleneck=1,
        batch=4,
        targets=0,
        tiny={
            "vocab_size": 128,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
        },
    ),
    Subject(
        "T5-3B",
        "t5-3b",
        virtual_tokens=60,
        bottleneck=19,
        batch=8,
        targets=20,
        tiny={
            "vocab_size": 128,
            "d_model": 64,
            "d_ff": 64,
            "d_kv": 32,
            "num_heads": 2,
            "num_layers": 2,
            "num_decoder_layers": 2,
        },
    ),
)

PRECISIONS: dict[str, Settings] = {
    "bf16": {},
    "nf4": {"model": {"quantization": "nf4"}},
    "fp8": {"model": {"quantization": "fp8"}},
}
PLAIN, COMPILED, PACKED = "plain torch", "compiled", "packed"
BY_WEIGHT, BY_LAYER, BY_LAYER_COMPILED = "ZeRO-3 by weight", "ZeRO-3 by layer", "ZeRO-3 by layer, compiled"
VARIANTS: dict[str, Settings] = {
    PLAIN: {},
    COMPILED: {"train": {"compile": True}},
    PACKED: {},
    BY_WEIGHT: {"train": {"sharding": "global", "gather": "weight"}},
    BY_LAYER: {"train": {"sharding": "global", "gather": "layer"}},
    BY_LAYER_COMPILED: {"train": {"sharding": "global", "gather": "layer", "compile": True}},
}
ORDER = (
    ("bf16", PLAIN),
    ("bf16", BY_WEIGHT),
    ("bf16", BY_LAYER),
    ("bf16", COMPILED),
    ("fp8", PLAIN),
    ("nf4", PLAIN),
    ("bf16", PACKED),
    ("bf16", BY_LAYER_COMPILED),
    ("nf4", BY_LAYER),
    ("fp8", COMPILED),
    ("nf4", COMPILED),
    ("fp8", BY_LAYER),
    ("nf4", BY_WEIGHT),
    ("fp8", BY_WEIGHT),
    ("nf4", PACKED),
    ("fp8", PACKED),
    ("nf4", BY_LAYER_COMPILED),
    ("fp8", BY_LAYER_COMPILED),
)
"""The rows of a model, the most wanted first."""


@dataclass
class Row:
    """A line of the table."""

    subject: Subject
    precision: str
    variant: str
    state: str = LEFT_OUT
    reason: str = "the time was over"
    seconds: float = 0.0
    """Time that it took, with all that comes before the first step."""
    figures: dict[str, Any] = field(default_factory=dict)
    """Of ADePT; see `benchmark`."""
    floor: dict[str, Any] | None = None
    """Of what it is beside in the same process: the bare backbone, or, of packed rows, the same examples padded."""
    plan_bytes: int | None = None
    machine: dict[str, Any] = field(default_factory=dict)

    def take(self, result: dict[str, Any]) -> None:
        """Fill in what `measured` returned."""
        for name, value in result.items():
            setattr(self, name, value)

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.subject.name}, {self.precision}, {self.variant}"

    @property
    def on_ranks(self) -> bool:
        """Whether it is measured in DeepSpeed's engine."""
        return "sharding" in VARIANTS[self.variant].get("train", {})

    def settings(self, folder: Path | None) -> dict[str, Any]:
        """Those of the run; with a `folder` that of a tiny model, whose shape is put into it."""
        subject = self.subject
        model, batch, length = subject.shape, subject.batch, LENGTH
        if folder is not None:
            model, batch, length = str(_tiny_shape(subject, folder)), 2, TINY_LENGTH
        longest = length + subject.virtual_tokens
        labels = 0 if subject.targets else max(1, round(SYNTHETIC_TARGET_SHARE * length))
        values: dict[str, Any] = {
            "model": {"name_or_path": model, "dtype": "bf16"},
            "method": {"num_virtual_tokens": subject.virtual_tokens, "bottleneck": subject.bottleneck},
            # So the longest batch, which the planner counts, is the one that is measured.
            "data": {"max_prompt_length": longest - labels, "max_length": longest + subject.targets},
            "train": {"max_steps": 1000, "global_batch_size": batch, "warmup_steps": 0, "sharding": "replicate"},
        }
        for changes in (PRECISIONS[self.precision], VARIANTS[self.variant]):
            for section, own in changes.items():
                values[section] |= own
        if self.variant == PACKED:
            # About as many rows of the longest example's length as there are examples in other rows of the table.
            values["train"] |= {"packing": longest, "micro_batch_size": batch, "global_batch_size": 2 * batch}
        return values


def _tiny_shape(subject: Subject, folder: Path) -> Path:
    shipped = resources.files("adept_ds.backbone") / "architectures" / f"{subject.shape}.json"
    path = folder / f"tiny-{subject.shape}"
    path.mkdir(exist_ok=True)
    shape = json.loads(shipped.read_text(encoding="utf-8")) | subject.tiny
    (path / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    return path


def measured(settings: dict[str, Any], on_ranks: bool, is_tiny: bool) -> dict[str, Any]:
    """Measure a row in this process; return its state, the reason if it is not measured, and its figures."""
    try:
        run = RunConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        return {"state": ABSENT, "reason": f"{'.'.join(map(str, first['loc']))}: {first['msg']}"}
    length, is_packed = TINY_LENGTH if is_tiny else LENGTH, run.train.packing is not None
    options = Options(
        steps=1 if is_tiny else STEPS,
        rounds=1 if is_tiny else ROUNDS,
        random_init=True,
        synthetic=(length // 8, length // 4, length) if is_packed else (length,),
        brief=True,
        on_ranks=on_ranks,
    )
    try:
        result = benchmark(run, options)
    except UserError as error:
        return {"state": REFUSED, "reason": str(error)}
    except Exception as error:
        # Whatever it is, the rows behind this one are measured all the same.
        return {"state": FAILED, "reason": f"{type(error).__name__}: {error}".partition("\n")[0]}
    figures = result["contenders"]
    return {
        "state": MEASURED,
        "reason": " ".join(note for note in result["notes"] if note.startswith("train.compile")),
        "figures": figures[PACKED_ROWS if is_packed else OURS],
        "floor": figures.get(OURS if is_packed else FLOOR),
        "machine": result["machine"],
    }


def _work(requests: Connection, log: str) -> None:
    """Measure what is asked for until there is nothing more; what else would be printed goes into the log."""
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    while (request := requests.recv()) is not None:
        result = measured(**request)
        gc.collect()
        left = torch.cuda.memory_allocated() if on_gpu() else 0
        requests.send(result | {"is_clean": result["state"] != FAILED and left < LEFT_BYTES})


class Worker:
    """A process that measures rows, begun anew behind one that failed."""

    def __init__(self, log: str) -> None:
        self._log = log
        self._process: Any = None

    def measure(self, request: dict[str, Any], seconds: float, meanwhile: Callable[[], None]) -> dict[str, Any]:
        """Return what `measured` does, after so many seconds at the latest; call `meanwhile` while it is at work."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_work, args=(theirs, self._log), daemon=False)
            self._process.start()
            theirs.close()
        end = time.monotonic() + seconds
        try:
            self._pipe.send(request)
            meanwhile()
            if not self._pipe.poll(max(0.0, end - time.monotonic())):
                self.stop(politely=False)
                return {"state": LEFT_OUT, "reason": f"it was not done within {seconds:.0f} s"}
            result: dict[str, Any] = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            self.stop()
            return {"state": FAILED, "reason": f"its process ended with exit status {code}"}
        if not result.pop("is_clean"):
            self.stop()
        return result

    def stop(self, politely: bool = True) -> None:
        """End the process, if there is one; `politely` lets it end by itself within some seconds."""
        if self._process is None:
            return
        if politely:
            with suppress(OSError):
                self._pipe.send(None)
            self._process.join(SECONDS_TO_REPORT)
        self._process.kill()
        self._process.join()
        self._pipe.close()
        self._process = None


class Plans:
    """What the planner says of rows, each model and precision executed once."""

    def __init__(self) -> None:
        self._models: dict[str, MemoryModel] = {}

    def peak_bytes(self, settings: dict[str, Any]) -> int | None:
        """Peak on the device without CUDA's context; None where the settings cannot be planned."""
        # These change nothing that the planner counts.
        train = {name: value for name, value in settings["train"].items() if name not in ("sharding", "compile")}
        key = json.dumps(settings | {"train": train})
        try:
            if key not in self._models:
                run = RunConfig.model_validate(settings)
                architecture = resolve_architecture(run.model)[0]
                cluster = Cluster(1, 1, 2**40, "cuda" if on_gpu() else "cpu")
                self._models[key] = MemoryModel(run, architecture, cluster)
            memory = self._models[key].plan(settings["train"]["sharding"], with_largest=False).memory
        except (ValidationError, UserError):
            return None  # the row says why
        return memory.total - memory.runtime


def run_tests(seconds: float) -> dict[str, Any]:
    """Run the tests that need a GPU, for so long at most; return how they ended."""
    files = [str(path) for path in sorted(Path("tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    if not files:
        return {"state": ABSENT, "reason": "no tests in this folder; run it in the repository"}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", *files]
    process = subprocess.Popen(command, start_new_session=True)
    start = time.monotonic()
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return {"state": LEFT_OUT, "reason": f"the tests were not done within {seconds:.0f} s"}
    spent = time.monotonic() - start
    if code:
        return {"state": FAILED, "reason": f"pytest ended with exit status {code}", "seconds": spent}
    return {"state": MEASURED, "reason": "", "seconds": spent}


def check(rows: Sequence[Row], deadline: float, folder: Path | None, log: str, save: Callable[[], None]) -> None:
    """Measure the rows, one after another, as long as there is time before `deadline` on the monotonic clock.

    Args:
        rows: What is measured; filled in.
        deadline: When to end.
        folder: For shapes of tiny models in place of the real ones; None measures the real ones.
        log: File for what the processes print.
        save: Called behind each row.
    """
    plans, worker = Plans(), Worker(log)
    try:
        for number, row in enumerate(rows, 1):
            start = time.monotonic()
            left = min(deadline - start, ROW_SECONDS)
            if left < LEAST_SECONDS:
                continue
            _progress(f"{number} of {len(rows)}, {deadline - start:.0f} s left: {row.name}")
            settings = row.settings(folder)

            def plan(row: Row = row, settings: dict[str, Any] = settings) -> None:
                row.plan_bytes = plans.peak_bytes(settings)

            request = {"settings": settings, "on_ranks": row.on_ranks, "is_tiny": folder is not None}
            result = worker.measure(request, left, plan)
            row.take(result)
            row.seconds = time.monotonic() - start
            _progress(f"    {row.state} in {row.seconds:.1f} s{': ' if row.reason else ''}{row.reason}")
            save()
    finally:
        worker.stop()


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of the table, a model's rows together."""
    yield f"{'':44}{'tokens/s':>10}{'s/step':>9}{'MFU':>7}{'peak GiB':>10}{'plan GiB':>10}{'of plain':>10}"
    for subject in SUBJECTS:
        own = [row for row in rows if row.subject is subject]
        base = next((row.figures for row in own if row.figures and (row.precision, row.variant) == ORDER[0]), None)
        for row in own:
            if row.state != MEASURED:
                yield f"{row.name:44}{row.state}: {row.reason}"
                continue
            if row.floor:
                beside = "padded" if row.variant == PACKED else "floor"
                yield _line(f"{row.subject.name}, {row.precision}, {beside}", row.floor, None, base)
            yield _line(row.name, row.figures, row.plan_bytes, base) + (f"  {row.reason}" if row.reason else "")


def _line(name: str, figures: dict[str, Any], plan: int | None, base: dict[str, Any] | None) -> str:
    mfu = "-" if figures["mfu"] is None else f"{figures['mfu']:.1%}"
    planned = "-" if plan is None else f"{plan / GIB:.3f}"
    speed = f"{figures['tokens_per_second'] / base['tokens_per_second']:.3f}" if base else "-"
    return (
        f"{name:44}{figures['tokens_per_second']:10.1f}{figures['seconds_per_step']:9.4f}{mfu:>7}"
        f"{figures['memory_bytes']['peak'] / GIB:10.3f}{planned:>10}{speed:>10}"
    )


def main(arguments: Sequence[str]) -> int:
    """Check; the exit status is 1 if a test or a row failed, and 2 without a GPU."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny models, to try the script")
    parser.add_argument("--seconds", type=parse_count, default=SECONDS, help=f"time for all of it (default: {SECONDS})")
    parser.add_argument("--rows", type=parse_count, help="only so many rows, the most wanted first")
    parser.add_argument("--no-tests", action="store_true", help="the table alone")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu_check.json"), help="figures as JSON (default: %(default)s)"
    )
    flags = parser.parse_args(arguments)
    deadline = start + flags.seconds - SECONDS_TO_REPORT
    if flags.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # for DeepSpeed and for the processes that measure
    elif not torch.cuda.is_available():
        print("no GPU here: torch sees no CUDA device; --device cpu tries the script with tiny models", file=sys.stderr)
        return 2
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [Row(subject, *kind) for kind in ORDER for subject in SUBJECTS][: flags.rows]
    tests: dict[str, Any] = {"state": LEFT_OUT, "reason": "--no-tests"}
    if not flags.no_tests:
        tests = run_tests(TEST_SHARE * flags.seconds)

    def save() -> None:
        with atomic_write(flags.out) as file:
            own = [{"name": row.name} | {key: getattr(row, key) for key in ROW_FIELDS} for row in rows]
            json.dump({"device": flags.device, "tests": tests, "rows": own}, file, indent=2)

    with tempfile.TemporaryDirectory() as temporary:
        log = str(flags.out.with_suffix(".log"))
        check(rows, deadline, Path(temporary) if flags.device == "cpu" else None, log, save)
    save()
    machine = next((row.machine for row in rows if row.machine), {})
    print(
        "tiny models, whose figures say nothing about a GPU" if flags.device == "cpu" else "random weights and tokens"
    )
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"tests: {tests['state']} {tests['reason']}".rstrip())
    print("\n".join(table(rows)))
    print(f"{time.monotonic() - start:.0f} s; figures: {flags.out}; what the processes printed: {log}")
    return int(FAILED in (tests["state"], *(row.state for row in rows)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
