"""Tables of many runs: which runs make a figure, the paper's beside it, what counts as noise, what is written."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from adept_ds.backbone.load import resolve_architecture
from adept_ds.cli.report import main
from adept_ds.config.loader import load_config
from adept_ds.config.recipes import config_path
from adept_ds.errors import UserError
from adept_ds.planner.meta_step import meta_model
from adept_ds.reports.paper import PaperRow, PaperTable, paper_figures, reproduction
from adept_ds.reports.runs import read_runs, run_figures
from adept_ds.reports.tables import Table, build_tables
from adept_ds.reports.tables_report import learning_curves, markdown, write_csv

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A run folder with one evaluation of `right` of 100 test examples, interval 10 points to each side."""

    def make(
        name: str,
        right: int,
        method: dict[str, Any] | None = None,
        *,
        task: str = "rte",
        metric: str = "accuracy",
        validation: float = 0.5,
        evaluated: dict[str, Any] | None = None,
        split: str = "test",
        adapter: str | None = "best",
        also: tuple[str, ...] = (),
        **settings: Any,
    ) -> Path:
        run_dir = tmp_path / name
        method = method or {"name": "adept", "num_virtual_tokens": 60, "bottleneck": 19}
        config = {
            "model": {"name_or_path": settings.pop("model", "google-t5/t5-base")},
            "method": method,
            "data": {"format": "tasks", "tasks": [task, *also], "k_shot": settings.pop("k_shot", None)},
            "train": {"seed": settings.pop("seed", 1), **settings},
            "eval": {"metric": "task"},
        }
        folder = run_dir / "eval" / "test" / task
        folder.mkdir(parents=True)
        (run_dir / "best").mkdir()
        save_file({"a": np.zeros((2, 3)), "b": np.zeros(5)}, run_dir / "best" / "adapter_model.safetensors")
        (run_dir / "config.json").write_text(json.dumps(config))
        (run_dir / "status.json").write_text(json.dumps({"state": "finished", "best_value": validation}))
        lines = [{"step": step, "loss": 1 / step, "eval/task": step / 10} for step in range(1, 5)]
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        share = right / 100
        summary = {
            "adapter": adapter,
            "method": evaluated or (method if adapter else None),
            "protocol": {"task": task, "variant": "fixed", "split": split},
            "examples": 100,
            "invalid": 0,
            "metrics": {metric: {"value": share, "low": share - 0.1, "high": share + 0.1, "n": 100}},
        }
        (folder / "summary.json").write_text(json.dumps(summary))
        with (folder / "predictions.jsonl").open("w") as file:
            for number in range(100):
                line = {"task_id": f"{task}/test/{number}", "answer": str(int(number < right)), "references": ["1"]}
                file.write(json.dumps(line) + "\n")
        return run_dir

    return make


def tables_of(*runs: Path) -> list[Table]:
    figures, _ = run_figures(read_runs(runs))
    return build_tables(figures, paper_figures())


def test_a_run_on_several_tasks_is_no_setting_of_one_on_a_single_task(make_run: MakeRun) -> None:
    """Though its validation figure, of all tasks, may be the better one; the paper has no row (m) of LoRA."""
    lora = {"name": "lora"}
    one, several = (
        make_run("one", 60, method=lora, validation=0.5),
        make_run("several", 40, method=lora, validation=0.9, also=("mrpc",)),
    )
    paper, own = tables_of(one, several)
    assert cell(paper, "LoRA", "RTE").our_mean == 60
    assert [(row.label, row.cells[0].our_mean) for row in own.rows] == [("lora (m)", 40)]
    model = "another"
    runs = (
        make_run("one_other", 60, method=lora, validation=0.5, model=model),
        make_run("several_other", 40, method=lora, validation=0.9, also=("mrpc",), model=model),
    )
    (own,) = tables_of(*runs)
    assert [(row.label, row.cells[0].our_mean) for row in own.rows] == [("lora", 60), ("lora (m)", 40)]


def cell(table: Table, row: str, column: str) -> Any:
    (found,) = [one for one in table.rows if one.label == row]
    return found.cells[table.columns.index(column)]


def table_3(*runs: Path) -> Table:
    return next(table for table in tables_of(*runs) if table.title.startswith("Table 3"))


def test_seeds_are_averaged_and_compared_with_the_paper(make_run: MakeRun) -> None:
    found = cell(table_3(*(make_run(f"s{n}", n, seed=n) for n in (70, 74, 78))), "ADePT", "RTE")
    assert (found.ours.runs, found.our_mean, found.paper) == (3, 74, 82.0)
    assert found.ours.deviation == pytest.approx(4.0)
    assert found.difference == pytest.approx(-8.0)
    example_error = 10 / 1.959964
    error = math.hypot(example_error, 4 / math.sqrt(3))
    assert found.ours.interval[1] == pytest.approx(74 + 1.959964 * error)
    # The paper's figure: as many examples, and one run with our deviation.
    assert found.noise == pytest.approx(1.959964 * math.hypot(error, example_error, 4.0))
    assert found.exceeds_noise is False


def test_a_large_difference_exceeds_the_noise(make_run: MakeRun) -> None:
    assert cell(table_3(make_run("low", 40)), "ADePT", "RTE").exceeds_noise is True


def test_one_run_has_its_own_interval_and_no_deviation(make_run: MakeRun) -> None:
    ours = cell(table_3(make_run("one", 80)), "ADePT", "RTE").ours
    assert ours.deviation is None
    assert ours.interval == pytest.approx((70, 90))


def test_a_run_taken_again_is_no_further_sample(make_run: MakeRun) -> None:
    ours = cell(table_3(make_run("a", 80), make_run("again", 80)), "ADePT", "RTE").ours
    assert (ours.runs, ours.deviation) == (1, None)


def test_a_deviation_that_the_paper_prints_is_over_three_runs(make_run: MakeRun) -> None:
    (table,) = (
        table for table in tables_of(make_run("one", 59, task="winogrande")) if table.title.startswith("Table 4")
    )
    found = cell(table, "ADePT", "WinoGrande")
    assert found.noise == pytest.approx(1.959964 * math.hypot(10 / 1.96, 10 / 1.96, 0.9 / math.sqrt(3)), rel=1e-3)
    assert found.is_other_task  # the paper's WinoGrande shows one option twice


def test_validation_chooses_between_settings_and_test_figures_do_not(make_run: MakeRun) -> None:
    good = make_run("good", 75, train_rate=1, validation=0.9)
    lucky = make_run("lucky", 95, train_rate=2, validation=0.6)
    found = cell(table_3(good, lucky), "ADePT", "RTE")
    assert (found.our_mean, found.ours.settings_tried, found.ours.runs) == (75, 2, 1)


def test_a_loss_chooses_the_lower(make_run: MakeRun) -> None:
    runs = [make_run("a", 75, train_rate=1, validation=0.9), make_run("b", 95, train_rate=2, validation=0.6)]
    for run in runs:
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | {"eval": {"metric": "loss"}}))
    assert cell(table_3(*runs), "ADePT", "RTE").our_mean == 95


def test_methods_that_were_not_run_stand_as_quoted(make_run: MakeRun) -> None:
    table = table_3(make_run("one", 80))
    text = markdown([table], [], "the paper")
    assert "HyperFormer (m) (quoted)" in text
    assert "PT (quoted)" in text
    assert "ADePT (paper)" in text
    rows = {row.label: row for row in table.rows}
    assert (rows["LST"].quoted_from, rows["ADePT"].quoted_from) == ("Sung et al. 2022", None)
    assert [row.label for row in table.rows if row.is_run] == ["ADePT"]


def test_a_mean_needs_all_of_its_columns(make_run: MakeRun) -> None:
    tasks = {"multirc": "f1", "boolq": "accuracy", "wic": "accuracy", "wsc": "accuracy"}
    runs = [make_run(task, 70, task=task, metric=metric) for task, metric in tasks.items()]
    assert cell(table_3(*runs), "ADePT", "SuperGLUE mean").our_mean is None
    found = cell(table_3(*runs, make_run("cb", 90, task="cb")), "ADePT", "SuperGLUE mean")
    assert found.our_mean == pytest.approx(74)
    assert found.difference == pytest.approx(74 - 77.4)


def test_ablations_stand_in_their_own_tables(make_run: MakeRun) -> None:
    runs = [
        make_run(f"r{r}", 60 + r, {"name": "adept", "num_virtual_tokens": 60, "bottleneck": r}, validation=r / 100)
        for r in (5, 10)
    ]
    tables = {table.title.partition(":")[0]: table for table in tables_of(*runs)}
    assert cell(tables["Table 12 of the paper"], "ADePT", "r = 5").our_mean == 65
    assert cell(tables["Table 12 of the paper"], "ADePT", "r = 10").our_mean == 70
    assert cell(tables["Table 12 of the paper"], "ADePT", "r = 20").our_mean is None
    assert cell(tables["Table 3 of the paper"], "ADePT", "RTE").our_mean == 70


def test_an_evaluation_counts_with_the_settings_it_was_made_with(make_run: MakeRun) -> None:
    dept = {"name": "dept", "num_virtual_tokens": 40, "cyclic_shift": 0}
    runs = [make_run("plain", 79, dept), make_run("shifted", 60, dept, evaluated=dept | {"cyclic_shift": 50})]
    tables = {table.title.partition(":")[0]: table for table in tables_of(*runs)}
    assert cell(tables["Table 1 of the paper"], "DePT (0)", "RTE").our_mean == 79
    assert cell(tables["Table 1 of the paper"], "DePT (50)", "RTE").our_mean == 60


def test_few_shot_runs_are_apart_from_full_ones(make_run: MakeRun) -> None:
    tables = tables_of(make_run("few", 55, task="boolq", k_shot=16), make_run("all", 80, task="boolq"))
    few = next(table for table in tables if table.title.startswith("Table 15"))
    assert cell(few, "ADePT", "BoolQ, k = 16").our_mean == pytest.approx(55)
    full = next(table for table in tables if table.title.startswith("Table 3"))
    assert cell(full, "ADePT", "BoolQ").our_mean == 80


def test_other_backbones_have_a_table_without_the_paper(make_run: MakeRun) -> None:
    runs = [make_run("a", 60, model="models/tiny"), make_run("b", 30, {"name": "pt"}, model="models/tiny")]
    base = make_run("c", 10, model="models/tiny", adapter=None)
    (table,) = tables_of(*runs, base)
    assert (table.title, table.has_paper) == ("tiny", False)
    assert [row.label for row in table.rows] == ["untuned", "adept", "pt"]
    assert [row.parameters for row in table.rows] == [((0, 1),), ((11, 1),), ((11, 1),)]


def test_methods_are_compared_example_by_example(make_run: MakeRun) -> None:
    runs = [make_run("a", 60), make_run("b", 62, seed=2), make_run("c", 30, {"name": "pt"})]
    (found,) = table_3(*runs).differences
    assert found.startswith("RTE: PT has a lower accuracy than ADePT on 100 examples (-31.0 points, ")
    assert found.endswith(
        "better on 0, worse on 32, sign test p < 0.0001). That is beyond the noise of these examples."
    )


def test_other_splits_and_unfinished_runs_are_noted(make_run: MakeRun) -> None:
    run = make_run("a", 60, split="validation")
    (run / "status.json").write_text(json.dumps({"state": "interrupted"}))
    figures, notes = run_figures(read_runs([run]))
    assert figures == []
    assert "is of the split 'validation' and is left out" in " ".join(notes)
    assert "is not finished (interrupted)" in " ".join(notes)


def test_bundled_problems_are_not_mbpp(make_run: MakeRun) -> None:
    run = make_run("a", 60, model="codegen-350M-mono")
    score = {"mean": 0.2, "low": 0.1, "high": 0.3}
    for path, name in (("bundled", "demo"), ("mbxp.jsonl", "mbpp")):
        folder = run / "eval" / name
        folder.mkdir()
        protocol = {"format": "mbpp-paper", "path": path, "split": "test"}
        summary = {"adapter": "best", "protocol": protocol, "pass@1": score}
        summary |= {"problems": 40, "samples": 40, "verdicts": {"passed": 8, "failed": 32}}
        if name == "mbpp":
            summary["paper"] = {"cut": 0.2, "repaired": 0.24, "average": 0.22}
        (folder / "summary.json").write_text(json.dumps(summary))
    seventh, own = tables_of(run)
    assert cell(seventh, "ADePT", "MBPP").our_mean == pytest.approx(22)  # the paper's way of scoring
    assert cell(seventh, "ADePT", "MBPP").difference == pytest.approx(22 - 17.86)
    assert cell(seventh, "ADePT", "MBPP").ours.interval == pytest.approx((12, 32))
    assert "bundled problems pass@1" in own.columns


def test_the_csv_has_a_line_for_every_figure(make_run: MakeRun, tmp_path: Path) -> None:
    write_csv([table_3(make_run("one", 80))], tmp_path / "report.csv")
    with (tmp_path / "report.csv").open() as file:
        lines = list(csv.DictReader(file))
    (ours,) = [line for line in lines if line["mean"]]
    assert (ours["method"], ours["task"], ours["paper"], ours["parameters"]) == ("ADePT", "rte", "82.0", "11")
    assert len(lines) == 18 * 15 - 6  # LST has no figures on SuperGLUE


def test_the_entry_point_writes_all_files_for_a_folder_of_runs(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run("sweep/a", 60, validation=0.5)
    make_run("sweep/b", 70, seed=2, validation=0.6)
    main([str(tmp_path / "sweep"), "--out", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("report.md", "report.csv", "report.html", "learning_curves-t5_base_on_rte.png")
    }
    page = (tmp_path / "out" / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("https://arxiv.org", "")
    shown = capsys.readouterr().out
    assert "65.00 ± 7.07 (-17.00)" in shown
    assert "task 0.5500 ± 0.0707" in shown


def test_curves_of_smoothed_labels_are_told_apart(make_run: MakeRun) -> None:
    plain, again, smoothed = make_run("a", 60), make_run("b", 60, seed=2), make_run("c", 60, label_smoothing=0.1)
    both = learning_curves(read_runs([plain, again]))
    assert both.keys() == learning_curves(read_runs([plain, smoothed])).keys()
    assert both == learning_curves(read_runs([again, plain]))
    assert both != learning_curves(read_runs([plain, smoothed]))  # of equal losses: the legend and a colour


def test_runs_that_are_not_graded_have_a_report_that_says_so(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run("a", 60)
    (run / "eval" / "test" / "rte" / "summary.json").unlink()
    main([str(run), "--out", str(tmp_path / "out")])
    assert f"{run} has no evaluation in eval/." in capsys.readouterr().out
    assert "has no evaluation" in (tmp_path / "out" / "report.html").read_text()


def test_a_folder_without_runs_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run folder and holds none"):
        read_runs([tmp_path])


def test_the_papers_means_are_those_of_its_columns() -> None:
    odd = []
    for table in paper_figures().tables:
        for row in table.rows:
            figures = dict(zip((column.label for column in table.columns), row.values, strict=True))
            for column in table.columns:
                parts = [figures[label] for label in column.mean_of]
                printed = figures[column.label]
                is_known = bool(parts) and None not in parts and printed is not None
                if is_known and abs(sum(parts) / len(parts) - printed) > 0.11:
                    odd.append((table.number, row.label, column.label))
    assert odd == [(3, "Full fine-tuning (m)", "SuperGLUE mean")]  # as printed


# What reproduces a row

TRAINED = {
    (table.backbone, row.parameters, reproduction(table, row)[0], json.dumps(reproduction(table, row)[1])): (table, row)
    for table in paper_figures().tables
    for row in table.rows
    if row.parameters and table.number not in (4, 6, 15)
}
"""Rows that differ in more than their figures."""


@pytest.mark.parametrize(
    ("table", "row"), TRAINED.values(), ids=[f"{table.backbone}, {row.label}" for table, row in TRAINED.values()]
)
def test_a_rows_config_trains_as_many_parameters(table: PaperTable, row: PaperRow) -> None:
    config, changes = reproduction(table, row)
    overrides = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changes.items()]
    run = load_config(config_path(config), overrides).run
    assert run.method.name == row.method
    assert Path(run.model.name_or_path).name.lower() in table.models
    assert (len(run.data.tasks) > 1) == row.multi_task
    trained, _ = meta_model(run, resolve_architecture(run.model)[0]).count_parameters()
    number, unit = float(row.parameters[:-1]), {"K": 1e3, "M": 1e6}[row.parameters[-1]]
    # The paper rounds down here and up there: 222.9M is its 220M, and 77,668 its 77.6K.
    assert trained / max(1, len(run.data.tasks)) / unit == pytest.approx(number, rel=0.025)


def test_a_few_shot_run_takes_the_settings_of_its_row() -> None:
    """Of table 15, whose parameters are printed for each of the tasks that it starts from."""
    table = next(table for table in paper_figures().tables if table.number == 15)
    for row in table.rows:
        config, changes = reproduction(table, row)
        overrides = [
            f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changes.items()
        ]
        assert load_config(config_path(config), overrides).run.method.name == row.method


def test_a_run_on_several_tasks_stands_in_its_own_row(make_run: MakeRun) -> None:
    mpt = {"name": "mpt", "num_virtual_tokens": 100, "init_from": "x"}
    table = table_3(
        make_run("many", 60, mpt | {"tasks": ["rte", "cb"]}, also=("cb",)),
        make_run("one", 70, mpt),
        make_run("adept", 80),
    )
    assert cell(table, "MPT (m)", "RTE").our_mean == 60
    assert cell(table, "MPT (t)", "RTE").our_mean == 70
    text = markdown([table], [], "source")
    assert "11 (6 for each of 2 tasks)" in text
    assert "--config t5_base_mpt_m" in text
    assert "--config t5_base_hyperformer_m" in text


def test_prompt_tuning_from_a_source_task_is_spot(make_run: MakeRun) -> None:
    pt = {"name": "pt", "num_virtual_tokens": 100}
    table = table_3(make_run("spot", 60, pt | {"init_from": "x"}), make_run("pt", 70, pt))
    assert cell(table, "SPoT (t)", "RTE").our_mean == 60
    assert cell(table, "PT", "RTE").our_mean == 70
