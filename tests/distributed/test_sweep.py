"""A sweep of small runs by the real launchers: stopped in the middle, gone on with, and one member that fails."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Launch, Start, losses, run_settings

pytestmark = pytest.mark.slow

SWEEP = "launchers/sweep.py"
STEPS = 120


def states(folder: Path) -> list[str]:
    return [member["state"] for member in json.loads((folder / "sweep.json").read_text())["members"]]


def test_a_sweep_stops_cleanly_and_goes_on(tiny_llama: Path, start: Start, launch: Launch, tmp_path: Path) -> None:
    settings = run_settings(tiny_llama, tmp_path / "sweep", max_steps=STEPS, save_every=STEPS)
    settings["eval"] = {"every_steps": STEPS}
    process = start(0, SWEEP, settings, "--grid", "train.seed=[1, 2]", "--launcher", "python")
    try:
        second = wait_for_second_run(tmp_path / "sweep", process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1, output
    assert "1 of 2 runs are not finished" in output
    assert states(tmp_path / "sweep") == ["finished", "interrupted"]
    interrupted_at = json.loads((second / "status.json").read_text())["step"]
    (first,) = [path.parent for path in (tmp_path / "sweep").glob("*/status.json") if path.parent != second]
    written = (first / "status.json").stat().st_mtime_ns

    result = launch(0, SWEEP, settings, "--grid", "train.seed=[1, 2]", "--launcher", "deepspeed --num_gpus 1")
    assert result.returncode == 0, result.stdout
    assert f"step {interrupted_at}: going on from" in result.stdout
    assert states(tmp_path / "sweep") == ["finished", "finished"]
    assert (first / "status.json").stat().st_mtime_ns == written
    assert len(losses(second)) == STEPS
    assert "*     2/2" in (tmp_path / "sweep" / "sweep.txt").read_text()


def test_a_member_that_fails_does_not_stop_the_others(tiny_llama: Path, launch: Launch, tmp_path: Path) -> None:
    settings = run_settings(tiny_llama, tmp_path / "sweep", max_steps=4, warmup_steps=0)
    grid = "train.learning_rate.soft_prompt=[1e30, 0.03]"
    result = launch(0, SWEEP, settings, "--grid", grid, "--launcher", "python")
    assert result.returncode == 1, result.stdout
    assert states(tmp_path / "sweep") == ["failed", "finished"]
    assert "UserError: the loss of step 3 is nan" in (tmp_path / "sweep" / "sweep.txt").read_text()


def wait_for_second_run(folder: Path, process: Any) -> Path:
    """The run folder of the second member, once it has taken two steps."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        for metrics in folder.glob("*/metrics.jsonl"):
            status = json.loads((metrics.parent / "status.json").read_text())
            is_second = len(list(folder.glob("*/status.json"))) == 2 and status["state"] == "running"
            if is_second and len(losses(metrics.parent)) >= 2:
                return metrics.parent
        time.sleep(0.01)
    output = process.communicate()[0] if process.poll() is not None else "too slow"
    raise AssertionError(f"the second run was not seen: {output}")
