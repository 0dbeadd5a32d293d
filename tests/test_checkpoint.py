"""Checkpoints: whole or not there, damaged ones passed over, the newest kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adept_ds.config.method import AdeptConfig
from adept_ds.distributed import World
from adept_ds.errors import UserError
from adept_ds.storage import adapter_folder
from adept_ds.storage.checkpoint import (
    OPTIMIZER_NAME,
    Checkpoint,
    Origin,
    TrainerState,
    collect_rng,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    publish,
    replace_folder,
    restore_rng,
    save_checkpoint,
    write_tensors,
)
from adept_ds.storage.run_folder import SHARDED
from tests.conftest import WORLD

pytestmark = pytest.mark.usefixtures("world")
VALUES = {"soft_prompt": torch.tensor([[0.1, 1e-30], [3.0, -7.7]]), "network.b1": torch.tensor([2.5])}
MOMENTS = {"soft_prompt.exp_avg": torch.tensor([[1e-9, 2.0], [3.0, 4.0]]), "network.b1.exp_avg_sq": torch.tensor([0.3])}


def write_states(folder: Path) -> None:
    adapter_folder.save_adapter(folder, AdeptConfig(num_virtual_tokens=2), VALUES, {"name_or_path": "tiny"}, {})
    write_tensors(folder / OPTIMIZER_NAME, MOMENTS)


def save(root: Path, step: int, keep: int = 10, writer: Callable[[Path], None] = write_states) -> Path:
    state = TrainerState(step=step, best_step=1, best_value=0.1 + 0.2, world_size=1)
    return save_checkpoint(root, state, writer, {"0.cpu": torch.get_rng_state()}, keep, WORLD)


def steps(root: Path) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in list_checkpoints(root)]


def newest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    warnings: list[str] = []
    return newest_checkpoint(root, warnings.append), warnings


def test_round_trip_is_bit_exact(tmp_path):
    state = torch.get_rng_state()
    checkpoint = load_checkpoint(save(tmp_path, 7))
    assert checkpoint.state == TrainerState(step=7, best_step=1, best_value=0.1 + 0.2, world_size=1)
    for saved, read in ((VALUES, checkpoint.values), (MOMENTS, checkpoint.optimizer_states)):
        assert saved.keys() == read.keys()
        assert all(torch.equal(saved[name], read[name]) for name in saved)
    assert torch.equal(checkpoint.rng["0.cpu"], state)


def test_a_checkpoint_is_an_adapter(tmp_path):
    assert adapter_folder.load_adapter(save(tmp_path, 7)).method.num_virtual_tokens == 2


def test_the_newest_is_taken(tmp_path):
    for step in (9, 100, 20):
        save(tmp_path, step)
        checkpoint, warnings = newest(tmp_path)
        assert checkpoint is not None
        assert checkpoint.state.step == step
        assert warnings == []


def test_no_folder_has_no_checkpoint(tmp_path):
    assert newest(tmp_path / "none") == (None, [])


@pytest.mark.parametrize(
    "name",
    [
        "adapter_model.safetensors",
        "adapter_config.json",
        "optimizer.safetensors",
        "rng.safetensors",
        "state.json",
        "manifest.json",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_a_damaged_checkpoint_is_skipped_with_a_message(tmp_path, name, damage):
    save(tmp_path, 10)
    path = save(tmp_path, 20) / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content.replace(content[-9:-8], b"\x07"))
    checkpoint, warnings = newest(tmp_path)
    assert checkpoint is not None
    assert checkpoint.state.step == 10
    assert len(warnings) == 1
    assert name in warnings[0]
    assert "step-00000020" in warnings[0]


def test_all_damaged_is_as_none(tmp_path):
    (save(tmp_path, 10) / "state.json").unlink()
    checkpoint, warnings = newest(tmp_path)
    assert checkpoint is None
    assert len(warnings) == 1


def test_a_damaged_checkpoint_asked_for_is_an_error(tmp_path):
    folder = save(tmp_path, 10)
    (folder / "rng.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"step-00000010 is damaged: rng\.safetensors missing or changed"):
        load_checkpoint(folder)


def test_a_folder_that_is_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"is not a whole checkpoint: it has no manifest\.json"):
        load_checkpoint(tmp_path / "nowhere")


def crash_after_a_file(folder: Path) -> None:
    write_states(folder)
    raise KeyboardInterrupt


def test_a_crash_while_writing_leaves_the_older_one(tmp_path):
    save(tmp_path, 10)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 20, writer=crash_after_a_file)
    assert steps(tmp_path) == [10]
    checkpoint, warnings = newest(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.state.step, warnings) == (10, [])


def test_a_crash_while_writing_over_one_leaves_it(tmp_path):
    save(tmp_path, 10)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 10, writer=crash_after_a_file)
    assert newest(tmp_path)[0] is not None


def test_an_exception_while_writing_leaves_no_files(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 10, writer=crash_after_a_file)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    left = tmp_path / ".step-00000010.tmp"
    left.mkdir()
    (left / "junk").touch()
    save(tmp_path, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]
    assert newest(tmp_path)[0] is not None


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 11):
        save(tmp_path, step, keep=2)
    assert steps(tmp_path) == [10, 11]


def test_a_run_that_went_back_drops_the_checkpoints_of_later_steps(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)
    (tmp_path / "step-00000030" / "state.json").unlink()
    save(tmp_path, 15, keep=2)
    assert steps(tmp_path) == [10, 15]


def test_replace_folder_replaces_all_of_it(tmp_path):
    replace_folder(tmp_path / "a", lambda folder: (folder / "old").touch(), WORLD)
    replace_folder(tmp_path / "a", lambda folder: (folder / "new").touch(), WORLD)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["new"]


def publish_text(root: Path, name: str, content: str) -> None:
    publish(root / "best", name, lambda folder: (folder / "file").write_text(content) and None, WORLD)


def test_best_points_at_the_published_adapter_and_the_old_one_goes(tmp_path):
    publish_text(tmp_path, "best-1", "one")
    publish_text(tmp_path, "best-2", "two")
    assert (tmp_path / "best" / "file").read_text() == "two"
    assert (tmp_path / "best").readlink() == Path("best-2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "best-2"]


def test_publishing_the_same_name_again_keeps_it(tmp_path):
    publish_text(tmp_path, "best-1", "one")
    publish_text(tmp_path, "best-1", "again")
    assert (tmp_path / "best" / "file").read_text() == "again"


def test_a_crash_while_publishing_leaves_the_old_best(tmp_path):
    publish_text(tmp_path, "best-1", "one")
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "best", "best-2", crash_after_a_file, WORLD)
    assert (tmp_path / "best" / "file").read_text() == "one"


def test_a_run_folder_can_be_moved_with_its_best(tmp_path):
    (tmp_path / "run").mkdir()
    publish_text(tmp_path / "run", "best-1", "one")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "best" / "file").read_text() == "one"


def with_rng(tmp_path: Path, rng: dict[str, torch.Tensor], world_size: int = 1) -> Checkpoint:
    state = TrainerState(step=3, world_size=world_size)
    return load_checkpoint(save_checkpoint(tmp_path, state, write_states, rng, 1, WORLD))


def test_random_numbers_go_on_where_they_were(tmp_path, world: World):
    torch.manual_seed(5)
    torch.rand(3)
    checkpoint = with_rng(tmp_path, collect_rng(world))
    expected = torch.rand(4)
    torch.manual_seed(0)
    restore_rng(checkpoint, world, seed=1)
    assert torch.equal(torch.rand(4), expected)


def test_on_another_number_of_ranks_random_numbers_start_anew_and_repeat(tmp_path, world: World):
    checkpoint = with_rng(tmp_path, collect_rng(world), world_size=2)
    draws = []
    for seed in (1, 1, 2):
        restore_rng(checkpoint, world, seed)
        draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_the_manifest_names_every_other_file(tmp_path):
    folder = save(tmp_path, 10)
    names = {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert json.loads((folder / "manifest.json").read_text()).keys() == names


def write_parts(folder: Path) -> None:
    (folder / SHARDED).mkdir()
    (folder / SHARDED / "part.pt").write_bytes(b"0123456789")


def save_sharded(root: Path, step: int, world_size: int = 2) -> Path:
    state = TrainerState(step=step, world_size=world_size, zero_stage=3)
    return save_checkpoint(root, state, write_parts, {"0.cpu": torch.get_rng_state()}, 9, WORLD)


def test_a_sharded_checkpoint_is_read_without_its_tensors(tmp_path):
    checkpoint = load_checkpoint(save_sharded(tmp_path, 5))
    assert (checkpoint.state.zero_stage, checkpoint.values, checkpoint.optimizer_states) == (3, {}, {})


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_part_of_a_sharded_checkpoint_is_noticed(tmp_path, damage):
    part = save_sharded(tmp_path, 5) / SHARDED / "part.pt"
    part.unlink() if damage == "missing" else part.write_bytes(b"01234")
    checkpoint, warnings = newest(tmp_path)
    assert checkpoint is None
    assert "deepspeed/part.pt missing or changed" in warnings[0]


@pytest.mark.parametrize(("world_size", "stage"), [(4, 3), (1, 3), (2, 2)])
def test_a_sharded_checkpoint_is_for_its_ranks_and_stage_only(tmp_path, world_size, stage):
    checkpoint = load_checkpoint(save_sharded(tmp_path, 5))
    checkpoint.check_ranks(2, 3)
    with pytest.raises(UserError, match="split over 2 ranks at ZeRO stage 3, which DeepSpeed cannot split anew"):
        checkpoint.check_ranks(world_size, stage)


def test_a_checkpoint_of_whole_tensors_is_for_any_number_of_ranks(tmp_path):
    load_checkpoint(save(tmp_path, 5)).check_ranks(7, 1)


def test_a_manifest_that_proves_nothing_is_refused(tmp_path):
    (save(tmp_path, 5) / "manifest.json").write_text("{}")
    checkpoint, warnings = newest(tmp_path)
    assert checkpoint is None
    assert "does not name state.json, rng.safetensors" in warnings[0]


def test_a_state_of_another_version_is_passed_over(tmp_path):
    folder = save(tmp_path, 5)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"momentum": 1}))
    proofs = json.loads((folder / "manifest.json").read_text())
    proofs["state.json"] = hashlib.sha256((folder / "state.json").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(proofs))
    checkpoint, warnings = newest(tmp_path)
    assert checkpoint is None
    assert "was written by another version" in warnings[0]


def test_best_leads_somewhere_whenever_publishing_is_cut_off(tmp_path):
    publish_text(tmp_path, "best-1", "one")

    def fill(folder: Path) -> None:
        (folder / "file").write_text("again")
        assert (tmp_path / "best" / "file").read_text() == "one"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "symlink_to", crash_after_a_file)
        with pytest.raises(TypeError):
            publish(tmp_path / "best", "best-1", fill, WORLD)
    assert (tmp_path / "best" / "file").read_text() == "one"
    publish(tmp_path / "best", "best-1", fill, WORLD)
    assert (tmp_path / "best" / "file").read_text() == "again"


SETTINGS = {"model": {"name_or_path": "a"}, "train": {"max_steps": 9}}


def of_origin(tmp_path: Path, origin: Origin) -> Checkpoint:
    rng = {"0.cpu": torch.get_rng_state()}
    return load_checkpoint(save_checkpoint(tmp_path, TrainerState(step=3), write_states, rng, 1, WORLD, origin))


def test_the_same_weights_elsewhere_are_gone_on_with(tmp_path):
    checkpoint = of_origin(tmp_path, Origin(SETTINGS, "1f"))
    checkpoint.check_origin(Origin(SETTINGS | {"model": {"name_or_path": "b"}}, "1f"))


@pytest.mark.parametrize(
    ("settings", "backbone", "message"),
    [
        ({"model": {"name_or_path": "b"}}, "2e", "was trained on the weights of 'a'; model.name_or_path is 'b'"),
        ({"train": {"max_steps": 8}}, "1f", "a run with other settings: train.max_steps was 9 and is now 8"),
    ],
)
def test_other_weights_or_settings_are_refused(tmp_path, settings, backbone, message):
    checkpoint = of_origin(tmp_path, Origin(SETTINGS, "1f"))
    with pytest.raises(UserError, match=message):
        checkpoint.check_origin(Origin(SETTINGS | settings, backbone))
