"""Text-to-text evaluation in one process: decoding of answers, files, the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from adept_ds.cli.text2text import main, with_tasks
from adept_ds.config.method import AdeptConfig, LstConfig, MethodConfig
from adept_ds.config.run import DataConfig, ModelConfig, RunConfig
from adept_ds.data.tasks import TaskExamples, load_task_examples
from adept_ds.distributed import World
from adept_ds.errors import UserError
from adept_ds.evaluation.generate import generate_samples
from adept_ds.evaluation.text2text import evaluate_tasks, greedy, score_to_folder, validation_metrics
from adept_ds.model.adapted_model import get_adept_model
from tests.models import save


@pytest.fixture
def cfg(tmp_path: Path) -> DataConfig:
    (tmp_path / "rte").mkdir()
    rows = [{"sentence1": f"a{i}", "sentence2": "b", "label": i % 2} for i in range(8)]
    (tmp_path / "rte" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(format="tasks", tasks=("rte",), path=str(tmp_path))


@pytest.fixture
def examples(cfg: DataConfig) -> TaskExamples:
    return load_task_examples(cfg, "test")


@pytest.mark.parametrize("method", [AdeptConfig(num_virtual_tokens=3, bottleneck=2), LstConfig(reduction=2)])
@pytest.mark.parametrize("name", ["llama", "t5-tied"])
def test_answers_are_decoded_for_either_kind_of_model(
    name: str,
    method: MethodConfig,
    make_backbone: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    cfg: DataConfig,
    examples: TaskExamples,
    world: World,
) -> None:
    model = get_adept_model(make_backbone(name), method)
    decoding = greedy(examples[0].task, tokenizer, run_config(**cfg.model_dump()))
    assert (decoding.do_sample, decoding.max_new_tokens) == (False, 2)
    samples = generate_samples(model, tokenizer, examples, decoding, cfg, world)
    assert [sample.task_id for sample in samples] == [example.task_id for example in examples]
    assert all(len(sample.completion) <= 2 for sample in samples)


def test_predictions_lie_beside_the_scores(
    examples: TaskExamples, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = [example.references[0] for example in examples]
    score_to_folder(examples, [" maybe", f"{right[1]}\nx", *right[2:]], tokenizer, tmp_path / "out", {"name": "n"})
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["name"], summary["examples"], summary["invalid"], summary["reported"]) == ("n", 4, 1, "accuracy")
    accuracy = summary["metrics"]["accuracy"]
    assert accuracy["low"] <= accuracy["value"] == 0.75 <= accuracy["high"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines] == ["maybe", *right[1:]]
    assert lines[0] == {
        "task_id": examples[0].task_id,
        "source": examples[0].prompt,
        "generated": " maybe",
        "answer": "maybe",
        "references": [right[0]],
    }
    assert "rte: accuracy 75.00" in capsys.readouterr().out


def test_validation_averages_over_tasks_what_each_chooses_by(
    make_backbone: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, world: World
) -> None:
    for task, columns in {"rte": ("sentence1", "sentence2"), "cb": ("premise", "hypothesis")}.items():
        (tmp_path / task).mkdir()
        rows = [{**dict.fromkeys(columns, f"a{i}"), "label": i % 2} for i in range(12)]
        (tmp_path / task / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_config(format="tasks", tasks=["rte", "cb"], path=str(tmp_path))
    model = get_adept_model(make_backbone("t5-tied"), AdeptConfig(num_virtual_tokens=3, bottleneck=2))
    examples = load_task_examples(run.data, "validation")
    values = validation_metrics(model, tokenizer, examples, run, world)
    assert values.keys() == {"rte/accuracy", "cb/accuracy", "cb/macro_f1", "task"}
    assert values["task"] == pytest.approx((values["rte/accuracy"] + values["cb/macro_f1"]) / 2)


def test_the_examples_of_each_task_are_told_apart(cfg: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "mrpc").symlink_to(tmp_path / "rte")
    both = load_task_examples(cfg.model_copy(update={"tasks": ("mrpc", "rte")}), "test")[:5]
    assert [[example.task.name for example in part] for part in both.by_task()] == [["mrpc"] * 3, ["rte"] * 2]


def run_config(**data: object) -> RunConfig:
    return RunConfig.model_validate({"model": {"name_or_path": "m"}, "train": {"epochs": 1}, "data": data})


def test_tasks_of_the_command_line_keep_what_tasks_share():
    run = with_tasks(run_config(format="tasks", tasks=["rte"], variant="faithful"), ["cb", "mrpc"])
    assert (run.data.tasks, run.data.variant) == (("cb", "mrpc"), "faithful")
    assert with_tasks(run_config(), ["cb"]).data.tasks == ("cb",)


def test_a_config_without_tasks_needs_some():
    with pytest.raises(UserError, match=r"--task TASK is needed, since the config's data\.format is mbpp-paper"):
        with_tasks(run_config(), None)


def test_an_unknown_task_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model": {"name_or_path": "nowhere"}, "train": {"epochs": 1}}))
    with pytest.raises(UserError, match=r"unknown task 'rtee'; .*did you mean 'rte'\?"):
        main(["--config", str(path), "--task", "rtee", "--out", str(tmp_path)])


def test_an_adapter_for_each_task_is_what_it_is_alone(
    make_backbone: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    cfg: DataConfig,
    tmp_path: Path,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("adept_ds.evaluation.text2text.init_world", lambda: world)
    (tmp_path / "cola").mkdir()
    rows = [{"sentence": f"s {i}", "label": i % 2} for i in range(8)]
    (tmp_path / "cola" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save(make_backbone("t5-tied"), tokenizer, tmp_path / "backbone")
    adapters = {}
    for number, task in enumerate(("rte", "cola")):
        model = get_adept_model(make_backbone("t5-tied"), AdeptConfig(num_virtual_tokens=2 + number, bottleneck=2))
        for parameter in model.trainable_parameters().values():
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        model.save_pretrained(tmp_path / task / "adapter")
        adapters[task] = tmp_path / task / "adapter"
    data = {**cfg.model_dump(), "tasks": tuple(adapters)}
    run = run_config(**data)
    run = run.model_copy(update={"model": ModelConfig(name_or_path=str(tmp_path / "backbone"), dtype="fp32")})
    evaluate_tasks(run, None, tmp_path / "together", "test", adapters)
    for task, adapter in adapters.items():
        evaluate_tasks(with_tasks(run, [task]), adapter, tmp_path / "alone", "test")
        together, alone = (tmp_path / place / task for place in ("together", "alone"))
        assert (together / "predictions.jsonl").read_bytes() == (alone / "predictions.jsonl").read_bytes()
        facts = [json.loads((place / "summary.json").read_text()) for place in (together, alone)]
        assert facts[0]["adapter_sha256"] == facts[1]["adapter_sha256"]
        assert facts[0]["method"] == facts[1]["method"]
    with pytest.raises(UserError, match="no adapter for the task 'cola'; expected cola=FOLDER"):
        evaluate_tasks(run, None, tmp_path / "o", "test", {"rte": adapters["rte"]})
    with pytest.raises(UserError, match="has 'colla', which is not evaluated; did you mean 'cola'"):
        evaluate_tasks(run, None, tmp_path / "o", "test", {**adapters, "colla": adapters["rte"]})


def test_a_task_with_two_adapters_is_told(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model": {"name_or_path": "nowhere"}, "train": {"epochs": 1}}))
    words = ["--config", str(path), "--task", "cola", "--out", str(tmp_path), "--adapters", "cola=a", "cola=b"]
    with pytest.raises(UserError, match="--adapters cola=b: 'cola' is a already"):
        main(words)
