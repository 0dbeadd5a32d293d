"""Text-to-text tasks from training to scores, by the real entry points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5ForConditionalGeneration

from adept_ds.model.adapted_model import AdaptedModel
from tests.conftest import BY_LAUNCHER, RunRanks, losses, run_settings
from tests.models import EOS, save, seeded, t5_config, talkative_t5

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
    tiny_t5: Path, local_tasks: Path, run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A run on two ranks, and its settings."""
    run_dir = tmp_path_factory.mktemp("tasks") / "run"
    chosen = settings(tiny_t5, run_dir, local_tasks)
    result = run_ranks(2, "launchers/train.py", chosen)
    assert result.returncode == 0, result.stdout
    assert "train: 48 examples" in result.stdout
    assert "validation: 8 examples" in result.stdout
    return run_dir, chosen


def test_a_mixture_trains(run: tuple[Path, dict[str, Any]]) -> None:
    run_dir, _ = run
    curve = losses(run_dir)
    assert sum(curve[-3:]) < sum(curve[:3])
    assert json.loads((run_dir / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("flag", ["--adapter", "--adapters"])
def test_a_backbone_that_is_split_over_the_ranks_writes_the_same_answers(
    run: tuple[Path, dict[str, Any]], run_ranks: RunRanks, tmp_path: Path, flag: str
) -> None:
    run_dir, chosen = run
    best = str(run_dir / "best")
    adapters = [best] if flag == "--adapter" else [f"{task}={best}" for task in ("rte", "cb")]
    for sharding, ranks in (("zero3", 2), ("none", 0)):
        evaluation = {"sharding": sharding, "max_examples": 5, "generation": {"batch_size": 2}}
        flags = (flag, *adapters, "--out", str(tmp_path / sharding))
        result = run_ranks(ranks, "evals/text2text.py", {**chosen, "eval": evaluation}, *flags)
        assert result.returncode == 0, result.stdout
    for task in ("rte", "cb"):
        split, whole = ((tmp_path / name / task / "predictions.jsonl").read_text() for name in ("zero3", "none"))
        assert split == whole


def test_scores_do_not_depend_on_ranks(run: tuple[Path, dict[str, Any]], run_ranks: RunRanks, tmp_path: Path) -> None:
    run_dir, chosen = run
    chosen = {**chosen, "eval": {"generation": {"batch_size": 3}}}
    for ranks, more in ((2, BY_LAUNCHER), (0, ())):
        flags = ("--adapter", str(run_dir / "best"), "--out", str(tmp_path / str(ranks)), *more)
        result = run_ranks(ranks, "evals/text2text.py", chosen, *flags)
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


@pytest.fixture(scope="module")
def talkative(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny T5 with weights that make it say something else to every input, half of its tokens ending an answer."""
    config = t5_config(vocab_size=400, d_ff=64, initializer_factor=2.0)
    model = seeded(lambda: talkative_t5(config), seed=3)
    model.generation_config.eos_token_id = [EOS, *range(2, config.vocab_size, 2)]
    return save(model, tiny_tokenizer, tmp_path_factory.mktemp("talkative"))


def free_text_settings(model: Path, run_dir: Path, folder: Path) -> dict[str, Any]:
    found = run_settings(model, run_dir, max_steps=6)
    found["data"] = {"format": "tasks", "tasks": [str(folder / "say.json")]}
    found["eval"] = {"every_steps": 2, "metric": "task", "generation": {"batch_size": 1}}
    return found


@pytest.fixture(scope="module")
def free_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of free text, so that answers have different lengths."""
    folder = tmp_path_factory.mktemp("say")
    task = {"files": {"train": "train.jsonl", "validation": "train.jsonl"}, "source": "{text}", "target": "answer"}
    (folder / "say.json").write_text(json.dumps({**task, "metrics": ["token_f1", "exact_match"]}))
    rows = [{"text": f"{'ab' * i} {i}", "answer": f"{chr(97 + i)} {i}"} for i in range(9)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_ranks_whose_answers_end_early_wait_for_the_others_and_the_best_has_the_best_metric(
    talkative: Path, free_text: Path, run_ranks: RunRanks, tmp_path: Path
) -> None:
    evaluations = {}
    for ranks in (2, 0):
        run_dir = tmp_path / str(ranks)
        result = run_ranks(ranks, "launchers/train.py", free_text_settings(talkative, run_dir, free_text))
        assert result.returncode == 0, result.stdout
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        evaluations[ranks] = [line for line in lines if "eval/task" in line]
    assert [line["step"] for line in evaluations[2]] == [2, 4, 6]
    for two, one in zip(evaluations[2], evaluations[0], strict=True):
        assert two["eval/task"] == two["eval/say/token_f1"]
        assert two == pytest.approx(one, rel=1e-3)
    status = json.loads((tmp_path / "2" / "status.json").read_text())
    best = max(evaluations[2], key=lambda line: line["eval/task"])
    assert (status["best_step"], status["best_value"]) == (best["step"], best["eval/task"])

    backbone = T5ForConditionalGeneration.from_pretrained(talkative)
    model = AdaptedModel.from_pretrained(backbone, tmp_path / "2" / "best")
    tokenizer = AutoTokenizer.from_pretrained(talkative)
    texts = [json.loads(line)["text"] for line in (free_text / "train.jsonl").read_text().splitlines()]
    answers = [model.generate(tokenizer(text, return_tensors="pt").input_ids, max_new_tokens=20)[0] for text in texts]
    assert len({len(answer) for answer in answers}) > 2
