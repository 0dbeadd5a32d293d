"""Sweeps: expansion of grids, names, choice of the best; and a small one by the real launcher, stopped and gone on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adept_ds.cli.sweep import main
from adept_ds.config.loader import load_config
from adept_ds.errors import UserError
from adept_ds.training.sweep import Member, members, read_grid, summary

CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"


@pytest.fixture
def expand(tmp_path: Path) -> Callable[..., list[Member]]:
    """Expand grids over a small config whose run folder is `tmp_path`/sweep."""

    def expanded(*grids: dict[str, Any], overrides: tuple[str, ...] = (), **sections: Any) -> list[Member]:
        path = tmp_path / "base.json"
        settings = {"model": {"name_or_path": "m"}, "train": {"epochs": 1}}
        settings |= {"logging": {"run_dir": str(tmp_path / "sweep")}, **sections}
        path.write_text(json.dumps(settings))
        return members(load_config(path, overrides), grids)

    return expanded


def finish(member: Member, value: float, state: str = "finished") -> None:
    member.run_dir.mkdir(parents=True)
    status = {"state": state, "step": 5, "total_steps": 5, "best_step": 3, "best_value": value, "signal": None}
    (member.run_dir / "status.json").write_text(json.dumps(status))


def test_the_papers_search_has_72_runs_within_the_parameters_of_100_prompt_tokens() -> None:
    found = members(load_config(CONFIGS / "t5_base.json"), read_grid([str(CONFIGS / "grids" / "t5_base_small.json")]))
    assert len({member.name for member in found}) == 4 * 3 * 2 * 3
    pairs = {(member.run.method.num_virtual_tokens, member.settings["method.bottleneck"]) for member in found}
    assert pairs == {(20, 39), (40, 29), (60, 19), (80, 9)}
    for prompt, bottleneck in pairs:
        assert prompt * 768 + 2 * bottleneck * 768 + bottleneck + 768 <= 100 * 768


def test_names_follow_from_settings_and_not_from_their_order(expand: Callable[..., list[Member]]) -> None:
    first = expand({"train.seed": [1, 2], "method.bottleneck": [3, 4], "train.learning_rate.network": [0.1]})
    second = expand({"train.learning_rate.network": [1e-1], "method.bottleneck": [4, 3], "train.seed": [2, 1]})
    assert {member.name: member.run for member in first} == {member.name: member.run for member in second}
    assert first[0].name.startswith("bottleneck_3-network_0.1-seed_1-")
    assert first[0].run_dir.name == first[0].name


def test_more_values_leave_the_names_of_the_others(expand: Callable[..., list[Member]]) -> None:
    few, more = expand({"train.seed": [1, 2]}), expand({"train.seed": [0, 1, 2, 3]})
    assert [member.name for member in more[1:3]] == [member.name for member in few]


def test_what_changes_the_result_changes_the_name_and_nothing_else_does(expand: Callable[..., list[Member]]) -> None:
    def name(*overrides: str) -> str:
        return expand({"train.seed": [1]}, overrides=overrides)[0].name

    assert name("train.save_every=7", "logging.every_steps=3") == name()
    assert len({name(), name("train.weight_decay=0.1"), name("model.name_or_path=other")}) == 3


def test_settings_of_the_command_line_hold_for_all_members(expand: Callable[..., list[Member]]) -> None:
    found = expand({"train.seed": [1, 2]}, overrides=("method.bottleneck=9", 'logging.trackers=["wandb"]'))
    assert [member.run.method.model_dump()["bottleneck"] for member in found] == [9, 9]
    assert found[0].run.logging.trackers == ("wandb",)


def test_methods_of_a_grid_keep_the_files_settings_for_its_own_method_only(
    expand: Callable[..., list[Member]],
) -> None:
    found = expand({"method.name": ["adept", "full"]}, method={"bottleneck": 9})
    assert [member.run.method.name for member in found] == ["adept", "full"]
    assert found[0].run.method.model_dump()["bottleneck"] == 9
    assert found[1].name.startswith("full-")


def test_a_list_of_grids_is_all_their_members_once(expand: Callable[..., list[Member]]) -> None:
    found = expand(
        {"method.name": ["adept"], "method.bottleneck": [1, 2]},
        {"method.bottleneck": [2], "method.name": ["adept"]},
        {"method.name": ["full"]},
    )
    assert [member.settings.get("method.bottleneck") for member in found] == [1, 2, None]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"train.seeds": [1]}, r"train\.seeds: unknown key; did you mean train\.seed\?"),
        ({"train.seed": 3}, r"train\.seed = 3: expected a list"),
        ({"train.seed": []}, "expected a list with one value or more"),
        ({"method.bottleneck, train.seed": [[1, 2], [3]]}, r"\[3\] is no list of 2 values"),
        ({"train.seed": [1], "train.seed,method.bottleneck": [[1, 2]]}, r"train\.seed: in the grid twice"),
        ({"logging.run_dir": ["a", "b"]}, "every member has a run folder of its own"),
        ({"train.seed": [1, -1], "method.bottleneck": [1, 2]}, r"train\.seed = -1 \(grid or command line\)"),
        ({"method.name": ["full"], "method.bottleneck": [2]}, "unknown key of method 'full'"),
    ],
)
def test_a_mistake_is_told_before_any_run(expand: Callable[..., list[Member]], grid: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        expand(grid)


def test_one_mistake_in_many_members_is_told_once(expand: Callable[..., list[Member]]) -> None:
    with pytest.raises(UserError) as error:
        expand({"train.seed": [1, 2, 3], "method.bottleneck": [0]})
    assert str(error.value).count("method.bottleneck = 0") == 1


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["train.seed=1,2"], "is not JSON; expected a list such as"),
        (["train.seed=[1]", "train.seed=[2]"], "given twice"),
        (["train.seed=[1]", "grid.json"], "expected key="),
        (["nowhere.json"], "no such file"),
    ],
)
def test_a_grid_that_cannot_be_read_is_told(items: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_grid(items)


def test_a_key_twice_in_a_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    path.write_text('{"train.seed": [1], "train.seed": [2]}')
    with pytest.raises(UserError, match=r"'train\.seed' is given twice"):
        read_grid([str(path)])


def test_the_best_setting_has_the_best_mean_over_seeds(expand: Callable[..., list[Member]]) -> None:
    found = expand({"method.bottleneck": [1, 2], "train.seed": [1, 2]})
    for member, loss in zip(found, (0.1, 0.9, 0.4, 0.5), strict=True):  # 1 has the best run, 2 the better mean
        finish(member, loss)
    as_json, text = summary(found)
    assert [setting["best"] for setting in as_json["settings"]] == [False, True]
    assert as_json["settings"][1]["mean"] == pytest.approx(0.45)
    assert as_json["settings"][1]["standard_deviation"] == pytest.approx(0.0707, abs=1e-4)
    assert [line for line in text.splitlines() if line.startswith("*")] == ["*     2/2   0.4500  0.0707     2"]


def test_a_metric_is_better_the_higher_it_is(expand: Callable[..., list[Member]]) -> None:
    found = expand({"method.bottleneck": [1, 2]}, eval={"metric": "pass@1"})
    finish(found[0], 0.2)
    finish(found[1], 0.3)
    assert [setting["best"] for setting in summary(found)[0]["settings"]] == [False, True]


def test_a_setting_with_a_run_to_come_is_not_the_best_yet(expand: Callable[..., list[Member]]) -> None:
    found = expand({"method.bottleneck": [1, 2], "train.seed": [1, 2]})
    finish(found[0], 0.1)
    finish(found[1], 0.1, state="interrupted")
    finish(found[2], 0.4)
    finish(found[3], 0.4)
    assert [setting["best"] for setting in summary(found)[0]["settings"]] == [False, True]


def test_each_method_has_a_best_of_its_own(expand: Callable[..., list[Member]]) -> None:
    found = expand({"method.name": ["adept"], "method.bottleneck": [1, 2]}, {"method.name": ["full"]})
    for member, loss in zip(found, (0.1, 0.2, 0.3), strict=True):
        finish(member, loss)
    assert [setting["best"] for setting in summary(found)[0]["settings"]] == [True, False, True]


def test_a_dry_run_lists_members_and_writes_nothing(
    expand: Callable[..., list[Member]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = expand({"train.seed": [1, 2]})
    finish(found[0], 0.25)
    before = sorted(tmp_path.rglob("*"))
    arguments = ["--config", str(tmp_path / "base.json"), "--grid", "train.seed=[1, 2]", "--dry-run"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert f"finished  5/5   0.2500  1     {found[0].name}" in shown
    assert f"waiting                 2     {found[1].name}" in shown
    assert sorted(tmp_path.rglob("*")) == before


def test_a_launcher_that_is_not_there_is_told(expand: Callable[..., list[Member]], tmp_path: Path) -> None:
    expand({"train.seed": [1]})
    arguments = ["--config", str(tmp_path / "base.json"), "--grid", "train.seed=[1]", "--launcher", "deepsped"]
    with pytest.raises(UserError, match="--launcher 'deepsped': no such program"):
        main(arguments)
