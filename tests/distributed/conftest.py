"""The real launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import RunRanks, losses, run_settings
from tests.models import save
from tests.ranks import REPOSITORY, free_port

__all__ = ["REPOSITORY", "Launch", "RunRanks", "Start", "free_port", "losses", "run_settings", "save"]

Start = Callable[..., subprocess.Popen]
Launch = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="session")
def start(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Start an entry point on so many ranks of the real `deepspeed` launcher; on 0 ranks with plain python."""

    def start_ranks(ranks: int, script: str, settings: Any, *arguments: str) -> subprocess.Popen:
        config = tmp_path_factory.mktemp("config") / "run.json"
        config.write_text(json.dumps(settings))
        launcher = (
            ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port())] if ranks else [sys.executable]
        )
        return subprocess.Popen(
            [*launcher, script, "--config", str(config), *arguments],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return start_ranks


@pytest.fixture(scope="session")
def launch(start: Start) -> Launch:
    """As `start`, and wait for the end."""

    def launch_ranks(ranks: int, script: str, settings: Any, *arguments: str) -> subprocess.CompletedProcess:
        process = start(ranks, script, settings, *arguments)
        try:
            output, _ = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, output)

    return launch_ranks
