"""The report of a run folder: right figures, honest about gaps, safe to open."""

from __future__ import annotations

import html
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adept_ds.errors import UserError
from adept_ds.reports.learning_curve import smooth
from adept_ds.reports.run_report import make_report, text_report, write_report
from tests.conftest import RunRanks
from tests.test_results import write_programs, write_task

REPORT = "evals/report.py"


def write_metrics(run_dir: Path) -> None:
    lines: list[dict[str, Any]] = []
    for step in range(1, 21):
        rates = {"learning_rate/soft_prompt": 1e-2 / step, "learning_rate/network": 1e-4 / step}
        lines.append({"step": step, "loss": 2.0 / step, "tokens_per_second": 400.0 + step, **rates})
    lines += [{"step": 10, "eval/loss": 0.5, "eval/pass@1": 0.1}, {"step": 20, "eval/loss": 0.7, "eval/pass@1": 0.2}]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_evaluation(run_dir: Path, name: str, passed: list[bool], adapter: str | None, **sample: str) -> None:
    folder = run_dir / "eval" / name
    folder.mkdir(parents=True)
    share = sum(passed) / len(passed)
    summary = {
        "name": name,
        "pass@1": {"mean": share, "low": max(0, share - 0.1), "high": min(1, share + 0.1)},
        "problems": len(passed),
        "samples": len(passed),
        "verdicts": {"passed": sum(passed), "exception: NameError": len(passed) - sum(passed)},
        "adapter": adapter,
        "adapter_sha256": adapter,
        "backbone": {"layers": 2},
        "protocol": {"format": "mbpp-paper"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    with (folder / "results.jsonl").open("w") as file:
        for number, ok in enumerate(passed):
            completion = f"    return {number}\n"
            line = {"task_id": f"demo/{number}", "completion": completion, "program": f"def f():\n{completion}"}
            line |= {"task": f"Write program {number}.", "status": "passed", "kind": ""}
            if not ok:
                line |= {"status": "exception", "kind": "NameError", "detail": "name 'x' is not defined"}
            file.write(json.dumps(line | sample) + "\n")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A whole run folder: base passes 2 of 10, the adapter these and 3 more."""
    (tmp_path / "config.json").write_text(json.dumps({"_about": "A test.", "model": {"name_or_path": "tiny"}}))
    write_metrics(tmp_path)
    write_evaluation(tmp_path, "adept", [number < 5 for number in range(10)], adapter="best")
    write_evaluation(tmp_path, "base", [number < 2 for number in range(10)], adapter=None)
    return tmp_path


def test_entry_point_prints_both_figures_and_their_difference(run_dir: Path, run_ranks: RunRanks) -> None:
    done = run_ranks(0, REPORT, None, str(run_dir))
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["base", "20.0", "%", "10.0", "to", "30.0", "10", "10", "2"] in rows
    assert ["adept", "50.0", "%", "40.0", "to", "60.0", "10", "10", "5"] in rows
    assert "The adapter (adept) solves 3 more of 10 problems than the backbone (base) (+30.0 points, " in done.stdout
    assert "better on 3, worse on 0, sign test p = 0.25). That could be chance: only 3 of the problems" in done.stdout
    assert "  demo/2: Write program 2.\n    base: exception: NameError (name 'x' is not defined)\n" in done.stdout
    assert (run_dir / "report.html").exists()


def test_a_folder_that_is_no_run_ends_in_one_message(tmp_path: Path, run_ranks: RunRanks) -> None:
    done = run_ranks(0, REPORT, None, str(tmp_path))
    assert done.returncode != 0
    assert "is not a run folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_page_is_self_contained(run_dir: Path) -> None:
    page = write_report(make_report(run_dir)).read_text()
    assert "data:image/png;base64," in page
    assert 'src="http' not in page
    assert "<link" not in page
    assert "<script" not in page


def test_learning_curve_is_a_readable_picture(run_dir: Path) -> None:
    write_report(make_report(run_dir))
    with Image.open(run_dir / "learning_curve.png") as picture:
        width, height = picture.size
        colours = len(picture.convert("RGB").getcolors(maxcolors=width * height))
    assert width > 800
    assert height > 400
    assert colours > 50


def test_model_output_cannot_inject_markup(run_dir: Path) -> None:
    attack = "</pre><script>alert(1)</script>"
    write_evaluation(run_dir, "hostile", [False], adapter="x", completion=attack, program=attack, kind=attack)
    (run_dir / "eval" / "base" / "results.jsonl").unlink()
    (run_dir / "eval" / "adept" / "results.jsonl").unlink()
    page = write_report(make_report(run_dir)).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)") == 3


def test_problems_with_differing_outcomes_are_shown_first(run_dir: Path) -> None:
    page = write_report(make_report(run_dir)).read_text()
    shown = [line for line in page.splitlines() if line.startswith("<h3>")]
    assert shown == [f"<h3>demo/{number}<span>Write program {number}.</span></h3>" for number in (2, 3, 4, 0, 1, 5)]


def test_the_page_says_the_difference_and_shows_both_answers_with_reasons(run_dir: Path) -> None:
    report = make_report(run_dir)
    page = html.unescape(write_report(report).read_text())
    assert report.comparisons[0].text in page
    assert page.index("Before and after: base and adept") < page.index("<h3>demo/2") < page.index("Training")
    first = page[page.index("<h3>demo/2") : page.index("<h3>demo/3")]
    assert first.index('base<span class="verdict">exception: NameError') < first.index("name 'x' is not defined")
    assert first.index("name 'x' is not defined") < first.index('adept<span class="verdict right">passed')


def test_tags_of_the_page_are_closed_in_order(run_dir: Path) -> None:
    write_task(run_dir / "eval" / "base" / "rte", ["no"] * 9)
    write_task(run_dir / "eval" / "adept" / "rte", ["yes"] * 9, adapter="best")
    write_programs(run_dir / "eval" / "alone", {"other": [True]}, adapter="best")
    open_tags: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "img"):
                open_tags.append(tag)

        def handle_startendtag(self, tag: str, attrs: object) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    page = write_report(make_report(run_dir)).read_text()
    Checker().feed(page)
    assert open_tags == []
    assert "Before and after: base and adept on rte" in page
    assert "What alone wrote" in page


@pytest.mark.parametrize(
    ("removed", "note"),
    [
        ("config.json", "config.json is missing"),
        ("metrics.jsonl", "metrics.jsonl is missing or empty"),
        ("eval/base/results.jsonl", "eval/base/results.jsonl is missing"),
        ("eval/base/summary.json", "there is no evaluation without an adapter"),
    ],
)
def test_what_is_missing_is_said_and_the_rest_reported(run_dir: Path, removed: str, note: str) -> None:
    (run_dir / removed).unlink()
    report = make_report(run_dir)
    assert note in write_report(report).read_text()
    assert note in text_report(report)
    assert "50.0 %" in text_report(report)


def test_a_run_that_is_not_graded_yet_has_a_report(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    text = text_report(make_report(tmp_path))
    assert "training loss: 2.0000 at step 1, 0.1000 at step 20" in text
    assert "best validation loss: 0.5000 at step 10" in text
    assert "has not been graded" in text


def test_a_smoothed_training_loss_is_not_compared_with_the_validation_loss(run_dir: Path) -> None:
    plain = text_report(make_report(run_dir))
    write_report(make_report(run_dir))
    picture = (run_dir / "learning_curve.png").read_bytes()
    settings = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps(settings | {"train": {"label_smoothing": 0.1}}))
    report = make_report(run_dir)
    said = "0.1000 at step 20 (with label smoothing 0.1; the validation loss is without, so the two are not to be comp"
    assert "label smoothing" not in plain
    assert said in text_report(report)
    assert said in write_report(report).read_text()
    assert (run_dir / "learning_curve.png").read_bytes() != picture  # its legend says so, too


def test_text_to_text_tasks_are_shown_with_their_intervals(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"data": {"format": "tasks", "tasks": ["rte", "cola"]}}))
    folder = tmp_path / "eval" / "adept" / "cola"
    folder.mkdir(parents=True)
    metrics = {"matthews": {"value": 0.25, "low": 0.125, "high": 0.375, "n": 8}}
    summary = {"name": "adept", "protocol": {"task": "cola", "split": "test"}, "examples": 8, "invalid": 2}
    (folder / "summary.json").write_text(json.dumps({**summary, "metrics": metrics}))
    report = make_report(tmp_path)
    assert "adept, cola: matthews 25.0 % (12.5 to 37.5), 8 examples, 2 invalid" in text_report(report)
    page = write_report(report).read_text()
    assert "<dd>rte, cola</dd>" in page
    assert "12.5 % to 37.5 %" in page


def test_runs_over_different_problems_are_not_compared(run_dir: Path) -> None:
    write_evaluation(run_dir, "short", [True], adapter="other")
    report = make_report(run_dir)
    assert [comparison.names for comparison in report.comparisons] == [("base", "adept")]
    assert "short is not compared with base" in text_report(report)


def test_problems_without_a_sample_count_as_failed_in_the_comparison(run_dir: Path) -> None:
    folder = run_dir / "eval" / "adept"
    lines = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    (folder / "results.jsonl").write_text("".join(lines[1:]))
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"missing": ["demo/0"]}))
    report = make_report(run_dir)
    assert (report.comparisons[0].difference.better, report.comparisons[0].difference.worse) == (3, 1)
    assert "adept: problems without a sample, counted as failed: 1" in text_report(report)


def test_a_damaged_summary_names_its_file_and_key(run_dir: Path) -> None:
    path = run_dir / "eval" / "base" / "summary.json"
    summary = json.loads(path.read_text())
    del summary["pass@1"]["low"]
    path.write_text(json.dumps(summary))
    with pytest.raises(UserError, match=r"base/summary\.json: pass@1\.low: Field required"):
        make_report(run_dir)


def test_smoothing_keeps_a_straight_line_and_skips_what_is_not_finite() -> None:
    line = [float(value) for value in range(100)]
    assert smooth(line)[10:90] == pytest.approx(line[10:90])
    assert smooth([1.0, math.nan, 1.0, math.inf, 1.0]) == [1.0] * 5
