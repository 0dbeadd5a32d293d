"""Generation and scoring by the real entry point, over ranks and inside a ZeRO-3 run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from adept_ds.config.method import AdeptConfig
from adept_ds.config.run import DataConfig
from adept_ds.data.problems import load_problems
from adept_ds.model.adapted_model import AdaptedModel, get_adept_model
from tests.conftest import BY_LAUNCHER, RunRanks, run_settings
from tests.evalplus_problems import MBPP_PLUS, write

EVALUATE = "evals/mbpp.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that visibly changes what the model writes."""
    model = get_adept_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama), AdeptConfig(num_virtual_tokens=5, bottleneck=2)
    )
    for parameter in model.trainable_parameters().values():
        parameter.data += 0.3
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def evaluation_settings(model: Path, **generation: Any) -> dict[str, Any]:
    settings = run_settings(model, Path("unused"))
    settings["eval"] = {
        "max_examples": 10,
        "generation": {"max_new_tokens": 12, "num_samples": 2, "stop": ["\n\n\n"], **generation},
    }
    return settings


def samples(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_samples_do_not_depend_on_ranks_or_batches(
    tiny_llama: Path, adapter: Path, run_ranks: RunRanks, tmp_path: Path
) -> None:
    for ranks, batch_size, more in ((2, 3, BY_LAUNCHER), (0, 7, ())):
        result = run_ranks(
            ranks,
            EVALUATE,
            evaluation_settings(tiny_llama, batch_size=batch_size),
            "--adapter",
            str(adapter),
            "--out",
            str(tmp_path / str(ranks)),
            "--k",
            "1",
            "2",
            *more,
        )
        assert result.returncode == 0, result.stdout
    two, one = samples(tmp_path / "2"), samples(tmp_path / "0")
    assert two == one
    expected = [problem.task_id for problem in load_problems(DataConfig(), "test")[:10] for _ in range(2)]
    assert [sample["task_id"] for sample in two] == expected
    assert len({sample["completion"] for sample in two}) > 10

    summary = json.loads((tmp_path / "2" / "summary.json").read_text())
    assert (summary["problems"], summary["samples"], sum(summary["verdicts"].values())) == (10, 20, 20)
    assert summary["pass@1"]["high"] > 0
    assert "pass@2" in summary
    assert summary["isolation"]
    assert len((tmp_path / "2" / "results.jsonl").read_text().splitlines()) == 20


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_backbone_that_is_split_over_the_ranks_writes_the_same_samples(
    tiny_llama: Path, adapter: Path, run_ranks: RunRanks, tmp_path: Path, quantization: str | None
) -> None:
    in_host = {"offload_param": {"device": "cpu"}}
    for sharding, ranks, zero in (("none", 0, {}), ("zero3", 2, {}), ("zero3", 2, in_host), ("zero3", 0, in_host)):
        # Five problems for two ranks: one of them is done before the other, and keeps it company.
        settings = evaluation_settings(tiny_llama, batch_size=2)
        settings["model"]["quantization"] = quantization
        settings["eval"] |= {"sharding": sharding, "max_examples": 5}
        settings["deepspeed"]["zero_optimization"] |= zero
        out = tmp_path / f"{sharding}-{ranks}-{len(zero)}"
        result = run_ranks(ranks, EVALUATE, settings, "--adapter", str(adapter), "--out", str(out), "--samples_only")
        assert result.returncode == 0, result.stdout
        assert (f"each of {ranks or 1} ranks holds" in result.stderr) == (sharding == "zero3")
        assert samples(out) == samples(tmp_path / "none-0-0")
    assert len({sample["completion"] for sample in samples(out)}) == 10


def test_samples_that_are_scored_later_have_the_same_summary(
    tiny_llama: Path, adapter: Path, run_ranks: RunRanks, tmp_path: Path
) -> None:
    flags = ("--adapter", str(adapter), "--k", "1", "2", "--paper_scoring")
    folders = {name: tmp_path / name / "adept" for name in ("once", "later")}
    for name, more in (("once", ()), ("later", ("--samples_only",))):
        settings = evaluation_settings(tiny_llama)
        result = run_ranks(0, EVALUATE, settings, *flags, "--out", str(folders[name]), *more)
        assert result.returncode == 0, result.stdout
    assert not (folders["later"] / "summary.json").exists()
    done = run_ranks(0, EVALUATE, None, "--score", str(folders["later"]))
    assert done.returncode == 0, done.stderr
    once, later = (json.loads((folder / "summary.json").read_text()) for folder in folders.values())
    assert later == once
    assert (later["adapter"], later["name"]) == (str(adapter), "adept")
    assert {"pass@1", "pass@2", "paper"} <= later.keys()

    refused = run_ranks(0, EVALUATE, None, "--score", str(folders["later"]), "--k", "3")
    assert refused.returncode == 2
    assert "--k is 3, but eval.generation.num_samples is 2" in refused.stderr
    with (folders["later"] / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"task_id": samples(folders["once"])[0]["task_id"], "completion": "    return 1"}) + "\n")
    refused = run_ranks(0, EVALUATE, None, "--score", str(folders["later"]))
    assert refused.returncode == 2
    assert "samples.jsonl has changed since" in refused.stderr


def test_an_evaluation_that_is_there_is_left_alone_unless_something_differs(
    tiny_llama: Path, adapter: Path, run_ranks: RunRanks, tmp_path: Path
) -> None:
    flags = ("--adapter", str(adapter), "--out", str(tmp_path / "out"), "--resume", "auto")

    def is_made(**generation: Any) -> bool:
        done = run_ranks(0, EVALUATE, evaluation_settings(tiny_llama, **generation), *flags)
        assert done.returncode == 0, done.stdout
        return "holds this evaluation; nothing to do" not in done.stdout

    assert [is_made(), is_made(), is_made(seed=1)] == [True, False, True]


def test_problems_of_evalplus_are_written_scored_resumed_and_replayed(
    tiny_llama: Path, adapter: Path, run_ranks: RunRanks, tmp_path: Path
) -> None:
    settings = evaluation_settings(tiny_llama)
    settings["data"] = {"format": "mbpp_plus", "path": str(write(tmp_path / "MbppPlus.jsonl", MBPP_PLUS))}
    settings["eval"]["sandbox"] = {"cache": str(tmp_path / "cache")}
    flags = ("--adapter", str(adapter), "--out", str(tmp_path / "out"), "--resume", "auto")
    done, again = (run_ranks(0, EVALUATE, settings, *flags) for _ in range(2))
    assert done.returncode == 0, done.stdout
    assert "by the base tests alone pass@1" in done.stdout
    assert "holds this evaluation; nothing to do" in again.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["problems"], summary["samples"], "base_pass@1" in summary) == (10, 20, True)
    replayed = run_ranks(0, "adept_ds/__main__.py", None, "replay", str(tmp_path / "out"))
    assert replayed.returncode == 0, replayed.stdout
    assert replayed.stdout.count(": same: ") == 2


def test_an_adapter_of_another_backbone_is_refused_with_status_2(
    tiny_t5: Path, adapter: Path, run_ranks: RunRanks, tmp_path: Path
) -> None:
    result = run_ranks(
        0, EVALUATE, evaluation_settings(tiny_t5), "--adapter", str(adapter), "--out", str(tmp_path / "out")
    )
    assert result.returncode == 2
    assert "other token embeddings" in result.stdout
    assert "Traceback" not in result.stdout


def test_pass_at_1_chooses_the_best_checkpoint_under_zero3(
    tiny_llama: Path, run_ranks: RunRanks, tmp_path: Path
) -> None:
    settings = run_settings(tiny_llama, tmp_path / "run", max_steps=4)
    settings["eval"] = {
        "metric": "pass@1",
        "every_steps": 2,
        "max_examples": 5,
        "generation": {"max_new_tokens": 6, "batch_size": 2},
    }
    result = run_ranks(2, "launchers/train.py", settings)
    assert result.returncode == 0, result.stdout
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/pass@1" in line] == [2, 4]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["best_step"] == 2
    model = AdaptedModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "run" / "best")
    assert model.num_virtual_tokens == 5


@pytest.mark.parametrize("problem_format", ["mbpp-paper", "mbpp"])
def test_samples_of_another_tool_are_only_scored(problem_format: str, run_ranks: RunRanks, tmp_path: Path) -> None:
    problems = load_problems(DataConfig(format=problem_format), "test")
    right, wrong, rest = problems[0], problems[1], problems[2:]
    lines = [{"task_id": right.task_id, "completion": right.target, "model": "other"}]
    lines += [
        {"task_id": wrong.task_id, "completion": "    return object()\n" if problem_format == "mbpp-paper" else "x = 1"}
    ]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--samples", str(path), "--problem_format", problem_format, "--split", "test"]
    result = run_ranks(0, EVALUATE, None, *flags, "--out", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["pass@1"]["mean"] == pytest.approx(1 / len(problems))
    assert summary["missing"] == [problem.task_id for problem in rest]
    assert f"{len(rest)} problems have no sample and count as failed" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "SAMPLES", "--out", "OUT", "--k", "2"], "pass@2 needs at least 2 samples"),
        (["--samples", "no-such-file", "--out", "OUT"], "no-such-file"),
        (["--samples", "SAMPLES"], "--out FOLDER is needed"),
        (["--samples", "SAMPLES", "--out", "OUT", "--isolation", "seccmop"], "--isolation seccmop"),
        (["--samples", "SAMPLES", "--out", "OUT", "--split", "test"], "--split test needs --problem_format"),
        (["--samples", "SAMPLES", "--out", "OUT", "--problem", "x"], "did you mean '--problems'"),
        (["--score", "OUT"], "expected a folder that evals/mbpp.py wrote"),
        (["--score", "OUT", "--split", "test"], "--split: unknown flag"),
    ],
)
def test_a_mistake_in_scoring_is_told_without_a_traceback(
    arguments: list[str], message: str, run_ranks: RunRanks, tmp_path: Path
) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps({"task_id": load_problems(DataConfig(), "test")[0].task_id, "completion": ""}) + "\n")
    places = {"SAMPLES": str(path), "OUT": str(tmp_path / "out")}
    result = run_ranks(0, EVALUATE, None, *(places.get(argument, argument) for argument in arguments))
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
