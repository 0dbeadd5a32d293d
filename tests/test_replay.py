"""Receipts, and results made again from them, with a tiny real model and the real sandbox."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import destroy_process_group
from transformers import AutoModelForCausalLM

from adept_ds.cli import replay, score
from adept_ds.config.method import AdeptConfig
from adept_ds.config.run import RunConfig
from adept_ds.errors import UserError
from adept_ds.evaluation.mbpp import evaluate
from adept_ds.evaluation.text2text import evaluate_tasks
from adept_ds.formats.registry import bundled_problems
from adept_ds.model.adapted_model import get_adept_model

Replay = Callable[..., tuple[int, str]]
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
"""What this process takes itself for as it decodes; other tests are not to find it in the environment."""


def make_adapter(model: Path, folder: Path, shift: float) -> Path:
    adapted = get_adept_model(
        AutoModelForCausalLM.from_pretrained(model), AdeptConfig(num_virtual_tokens=5, bottleneck=2)
    )
    for parameter in adapted.trainable_parameters().values():
        parameter.data += shift
    adapted.save_pretrained(folder)
    return folder


def settings(model: Path, **sections: Any) -> RunConfig:
    values = {"model": {"name_or_path": str(model), "dtype": "fp32"}, "train": {"epochs": 1}, **sections}
    return RunConfig.model_validate(values)


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of programs with its adapter and problems, and one of a task, in one folder."""
    folder = tmp_path_factory.mktemp("made")
    adapter = make_adapter(tiny_llama, folder / "adapter", 0.3)
    shutil.copy(bundled_problems(), folder / "problems.jsonl")
    (folder / "rte").mkdir()
    rows = [{"sentence1": f"a{i}", "sentence2": "b", "label": i % 2} for i in range(8)]
    (folder / "rte" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    generation = {"max_new_tokens": 8, "num_samples": 2, "stop": ["\n\n\n"]}
    run = settings(
        tiny_llama,
        data={"path": str(folder / "problems.jsonl")},
        eval={"max_examples": 5, "generation": generation},
    )
    with pytest.MonkeyPatch.context() as environment:
        for name, value in ALONE.items():
            environment.setenv(name, value)
        evaluate(run, adapter, folder / "programs", [1, 2], "test", paper=True)
        run = settings(tiny_llama, data={"format": "tasks", "tasks": ["rte"], "path": str(folder)})
        evaluate_tasks(run, adapter, folder / "answers", "test")
    destroy_process_group()
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy of the folder's results, to be changed; adapter and problems are where they were."""
    for name in ("programs", "answers"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def again(world: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Replay:
    """Replay by the command, which leaves the folder as it is; returns its exit status and what it says."""
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)

    def run(folder: Path, *flags: str) -> tuple[int, str]:
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        status = replay.main([str(folder), *flags])
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        return status, capsys.readouterr().out

    return run


def change(path: Path, **values: Any) -> None:
    """Set values at the top of a JSON file, or take them out with None."""
    changed = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in changed.items() if value is not None}))


def test_summaries_carry_what_made_them(made: Path) -> None:
    for name in ("programs", "answers/rte"):
        summary = json.loads((made / name / "summary.json").read_text())
        assert summary["engine"]["name"] == "transformers"
        assert summary["versions"].keys() == {"python", "adept_ds", "torch", "transformers"}
        assert RunConfig.model_validate(summary["settings"]).model.dtype == "fp32"
        assert all(len(summary[name]) == 64 for name in ("weights_fingerprint", "adapter_sha256", "config_sha256"))
        assert summary["processor"]
    assert summary["examples_sha256"]
    summary = json.loads((made / "programs" / "summary.json").read_text())
    assert (summary["scoring"]["k"], summary["scoring"]["paper_scoring"]) == ([1, 2], True)


def test_results_come_to_the_same(place: Path, again: Replay) -> None:
    status, said = again(place)
    assert status == 0, said
    assert "programs: same: scored 10 samples: every verdict and figure is the same" in said
    assert "programs: same: decoded 10 texts: all the same" in said
    assert "rte: same: measured 4 predictions: every answer and figure is the same" in said
    assert "rte: same: decoded 4 texts: all the same" in said


def test_what_comes_out_is_written_elsewhere_on_request(place: Path, again: Replay) -> None:
    out = place / "out"
    assert again(place / "programs", "--out", str(out))[0] == 0
    assert json.loads((out / "replay.json").read_text())["is_same"] is True
    decoded = [json.loads(line) for line in (out / "decoded.jsonl").read_text().splitlines()]
    assert decoded == [json.loads(line) for line in (place / "programs/samples.jsonl").read_text().splitlines()]
    assert len((out / "results.jsonl").read_text().splitlines()) == 10
    with pytest.raises(UserError, match="lies in the folder that is replayed"):
        replay.main([str(place), "--out", str(out)])


def test_a_changed_sample_is_named(place: Path, again: Replay) -> None:
    path = place / "programs" / "samples.jsonl"
    path.write_text(path.read_text().replace('"completion": "', '"completion": "x', 1))
    status, said = again(place / "programs")
    assert status == 1
    assert "CHANGED: samples" in said
    assert "not rescored, since" in said
    assert "not decoded, since" in said


def test_other_texts_are_counted_and_the_first_is_shown(place: Path, again: Replay) -> None:
    folder = place / "programs"
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    lines[3]["completion"] = lines[3]["completion"][:2] + "~" + lines[3]["completion"][2:]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    digest = hashlib.sha256((folder / "samples.jsonl").read_bytes()).hexdigest()
    facts = json.loads((folder / "generation.json").read_text())["facts"]
    change(folder / "generation.json", facts={**facts, "samples_sha256": digest})
    change(folder / "summary.json", samples_sha256=digest)
    status, said = again(folder, "--redecode")
    assert status == 1
    assert f"decoded 10 texts: 1 differ, the first is number 4, of {lines[3]['task_id']}, at character 3" in said


def test_a_changed_verdict_and_figure_are_named(place: Path, again: Replay) -> None:
    path = place / "programs" / "results.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    path.write_text(json.dumps({**json.loads(first), "status": "passed"}) + "\n" + "".join(rest))
    summary = json.loads((place / "answers/rte/summary.json").read_text())
    change(place / "answers/rte/summary.json", invalid=summary["invalid"] + 1)
    status, said = again(place, "--rescore")
    assert status == 1
    assert "scored 10 samples: 1 verdicts differ, the first is number 1, of" in said
    assert "1 figures differ, the first is invalid" in said
    assert "decoded" not in said


def test_another_adapter_is_named(place: Path, tiny_llama: Path, again: Replay) -> None:
    other = make_adapter(tiny_llama, place / "other", 0.2)
    status, said = again(place / "programs", "--redecode", "--adapter", str(other))
    assert status == 1
    assert f"CHANGED: adapter {other}: was " in said


def test_the_same_adapter_and_model_may_lie_elsewhere(place: Path, made: Path, tiny_llama: Path, again: Replay) -> None:
    shutil.copytree(made / "adapter", place / "moved")
    shutil.copytree(tiny_llama, place / "model")
    flags = ("--redecode", "--adapter", str(place / "moved"), "--model", str(place / "model"))
    status, said = again(place / "answers", *flags)
    assert (status, "decoded 4 texts: all the same" in said) == (0, True), said


def test_a_whole_model_in_the_place_of_an_adapter_is_named(place: Path, tiny_llama: Path, again: Replay) -> None:
    status, said = again(place / "answers", "--redecode", "--adapter", str(tiny_llama))
    assert (status, f"CHANGED: adapter {tiny_llama}: was" in said) == (1, True)


def test_another_backbone_is_named(place: Path, tiny_llama: Path, again: Replay) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.lm_head.weight.data += 1
    shutil.copytree(tiny_llama, place / "model")
    model.save_pretrained(place / "model")
    status, said = again(place / "answers", "--redecode", "--model", str(place / "model"))
    assert status == 1
    assert "CHANGED: weights of the backbone" in said


def test_other_problems_are_named(place: Path, made: Path, again: Replay) -> None:
    path, kept = made / "problems.jsonl", (made / "problems.jsonl").read_text()
    try:
        lines = [json.loads(line) for line in kept.splitlines()]
        path.write_text("".join(json.dumps({**line, "text": line["text"] + "!"}) + "\n" for line in lines))
        status, said = again(place / "programs")
        path.unlink()
        gone, told = again(place / "programs")
    finally:
        path.write_text(kept)
    assert (status, gone) == (1, 1)
    assert "CHANGED: problems: was" in said
    assert "problems.jsonl: no such file" in told


def test_changed_settings_are_named(place: Path, again: Replay) -> None:
    folder = place / "programs"
    kept = json.loads((folder / "summary.json").read_text())["settings"]
    kept["eval"]["generation"]["seed"] = 7
    change(folder / "summary.json", settings=kept)
    status, said = again(folder, "--redecode")
    assert status == 1
    assert "CHANGED: settings: was" in said
    assert "settings (protocol.generation)" in said


def test_a_summary_without_receipts_says_what_it_lacks(place: Path, again: Replay) -> None:
    lacking = dict.fromkeys(("settings", "engine", "weights_fingerprint", "scoring", "versions", "processor"))
    facts = json.loads((place / "programs/generation.json").read_text())["facts"]
    change(place / "programs/generation.json", facts={name: facts[name] for name in facts if name not in lacking})
    change(place / "programs/summary.json", **lacking)
    status, said = again(place / "programs")
    assert status == 0, said  # what can be done comes to the same
    assert "not decoded: " in said
    assert "lacks settings, weights_fingerprint, engine, versions, processor; it is of a version that" in said
    status, said = again(place / "programs", "--redecode")
    assert (status, "CHANGED: not decoded" in said) == (1, True)


def test_a_backbone_that_is_elsewhere_is_not_decoded_with(place: Path, made: Path, again: Replay) -> None:
    status, said = again(place / "answers", "--model", str(place / "nowhere"))
    assert status == 0
    assert "note: not decoded: the backbone" in said
    assert "is not on this machine" in said


def test_versions_and_processor_are_told_where_they_differ(place: Path, again: Replay) -> None:
    facts = json.loads((place / "programs/generation.json").read_text())["facts"]
    changes = {"versions": {**facts["versions"], "torch": "1.0"}, "processor": "abacus"}
    change(place / "programs/generation.json", facts={**facts, **changes})
    change(place / "programs/summary.json", **changes)
    status, said = again(place / "programs", "--redecode")
    assert status == 0
    assert "note: was decoded with torch 1.0, here it is" in said
    assert "note: was decoded on abacus, here it is" in said


def test_a_folder_cannot_ask_for_programs_without_protection(place: Path, again: Replay, tmp_path: Path) -> None:
    scoring = json.loads((place / "programs/summary.json").read_text())["scoring"]
    unprotected = {"tier": "none"}
    change(
        place / "programs/summary.json",
        scoring={**scoring, "sandbox": {**scoring["sandbox"], "isolation": "none"}},
        isolation=unprotected,
    )
    status, said = again(place / "programs", "--rescore")
    assert status == 0
    assert "was scored in another isolation (none), here it is " in said
    assert "here it is none" not in said


def test_samples_of_another_origin_are_rescored(tmp_path: Path, again: Replay) -> None:
    problem = {"task_id": 1, "text": "Add.", "code": "def f(x): return x + 1", "test_list": ["assert f(1) == 2"]}
    (tmp_path / "problems.jsonl").write_text(json.dumps(problem) + "\n")
    lines = [{"task_id": 1, "completion": problem["code"]}, {"task_id": 1, "completion": "def f(x): return x"}]
    samples = tmp_path / "samples.jsonl"
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    score.main([str(samples), "--problems", str(tmp_path / "problems.jsonl"), "--out", str(tmp_path / "out")])
    status, said = again(tmp_path / "out")
    assert status == 0
    assert "same: scored 2 samples" in said
    assert "not decoded: the samples are of another origin" in said
    samples.unlink()
    status, said = again(tmp_path / "out")
    assert (status, "samples.jsonl is not there" in said) == (1, True)
