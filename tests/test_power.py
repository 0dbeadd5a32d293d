"""The power of comparisons, beside experiments that are drawn from known chances."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from adept_ds.cli.analysis import main
from adept_ds.errors import UserError
from adept_ds.evaluation.power import Contrast, contrast, power

PROBLEMS = 300


def chances(generator: np.random.Generator, problems: int, gain: float) -> np.ndarray:
    """Of two methods [2, n]: most problems are beyond both, what is hard for one is hard for the other."""
    hardness = generator.beta(0.15, 1.2, problems)
    return np.stack([hardness, np.clip(hardness + gain * np.sqrt(hardness * (1 - hardness)), 0, 1)])


def runs(generator: np.random.Generator, p: np.ndarray, seeds: int) -> list[dict[str, float]]:
    return [{str(i): float(x) for i, x in enumerate(generator.random(len(p)) < p)} for _ in range(seeds)]


def true_power(gain: float, seeds: int, problems: int, experiments: int = 600) -> float:
    """On experiments with the real chances."""
    generator, decided = np.random.default_rng(5), 0
    for _ in range(experiments):
        scores = [generator.binomial(seeds, p) / seeds for p in chances(generator, problems, gain)]
        differences = scores[1] - scores[0]
        better, worse = int((differences > 0).sum()), int((differences < 0).sum())
        error = differences.std(ddof=1) / math.sqrt(problems)
        is_clear = better > worse and binomtest(better, better + worse).pvalue < 0.05
        decided += bool(is_clear and differences.mean() > 1.96 * error)
    return decided / experiments


@cache
def found(gain: float, seeds: int, draws: int = 6) -> list[Contrast]:
    generator, contrasts = np.random.default_rng(1), []
    true = float(np.diff(chances(np.random.default_rng(9), 100_000, gain).mean(1))[0])
    while len(contrasts) < draws:
        one, other = (runs(generator, p, seeds) for p in chances(generator, PROBLEMS, gain))
        difference = np.mean([np.mean([*run.values()]) for run in other]) - np.mean(
            [np.mean([*run.values()]) for run in one]
        )
        # The power is that of the difference that was found, so only those near the true one can be compared with it.
        if abs(difference - true) < 0.15 * true:
            contrasts.append(contrast(one, other))
    return contrasts


@pytest.mark.parametrize(("seeds", "problems"), [(2, 300), (6, 300), (2, 900)])
def test_the_power_is_that_of_real_experiments(seeds: int, problems: int) -> None:
    expected = true_power(0.1, seeds, problems)
    foreseen = [power(one, seeds, problems, 400) for one in found(0.1, 3)]
    assert float(np.mean(foreseen)) == pytest.approx(expected, abs=0.12)


def test_more_of_either_decides_more_often() -> None:
    one = found(0.1, 3, 1)[0]
    powers = [power(one, *size, 400) for size in ((1, 300), (3, 300), (3, 1200), (20, 1200))]
    assert powers == sorted(powers)
    assert powers[0] < 0.5 < powers[-1]


def test_methods_that_are_alike_are_hardly_ever_told_apart() -> None:
    generator = np.random.default_rng(3)
    p = chances(generator, PROBLEMS, 0)[0]
    one = contrast(runs(generator, p, 4), runs(generator, p, 4))
    assert power(one, 4, PROBLEMS, 400) < 0.2


def test_what_cannot_be_foreseen_is_refused() -> None:
    with pytest.raises(UserError, match="a method with one run says nothing of how much runs differ"):
        contrast([{str(i): i % 2 for i in range(6)}], [{str(i): i % 2 for i in range(6)}] * 2)
    some = {str(i): 1.0 for i in range(6)}
    with pytest.raises(UserError, match="not of the same problems"):
        contrast([some] * 2, [{**some, "6": 1.0}] * 2)
    with pytest.raises(UserError, match="the runs are of 1 problems; expected 6 or more"):
        contrast([{"a": 1.0}] * 2, [{"a": 0.0}] * 2)


@pytest.mark.filterwarnings("error")
def test_fewer_than_six_problems_decide_nothing() -> None:
    ten = {str(i): 1.0 for i in range(10)}
    one = contrast([dict.fromkeys(ten, 0.0)] * 2, [ten] * 2)
    assert [power(one, 2, problems, 100) for problems in (1, 5, 6)] == [0, 0, 1]


def test_a_method_that_solves_nothing_has_no_chances() -> None:
    nothing = [{str(i): 0.0 for i in range(50)}] * 2
    half = [{str(i): float(i < 25) for i in range(50)}] * 2
    assert power(contrast(nothing, half), 2, 50, 200) > 0.99
    assert power(contrast(nothing, nothing), 2, 50, 200) == 0


def write_run(run: Path, method: str, seed: int, right: np.ndarray, **train: float) -> None:
    """A run folder with an evaluation on RTE, in which these answers are right."""
    folder = run / "eval" / "test" / "rte"
    folder.mkdir(parents=True)
    (run / "best").mkdir()
    config = {"model": {"name_or_path": "m"}, "method": {"name": method}, "data": {"format": "tasks"}}
    (run / "config.json").write_text(json.dumps(config | {"train": {"seed": seed, **train}}))
    (run / "status.json").write_text(json.dumps({"state": "finished", "best_value": 1.0 - train.get("epochs", 0)}))
    figure = {"value": float(right.mean()), "low": 0.0, "high": 1.0, "n": len(right)}
    protocol = {"task": "rte", "variant": "fixed", "split": "test"}
    summary = {
        "adapter": "best",
        "method": {"name": method},
        "protocol": protocol,
        "examples": len(right),
        "invalid": 0,
    }
    (folder / "summary.json").write_text(json.dumps(summary | {"metrics": {"accuracy": figure}}))
    lines = [json.dumps({"task_id": str(i), "answer": str(int(x)), "references": ["1"]}) for i, x in enumerate(right)]
    (folder / "predictions.jsonl").write_text("\n".join(lines))


def test_the_command_reads_run_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    p = chances(generator, 60, 0.5)
    for method, of_method in zip(("pt", "adept"), p, strict=True):
        for seed in (1, 2):
            write_run(tmp_path / f"{method}_{seed}", method, seed, generator.random(60) < of_method)
    folders = [str(path) for path in sorted(tmp_path.iterdir())]
    main(["power", *folders, "--seeds", "2", "400", "--problems", "60", "600"])
    text = capsys.readouterr().out
    assert "accuracy of m on rte, 60 problems" in text
    assert "pt (2 runs) against adept (2 runs): -" in text
    assert "600 problems" in text
    assert "decide 80 % of experiments" in text
    with pytest.raises(UserError, match="no two methods have two runs each"):
        main(["power", *folders[:3]])
    with pytest.raises(UserError, match="--goal 2"):
        main(["power", *folders, "--goal", "2"])


def test_what_cannot_be_compared_is_left_out_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = np.arange(20) % 3 == 0
    for seed in (1, 2):
        write_run(tmp_path / f"pt_{seed}", "pt", seed, right)
        write_run(tmp_path / f"adept_{seed}", "adept", seed, right)
        write_run(tmp_path / f"lora_{seed}", "lora", seed, right[:15])
    # Of the settings that have several runs the best counts, though one with a single run may be better.
    write_run(tmp_path / "better", "adept", 1, right, epochs=0.5)
    main(["power", *map(str, sorted(tmp_path.iterdir()))])
    text = capsys.readouterr().out
    assert "pt (2 runs) against adept (2 runs): +0.00 points\nNo difference was found" in text
    assert (
        "adept and lora on rte: the runs are not of the same problems; evaluate all on the same ones: left out" in text
    )
