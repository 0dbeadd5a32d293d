"""Packed rows on ranks: the losses of one example a row, however the model is held and the rows are dealt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import RunRanks, losses, run_settings

pytestmark = pytest.mark.slow
RUN_ALL = "tests/distributed/run_all.py"

RUNS: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "plain": {"stage": 0},
        "packed-stage0": {"stage": 0, "train": {"packing": 700}},
    },
    2: {
        "packed-stage3": {"stage": 3, "train": {"packing": 600}},
        "packed-stage3-checkpointed": {"stage": 3, "train": {"packing": 1000, "activation_checkpointing": True}},
        "packed-stage2-two-rows": {"stage": 2, "train": {"packing": 600, "micro_batch_size": 2}},
        "packed-stage1-dummy-rows": {"stage": 1, "train": {"packing": 3000, "micro_batch_size": 3}},
        "packed-bf16-stage3": {"stage": 3, "model": {"dtype": "bf16"}, "train": {"packing": 600}},
    },
}
"""Ranks to runs, each what it has other than fp32 and one example a row."""


def settings(model: Path, run_dir: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    made = run_settings(model, run_dir, global_batch_size=8, **wanted.get("train", {}))
    made["model"] |= wanted.get("model", {})
    made["deepspeed"]["zero_optimization"]["stage"] = wanted["stage"]
    return made


@pytest.fixture(scope="module")
def root(tiny_llama: Path, run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, in one start for each number of ranks."""
    folder = tmp_path_factory.mktemp("packing")
    for ranks, wanted_of in RUNS.items():
        runs = [settings(tiny_llama, folder / name, wanted) for name, wanted in wanted_of.items()]
        result = run_ranks(ranks, RUN_ALL, runs)
        assert result.returncode == 0, result.stdout[-6000:]
        (folder / f"{ranks}.txt").write_text(result.stdout)
    return folder


@pytest.mark.parametrize("name", [name for runs in RUNS.values() for name in runs if "packed" in name])
def test_losses_are_those_of_one_example_a_row(name: str, root: Path) -> None:
    tolerance = 3e-3 if "bf16" in name else 1e-5
    assert losses(root / name) == pytest.approx(losses(root / "plain"), rel=tolerance)


def test_an_adapter_is_the_same_after_all_steps(root: Path) -> None:
    ours, theirs = (
        load_file(root / name / "best" / "adapter_model.safetensors") for name in ("packed-stage3", "plain")
    )
    for name, value in theirs.items():
        assert float((ours[name] - value).abs().max()) < 1e-3 * float(value.abs().max())


def test_a_run_says_how_much_of_its_rows_is_padding(root: Path) -> None:
    assert "of all positions are padding, in rows of 600" in (root / "2.txt").read_text()


def test_a_packed_run_resumes_to_the_bit_and_an_unpacked_one_goes_on_packed(
    root: Path, run_ranks: RunRanks, tmp_path: Path
) -> None:
    again = []
    for name in ("packed-stage3", "plain"):
        copy = shutil.copytree(root / name, tmp_path / name, symlinks=True)
        for checkpoint in (copy / "checkpoints").iterdir():
            if checkpoint.name > "step-00000005":
                shutil.rmtree(checkpoint)
        (copy / "status.json").unlink()
        made = json.loads((root / "packed-stage3" / "config.json").read_text())
        again.append(made | {"logging": made["logging"] | {"run_dir": str(copy)}})
    result = run_ranks(2, RUN_ALL, again)
    assert result.returncode == 0, result.stdout[-6000:]
    assert losses(tmp_path / "packed-stage3") == losses(root / "packed-stage3")
    ours, theirs = (load_file(run / "packed-stage3" / "best" / "adapter_model.safetensors") for run in (tmp_path, root))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses(tmp_path / "plain") == pytest.approx(losses(root / "plain"), rel=1e-5)
