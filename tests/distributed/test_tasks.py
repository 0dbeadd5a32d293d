"""Text-to-text tasks from training to scores, by the real entry points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import Launch, losses, run_settings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def local_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RTE and CB as small files: the label follows from one word of the first sentence."""
    folder = tmp_path_factory.mktemp("tasks")
    columns = {"rte": ("sentence1", "sentence2"), "cb": ("premise", "hypothesis")}
    for task, (first, second) in columns.items():
        (folder / task).mkdir()
        for split, count in (("train", 24), ("validation", 22)):
            rows = [{first: f"{['no', 'yes'][i % 2]} {i}", second: "it is so", "label": i % 2} for i in range(count)]
            (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(model: Path, run_dir: Path, local_tasks: Path) -> dict[str, Any]:
    found = run_settings(model, run_dir, max_steps=10, learning_rate={"soft_prompt": 0.3, "network": 0.01})
    found["data"] = {"format": "tasks", "tasks": ["rte", "cb"], "path": str(local_tasks), "mixture": "equal"}
    found["eval"] = {"every_steps": 5, "max_examples": 8}
    return found


@pytest.fixture(scope="module")
def run(
    tiny_t5: Path, local_tasks: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A run on two ranks, and its settings."""
    run_dir = tmp_path_factory.mktemp("tasks") / "run"
    chosen = settings(tiny_t5, run_dir, local_tasks)
    result = launch(2, "launchers/train.py", chosen)
    assert result.returncode == 0, result.stdout
    assert "train: 48 examples" in result.stdout
    assert "validation: 8 examples" in result.stdout
    return run_dir, chosen


def test_a_mixture_trains(run: tuple[Path, dict[str, Any]]) -> None:
    run_dir, _ = run
    curve = losses(run_dir)
    assert sum(curve[-3:]) < sum(curve[:3])
    assert json.loads((run_dir / "status.json").read_text())["state"] == "finished"


def test_scores_do_not_depend_on_ranks(run: tuple[Path, dict[str, Any]], launch: Launch, tmp_path: Path) -> None:
    run_dir, chosen = run
    chosen = {**chosen, "eval": {"generation": {"batch_size": 3}}}
    for ranks in (2, 0):
        out = str(tmp_path / str(ranks))
        result = launch(ranks, "evals/text2text.py", chosen, "--adapter", str(run_dir / "best"), "--out", out)
        assert result.returncode == 0, result.stdout
    for task in ("rte", "cb"):
        two, one = ((tmp_path / ranks / task / "predictions.jsonl").read_text() for ranks in ("2", "0"))
        assert two == one
        lines = [json.loads(line) for line in two.splitlines()]
        assert [line["task_id"].rpartition("/")[0] for line in lines] == [f"{task}/test"] * 11
        summary = json.loads((tmp_path / "2" / task / "summary.json").read_text())
        assert summary["examples"] == 11
        right = sum(line["answer"] == line["references"][0] for line in lines)
        assert summary["metrics"]["accuracy"]["value"] == pytest.approx(right / 11)
        assert summary["protocol"]["variant"] == "fixed"
