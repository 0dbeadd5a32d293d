"""The run folder: one writer, one config, resume."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from adept_ds.config.method import AdeptConfig
from adept_ds.config.run import RunConfig
from adept_ds.errors import UserError
from adept_ds.storage import adapter_folder
from adept_ds.storage.checkpoint import OPTIMIZER_NAME, TrainerState, find_checkpoint, save_checkpoint, write_tensors
from adept_ds.storage.run_folder import RunFolder, list_checkpoints, newest_step
from tests.conftest import WORLD

pytestmark = pytest.mark.usefixtures("world")


def resolved(**sections: dict[str, Any]) -> dict[str, Any]:
    """A resolved config as the training writes it."""
    values: dict[str, Any] = {"model": {"name_or_path": "tiny"}, "train": {"max_steps": 900}}
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    return RunConfig.model_validate(values).model_dump(mode="json", by_alias=True)


def start(path: Path, config: dict[str, Any], resume: str = "never") -> Any:
    """Open a folder as a process would that takes a step and ends afterwards."""
    warnings: list[str] = []
    folder = RunFolder(path)
    folder.open(config, resume)
    (path / "metrics.jsonl").write_text('{"step": 1}\n')
    return find_checkpoint(folder.checkpoints, resume, warnings.append)


def write_checkpoint(root: Path, step: int) -> Path:
    tensors = {"x": torch.ones(1)}

    def write_states(folder: Path) -> None:
        adapter_folder.save_adapter(folder, AdeptConfig(), {"soft_prompt": torch.ones(1)}, {}, {})
        write_tensors(folder / OPTIMIZER_NAME, tensors)

    return save_checkpoint(root, TrainerState(step=step), write_states, tensors, 9, WORLD)


def test_a_second_writer_is_refused(tmp_path):
    first = RunFolder(tmp_path)
    first.open(resolved(), "never")
    holder = f"where another process is training now: process {os.getpid()} of .* on {platform.node()}"
    with pytest.raises(UserError, match=holder):
        RunFolder(tmp_path).open(resolved(), "auto")
    del first
    RunFolder(tmp_path).open(resolved(), "auto")


def test_a_file_system_without_locks_is_told_and_goes_on(tmp_path, monkeypatch, capsys):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    RunFolder(tmp_path).open(resolved(), "never")
    assert "on a file system without locks (No locks available)" in capsys.readouterr().out
    assert (tmp_path / "config.json").is_file()


def test_a_newer_try_of_the_same_run_is_seen(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.newer_try({"ADEPT_DS_TRY": "7.0"}) is None
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "try").write_text("7.1\n")
    assert folder.newer_try({"ADEPT_DS_TRY": "7.0"}) == "7.1"
    assert folder.newer_try({"ADEPT_DS_TRY": "7.1"}) is None
    assert folder.newer_try({}) is None


def test_only_whole_checkpoints_of_its_own_count(tmp_path):
    for step in (5, 10):
        write_checkpoint(tmp_path / "checkpoints", step)
    for name in ("step-notes.txt", "step-zzz", "step-00000099-good"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert newest_step(tmp_path) == 10
    (tmp_path / "checkpoints" / "step-00000010" / "rng.safetensors").write_bytes(b"")
    assert newest_step(tmp_path) == 5


def test_the_resolved_config_is_stored(tmp_path):
    config = resolved()
    start(tmp_path / "deep" / "run", config)
    assert json.loads((tmp_path / "deep" / "run" / "config.json").read_text()) == config


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_new_folder_starts_at_the_beginning(tmp_path, resume):
    assert start(tmp_path, resolved(), resume) is None


def test_never_is_refused_on_a_used_folder(tmp_path):
    start(tmp_path, resolved())
    with pytest.raises(UserError, match="holds a run already: go on with it by --resume auto"):
        start(tmp_path, resolved())


def test_auto_on_a_used_folder_without_checkpoints_starts_over(tmp_path):
    start(tmp_path, resolved())
    assert start(tmp_path, resolved(), "auto") is None


def test_auto_takes_the_newest_checkpoint(tmp_path):
    start(tmp_path, resolved())
    for step in (5, 10):
        write_checkpoint(tmp_path / "checkpoints", step)
    assert start(tmp_path, resolved(), "auto").state.step == 10


def test_a_checkpoint_can_be_named(tmp_path):
    folder = write_checkpoint(tmp_path / "other", 5)
    assert start(tmp_path / "run", resolved(), str(folder)).state.step == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"weight_decay": 0.5}}, "train.weight_decay was 0.01 and is now 0.5"),
        (
            {"train": {"learning_rate": {"soft_prompt": 0.3}}},
            "train.learning_rate.soft_prompt was 0.001 and is now 0.3",
        ),
        ({"method": {"bottleneck": 2}}, "method.bottleneck was 1 and is now 2"),
        ({"data": {"max_length": 600}}, "data.max_length was 581 and is now 600"),
        ({"model": {"dtype": "fp32"}}, "model.dtype was 'bf16' and is now 'fp32'"),
    ],
)
def test_a_changed_setting_is_named(tmp_path, changes, message):
    start(tmp_path, resolved())
    with pytest.raises(UserError) as caught:
        start(tmp_path, resolved(**changes), "auto")
    assert message in str(caught.value)


def test_all_changed_settings_are_named_at_once(tmp_path):
    start(tmp_path, resolved())
    with pytest.raises(UserError, match=r"method\.bottleneck .*; train\.weight_decay"):
        start(tmp_path, resolved(train={"weight_decay": 0.5}, method={"bottleneck": 2}), "auto")


def test_a_refused_config_does_not_replace_the_stored_one(tmp_path):
    start(tmp_path, resolved())
    with pytest.raises(UserError):
        start(tmp_path, resolved(method={"bottleneck": 2}), "auto")
    assert start(tmp_path, resolved(), "auto") is None


@pytest.mark.parametrize(
    "changes",
    [
        {"logging": {"every_steps": 3}},
        {"eval": {"every_steps": 50, "generation": {"batch_size": 2}}},
        {"deepspeed": {"zero_optimization": {"stage": 3}}},
        {"train": {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "keep_checkpoints": 7, "save_every": 5}},
        {"model": {"name_or_path": "elsewhere/tiny"}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_that_do_not_change_the_training_may_change(tmp_path, changes):
    start(tmp_path, resolved())
    start(tmp_path, resolved(**changes), "auto")
    assert json.loads((tmp_path / "config.json").read_text()) == resolved(**changes)


def without(config: dict[str, Any], section: str, *keys: str) -> dict[str, Any]:
    """A resolved config as a version wrote it that did not have these settings yet."""
    return config | {section: {key: value for key, value in config[section].items() if key not in keys}}


def test_a_setting_that_is_new_since_the_run_began_has_its_default(tmp_path):
    start(tmp_path, without(resolved(), "train", "warmup_ratio", "schedule_options", "early_stopping_patience"))
    start(tmp_path, resolved(), "auto")


def test_a_new_setting_with_another_value_is_named(tmp_path):
    start(tmp_path, without(resolved(), "train", "early_stopping_patience"))
    with pytest.raises(UserError, match=r"train\.early_stopping_patience was None and is now 3"):
        start(tmp_path, resolved(train={"early_stopping_patience": 3}), "auto")


def test_a_setting_that_there_is_no_longer_is_named(tmp_path):
    old = resolved()
    old["train"]["momentum"] = 0.5
    start(tmp_path, old)
    with pytest.raises(UserError, match=r"train\.momentum was 0\.5 and is now None"):
        start(tmp_path, resolved(), "auto")


def test_the_metric_that_the_best_is_chosen_by_may_not_change(tmp_path):
    start(tmp_path, resolved())
    with pytest.raises(UserError, match=r"eval\.metric was 'loss' and is now 'pass@1'"):
        start(tmp_path, resolved(eval={"metric": "pass@1"}), "auto")


def test_status_is_that_of_the_last_try(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.status() == {}
    folder.set_status("running", 0, 10)
    folder.set_status("interrupted", 4, 10, signal="SIGTERM")
    assert folder.status() == {"state": "interrupted", "step": 4, "total_steps": 10, "signal": "SIGTERM"}


def test_a_try_that_took_no_step_is_no_run(tmp_path):
    """Of a start that failed, such as for a model that cannot be loaded, the corrected command takes the folder."""
    RunFolder(tmp_path).open(resolved(), "never")
    start(tmp_path, resolved(method={"bottleneck": 2}))
    with pytest.raises(UserError, match="holds a run already"):
        start(tmp_path, resolved(method={"bottleneck": 2}))


def test_a_folder_that_cannot_be_made_is_told_by_its_setting(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"logging\.run_dir is .*file/run.*Not a directory"):
        RunFolder(tmp_path / "file" / "run").open(resolved(), "never")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, number):
    def flock(file: Any, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    warnings: list[str] = []
    RunFolder(tmp_path).open(resolved(), "never", warnings.append)
    assert "on a file system without locks" in warnings[0]
    assert os.strerror(number) in warnings[0]


def test_only_what_a_run_has_written_is_looked_at_or_removed(tmp_path):
    root = tmp_path / "checkpoints"
    write_checkpoint(root, 5)
    own = [root / "step-notes", root / "step-00000007-good", root / "step-zzz", tmp_path / "best-step-old"]
    for folder in own:
        folder.mkdir()
    (root / "step-00000008").touch()
    (root / "step-00000009").symlink_to(root / "step-00000007-good")
    folder = RunFolder(tmp_path)
    folder.open(resolved(), "auto")
    folder.clear_litter()
    assert [path.name for path in list_checkpoints(root)] == ["step-00000005"]
    assert newest_step(tmp_path) == 5
    write_checkpoint(root, 6)
    assert all(path.exists() for path in own)


def test_what_killed_tries_left_is_cleared_away(tmp_path):
    write_checkpoint(tmp_path / "checkpoints", 5)
    litter = [
        tmp_path / "best-step-00000003",
        tmp_path / ".best-step-00000004.tmp",
        tmp_path / "checkpoints" / ".step-00000006.tmp",
    ]
    for left in (*litter, tmp_path / "best-step-00000005"):
        left.mkdir()
    (tmp_path / "best").symlink_to("best-step-00000005")
    (tmp_path / ".config.json.ab3_xy7z").touch()
    folder = RunFolder(tmp_path)
    folder.open(resolved(), "auto")
    folder.clear_litter()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"best", "best-step-00000005", "checkpoints", "config.json", ".lock"}
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]
