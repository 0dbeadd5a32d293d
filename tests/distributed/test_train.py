"""Training on two ZeRO-3 ranks by the real launcher, against plain PyTorch and against itself after interruptions."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, get_linear_schedule_with_warmup

from adept_ds.config.method import AdeptConfig
from adept_ds.config.run import DataConfig
from adept_ds.data.batches import global_batches
from adept_ds.data.encode import EncodedDataset
from adept_ds.data.problems import load_examples
from adept_ds.model.adapted_model import get_adept_model
from tests.conftest import Launch, RunRanks, Start, losses, run_settings

TRAIN = "launchers/train.py"
ON_FP16 = "tests/distributed/run_all.py"
"""Trains, or goes on, in fp16 on a CPU too."""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole_run(tiny_llama: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 12 steps on two ranks."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    result = launch(2, TRAIN, run_settings(tiny_llama, run_dir))
    assert result.returncode == 0, result.stdout
    return run_dir


def plain_pytorch_losses(model_path: Path, tokenizer: PreTrainedTokenizerFast, steps: int) -> list[float]:
    """The run of `run_settings` written out with torch and transformers alone: eq. 3 and 4 on input embeddings.

    Only the start values and the order of the examples are taken from the project.
    """
    start = get_adept_model(
        AutoModelForCausalLM.from_pretrained(model_path), AdeptConfig(num_virtual_tokens=5, bottleneck=2), seed=42
    )
    values = {name: value.detach().clone().requires_grad_() for name, value in start.trainable_parameters().items()}
    prompt, w_down, b1, w_up, b2 = (
        values[name] for name in ("soft_prompt", "network.w_down", "network.b1", "network.w_up", "network.b2")
    )
    backbone = AutoModelForCausalLM.from_pretrained(model_path).requires_grad_(False)
    dataset = EncodedDataset(load_examples(DataConfig(), "train"), tokenizer, DataConfig(), 5, False)
    optimizer = torch.optim.AdamW(
        [{"params": [prompt], "lr": 0.03}, {"params": [w_down, b1, w_up, b2], "lr": 0.01}],
        betas=(0.9, 0.98),
        eps=1e-6,
        weight_decay=0.01,
    )
    schedule = get_linear_schedule_with_warmup(optimizer, 2, steps)
    found = []
    for batch in global_batches(dataset.lengths, 4, 42, 0, True)[:steps]:
        total, labels = torch.zeros(()), 0
        for example in (dataset[index] for index in batch):
            embeddings = backbone.get_input_embeddings()(torch.tensor(example.input_ids))
            embeddings = embeddings + F.relu(embeddings @ w_down + b1) @ w_up + b2
            logits = backbone(inputs_embeds=torch.cat([prompt, embeddings])[None]).logits[0, 5:]
            targets = torch.tensor(example.labels)
            total = total + F.cross_entropy(logits[:-1], targets[1:], ignore_index=-100, reduction="sum")
            labels += int((targets[1:] != -100).sum())
        (total / labels).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append(float(total.detach()) / labels)
    return found


def test_two_ranks_of_zero3_give_the_loss_curve_of_plain_pytorch(
    whole_run: Path, tiny_llama: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = plain_pytorch_losses(tiny_llama, tiny_tokenizer, 12)
    assert expected[-1] < expected[0]
    assert losses(whole_run) == pytest.approx(expected, rel=1e-5)


def test_a_run_folder_holds_config_status_metrics_checkpoints_and_the_best_adapter(whole_run: Path) -> None:
    assert json.loads((whole_run / "config.json").read_text())["train"]["adam_betas"] == [0.9, 0.98]
    status = json.loads((whole_run / "status.json").read_text())
    assert (status["state"], status["step"], status["best_step"]) == ("finished", 12, 12)
    assert sorted(folder.name for folder in (whole_run / "checkpoints").iterdir()) == [
        "step-00000005",
        "step-00000010",
        "step-00000012",
    ]
    tensors = load_file(whole_run / "best" / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "soft_prompt": (5, 32),
        "network.w_down": (32, 2),
        "network.b1": (2,),
        "network.w_up": (2, 32),
        "network.b2": (32,),
    }


def test_a_checkpoint_never_holds_the_backbone(whole_run: Path) -> None:
    size = sum(path.stat().st_size for path in (whole_run / "checkpoints" / "step-00000012").iterdir())
    trained = 5 * 32 + 2 * 2 * 32 + 2 + 32
    assert size < 3 * 4 * trained + 20_000  # values and two moments in fp32; two ranks' RNG states and JSON


def resumed_copy(whole_run: Path, folder: Path, last_step: int) -> Path:
    """The folder of the same run as it was after `last_step` steps."""
    shutil.copytree(whole_run, folder, symlinks=True)
    for checkpoint in (folder / "checkpoints").iterdir():
        if checkpoint.name > f"step-{last_step:08d}":
            shutil.rmtree(checkpoint)
    (folder / "status.json").unlink()
    return folder


def settings_of(run_dir: Path, copy: Path) -> dict[str, Any]:
    settings = json.loads((run_dir / "config.json").read_text())
    settings["logging"]["run_dir"] = str(copy)
    return settings


def test_a_resumed_run_is_equal_to_the_bit(whole_run: Path, run_ranks: RunRanks, tmp_path: Path) -> None:
    copy = resumed_copy(whole_run, tmp_path / "run", last_step=5)
    result = run_ranks(2, TRAIN, settings_of(whole_run, copy), "--resume", "auto")
    assert result.returncode == 0, result.stdout
    assert "step-00000005" in result.stdout
    assert losses(copy) == losses(whole_run)
    ours, theirs = (load_file(run / "best" / "adapter_model.safetensors") for run in (copy, whole_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_resumes_on_another_number_of_ranks_past_a_damaged_checkpoint(
    whole_run: Path, run_ranks: RunRanks, tmp_path: Path
) -> None:
    copy = resumed_copy(whole_run, tmp_path / "run", last_step=10)
    (copy / "checkpoints" / "step-00000010" / "optimizer.safetensors").write_bytes(b"cut short")
    half_written = copy / "checkpoints" / "step-00000011"
    half_written.mkdir()
    (half_written / "state.json").write_text("{}")
    result = run_ranks(0, TRAIN, settings_of(whole_run, copy), "--resume", "auto")
    assert result.returncode == 0, result.stdout
    assert "step-00000011 is not a whole checkpoint" in result.stdout
    assert "step-00000010 is damaged: optimizer.safetensors" in result.stdout
    assert losses(copy) == pytest.approx(losses(whole_run), rel=1e-5)
    assert losses(copy)[:5] == losses(whole_run)[:5]


def signal_group(process: Any) -> None:
    """As Ctrl-C in a terminal, `timeout` and service managers do: launcher and ranks alike get the signal."""
    os.killpg(process.pid, signal.SIGTERM)


def signal_ranks(process: Any) -> None:
    """As a batch system does."""
    for rank in ranks_of(process.pid):
        os.kill(rank, signal.SIGUSR1)


LONG = 60
"""Steps of a run that is interrupted: enough for a signal to come in time on a busy machine."""


def long_settings(model: Path, run_dir: Path) -> dict[str, Any]:
    """The checkpoints of the schedule are out of the way: what is resumed from is what a signal saved."""
    return run_settings(model, run_dir, max_steps=LONG, save_every=LONG) | {"eval": {"every_steps": LONG}}


@pytest.fixture(scope="module")
def long_run(tiny_llama: Path, run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("long") / "run"
    result = run_ranks(2, TRAIN, long_settings(tiny_llama, run_dir))
    assert result.returncode == 0, result.stdout
    return run_dir


@pytest.mark.parametrize(("send", "name"), [(signal_group, "SIGTERM"), (signal_ranks, "SIGUSR1")])
def test_a_signal_saves_at_the_next_step_and_nothing_is_lost(
    send: Any, name: str, tiny_llama: Path, long_run: Path, start: Start, run_ranks: RunRanks, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    settings = long_settings(tiny_llama, run_dir)
    process = start(2, TRAIN, settings)
    try:
        wait_for_steps(run_dir, 2, process)
        send(process)
        output, _ = process.communicate(timeout=120)  # Ends when the last rank has closed its output.
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["signal"]) == ("interrupted", name), output
    assert 2 <= status["step"] < LONG
    if send is signal_ranks:  # The launcher's own status after it was signalled is its own.
        assert process.returncode == 0
    assert losses(run_dir) == losses(long_run)[: status["step"]]

    result = run_ranks(2, TRAIN, settings, "--resume", "auto")
    assert result.returncode == 0, result.stdout
    assert losses(run_dir) == losses(long_run)


def test_a_run_that_slurm_has_started_again_elsewhere_stops_and_saves(
    tiny_llama: Path, run_ranks: RunRanks, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    settings = run_settings(tiny_llama, run_dir, max_steps=3)
    newest = run_dir / "slurm" / "try"
    newest.parent.mkdir(parents=True)
    newest.write_text("7.1\n")
    older = run_ranks(2, TRAIN, settings, ADEPT_DS_TRY="7.0")
    assert older.returncode == 0, older.stdout
    assert "interrupted by try 7.1, which has taken over, and saved" in older.stdout
    assert json.loads((run_dir / "status.json").read_text())["state"] == "interrupted"
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000001"]
    newer = run_ranks(2, TRAIN, settings, "--resume", "auto", ADEPT_DS_TRY="7.1")
    assert newer.returncode == 0, newer.stdout
    assert json.loads((run_dir / "status.json").read_text())["state"] == "finished"


def wait_for_steps(run_dir: Path, steps: int, process: Any) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run_dir / "metrics.jsonl").exists() and len(losses(run_dir)) >= steps:
            return
        time.sleep(0.01)
    raise AssertionError(f"no {steps} steps: {process.communicate()[0] if process.poll() is not None else 'too slow'}")


def ranks_of(session: int) -> list[int]:
    """Process ids of the training ranks in a session."""
    ranks = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            if os.getsid(int(folder.name)) == session and TRAIN.encode() in command and b"-u" in command[:2]:
                ranks.append(int(folder.name))
        except (OSError, ProcessLookupError):
            continue
    ranks = [rank for rank in ranks if b"RANK=" in (Path("/proc") / str(rank) / "environ").read_bytes()]
    assert len(ranks) == 2, ranks
    return ranks


def test_bf16_follows_fp32(tiny_llama: Path, whole_run: Path, run_ranks: RunRanks, tmp_path: Path) -> None:
    settings = run_settings(tiny_llama, tmp_path / "run")
    settings["model"]["dtype"] = "bf16"
    result = run_ranks(2, TRAIN, settings)
    assert result.returncode == 0, result.stdout
    assert losses(tmp_path / "run") == pytest.approx(losses(whole_run), rel=3e-3)


def test_accumulation_and_checkpointing_change_nothing(
    tiny_llama: Path, whole_run: Path, run_ranks: RunRanks, tmp_path: Path
) -> None:
    settings = run_settings(tiny_llama, tmp_path / "run", micro_batch_size=1, activation_checkpointing=True)
    result = run_ranks(2, TRAIN, settings)
    assert result.returncode == 0, result.stdout
    assert losses(tmp_path / "run") == pytest.approx(losses(whole_run), rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_zero_stage_trains_and_resumes_alike(
    stage: int, tiny_llama: Path, whole_run: Path, run_ranks: RunRanks, tmp_path: Path
) -> None:
    settings = run_settings(tiny_llama, tmp_path / "whole")
    settings["deepspeed"] = {"zero_optimization": {"stage": stage}}
    result = run_ranks(0, TRAIN, settings)
    assert result.returncode == 0, result.stdout
    assert losses(tmp_path / "whole") == pytest.approx(losses(whole_run), rel=1e-5)

    copy = resumed_copy(tmp_path / "whole", tmp_path / "copy", last_step=5)
    result = run_ranks(0, TRAIN, settings_of(tmp_path / "whole", copy), "--resume", "auto")
    assert result.returncode == 0, result.stdout
    assert losses(copy) == losses(tmp_path / "whole")


def test_t5_trains_on_two_ranks_as_on_one(tiny_t5: Path, run_ranks: RunRanks, tmp_path: Path) -> None:
    rows = [{"prompt": f"sum of {a} and {b}", "completion": str(a + b)} for a in range(6) for b in range(4)]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = []
    for ranks in (2, 0):
        settings = run_settings(tiny_t5, tmp_path / f"run{ranks}", max_steps=8)
        settings["data"] = {"format": "jsonl", "path": str(data), "validation_path": str(data)}
        result = run_ranks(ranks, TRAIN, settings)
        assert result.returncode == 0, result.stdout
        curves.append(losses(tmp_path / f"run{ranks}"))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert curves[0][-1] < curves[0][0]


def test_dropout_is_on_from_the_first_step(tiny_t5: Path, run_ranks: RunRanks, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_t5, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dropout_rate": 0.3}))
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"prompt": "one and one", "completion": "two"}) + "\n")
    settings = run_settings(model, tmp_path / "run", max_steps=4, global_batch_size=1)
    settings["train"]["learning_rate"] = {"soft_prompt": 1e-30, "network": 1e-30}
    settings["data"] = {"format": "jsonl", "path": str(data)}
    result = run_ranks(0, TRAIN, settings)
    assert result.returncode == 0, result.stdout
    # Nothing is learnt from one example over and over, so the losses would be equal without dropout.
    assert len(set(losses(tmp_path / "run"))) == 4


@pytest.fixture(scope="module")
def stalled_run(tiny_llama: Path, run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that learns nothing, so that no evaluation is better than the first."""
    run_dir = tmp_path_factory.mktemp("stalled") / "run"
    settings = run_settings(tiny_llama, run_dir, early_stopping_patience=2, schedule="cosine")
    settings["train"]["learning_rate"] = {"soft_prompt": 1e-30, "network": 1e-30}
    settings["eval"] = {"every_steps": 2, "max_examples": 4}
    result = run_ranks(2, TRAIN, settings)
    assert result.returncode == 0, result.stdout
    return run_dir


def test_early_stopping_ends_a_run_that_no_longer_gets_better(stalled_run: Path) -> None:
    status = json.loads((stalled_run / "status.json").read_text())
    assert (status["state"], status["step"], status["total_steps"], status["best_step"]) == ("finished", 6, 12, 2)
    assert status["reason"] == "early stopping at step 6, best at step 2"
    assert len(losses(stalled_run)) == 6
    assert (stalled_run / "best").resolve().name == "best-step-00000002"


@pytest.mark.parametrize("last_step", [5, 6], ids=["before the last evaluation", "before the status was written"])
def test_early_stopping_of_a_resumed_run_is_that_of_the_whole_one(
    last_step: int, stalled_run: Path, run_ranks: RunRanks, tmp_path: Path
) -> None:
    copy = resumed_copy(stalled_run, tmp_path / "run", last_step)
    result = run_ranks(2, TRAIN, settings_of(stalled_run, copy), "--resume", "auto")
    assert result.returncode == 0, result.stdout
    statuses = [json.loads((run / "status.json").read_text()) for run in (copy, stalled_run)]
    assert statuses[0] == statuses[1]
    assert losses(copy) == losses(stalled_run)


def test_early_stopping_without_validation_examples_is_refused(
    tiny_llama: Path, run_ranks: RunRanks, tmp_path: Path
) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"prompt": "one and one", "completion": "two"}) + "\n")
    settings = run_settings(tiny_llama, tmp_path / "run", early_stopping_patience=2)
    settings["data"] = {"format": "jsonl", "path": str(data)}
    result = run_ranks(0, TRAIN, settings)
    assert result.returncode == 2
    assert "hold some out by data.validation_fraction" in result.stdout


def test_a_loss_that_is_not_finite_stops_before_the_step(tiny_llama: Path, run_ranks: RunRanks, tmp_path: Path) -> None:
    settings = run_settings(tiny_llama, tmp_path / "run", save_every=1)
    settings["train"]["learning_rate"] = {"soft_prompt": 1e30, "network": 1e30}
    result = run_ranks(0, TRAIN, settings)
    assert result.returncode == 2
    assert "the step was not taken" in result.stdout
    assert "Traceback" not in result.stdout


def pair_rows(path: Path, count: int = 8, validation: int = 0) -> dict[str, Any]:
    """A `data` section with so many rows of a prompt and a completion, and as many for validation as are asked for."""
    section: dict[str, Any] = {"format": "jsonl", "path": str(path / "train.jsonl")}
    for name, rows in (("train", count), ("validation", validation)):
        lines = [json.dumps({"prompt": f"{n} and {n}", "completion": str(2 * n)}) + "\n" for n in range(rows)]
        (path / f"{name}.jsonl").write_text("".join(lines))
    return section | ({"validation_path": str(path / "validation.jsonl")} if validation else {})


PATCHED = """
import math, os, runpy, sys
from pathlib import Path
{patch}
sys.argv[0] = "launchers/train.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""`launchers/train.py` on a machine, or of a fate, that a test makes up."""


def patched(tmp_path: Path, patch: str) -> str:
    script = tmp_path / "patched.py"
    script.write_text(PATCHED.format(patch=patch))
    return str(script)


DESTROYED = """
from adept_ds.training.engine import Engine
step, steps = Engine.step, []
def destroy(self):
    step(self)
    steps.append(1)
    if len(steps) == 3:
        self.model.trainable_parameters()["soft_prompt"].ds_tensor.data[0] = math.nan
Engine.step = destroy
"""


def test_what_the_last_step_has_destroyed_is_neither_saved_nor_the_best(
    tiny_llama: Path, run_ranks: RunRanks, tmp_path: Path
) -> None:
    settings = run_settings(tiny_llama, tmp_path / "run", max_steps=3, save_every=1)
    settings["data"], settings["eval"] = pair_rows(tmp_path), {"every_steps": 2}
    result = run_ranks(0, patched(tmp_path, DESTROYED), settings)
    assert result.returncode == 2
    assert "by step 3 soft_prompt has become NaN or infinite; nothing of that is kept" in result.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert (tmp_path / "run" / "best").resolve().name == "best-step-00000002"
    newest = max(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert newest == "step-00000002"


NAN_FIGURES = """
from adept_ds.training.validation import Validation
figures = Validation.figures
def odd(self):
    values = figures(self)
    return {{name: value if {is_good} else math.nan for name, value in values.items()}}
Validation.figures = odd
"""


@pytest.mark.parametrize("is_always", [False, True])
def test_a_validation_figure_of_nan_is_worse_than_any(
    is_always: bool, tiny_llama: Path, run_ranks: RunRanks, tmp_path: Path
) -> None:
    settings = run_settings(tiny_llama, tmp_path / "run", max_steps=2, warmup_steps=0)
    settings["data"], settings["eval"] = pair_rows(tmp_path, validation=2), {"every_steps": 1}
    first = tmp_path / "run" / "checkpoints" / "step-00000001"
    is_good = "False" if is_always else f"Path({str(first)!r}).exists()"
    result = run_ranks(0, patched(tmp_path, NAN_FIGURES.format(is_good=is_good)), settings)
    assert "eval/loss nan, which is no figure and worse than any" in result.stdout
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    if is_always:
        assert (result.returncode, status["state"]) == (2, "failed")
        assert "no evaluation gave a finite eval/loss, so there is no result" in result.stderr
        assert not (tmp_path / "run" / "best").exists()
    else:
        assert (result.returncode, status["state"], status["best_step"]) == (0, "finished", 2), result.stdout


FULL_DISK = """
real = Path.write_bytes
def write_bytes(self, data):
    if any(name in str(self) for name in {names}):
        raise OSError({number}, os.strerror({number}), str(self))
    return real(self, data)
Path.write_bytes = write_bytes
"""


@pytest.mark.parametrize(
    ("names", "number", "status", "state"),
    [
        (["step-00000001"], errno.ENOSPC, 0, "finished"),
        (["step-00000001", "step-00000002"], errno.ENOSPC, 2, "failed"),
        (["step-00000001"], errno.EDQUOT, 2, "failed"),
    ],
    ids=["room again", "no room to the end", "a quota"],
)
def test_a_save_that_the_disk_refuses(
    names: list[str], number: int, status: int, state: str, tiny_llama: Path, run_ranks: RunRanks, tmp_path: Path
) -> None:
    settings = run_settings(tiny_llama, tmp_path / "run", max_steps=2, warmup_steps=0, save_every=1)
    settings["data"] = pair_rows(tmp_path)
    result = run_ranks(2, patched(tmp_path, FULL_DISK.format(names=names, number=number)), settings)
    assert result.returncode == status, result.stdout
    assert (
        f"logging.run_dir is '{tmp_path / 'run'}', where nothing can be written: {os.strerror(number)}" in result.stdout
    )
    assert "Traceback" not in result.stdout
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == state


def test_a_resumed_run_wants_the_weights_that_it_began_with(
    tiny_llama: Path, run_ranks: RunRanks, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    settings = run_settings(model, tmp_path / "run", max_steps=2, warmup_steps=0, save_every=1)
    settings["data"] = pair_rows(tmp_path)
    assert run_ranks(0, TRAIN, settings).returncode == 0
    copy = resumed_copy(tmp_path / "run", tmp_path / "copy", last_step=1)
    changed = settings_of(tmp_path / "run", copy)
    moved = changed["model"]["name_or_path"] = str(model.rename(tmp_path / "moved"))
    tensors = load_file(Path(moved) / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 1.5
    shutil.copytree(moved, tmp_path / "other")
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    other = changed | {"model": changed["model"] | {"name_or_path": str(tmp_path / "other")}}
    result = run_ranks(0, TRAIN, other, "--resume", "auto")
    assert result.returncode == 2
    assert f"was trained on the weights of '{model}'; model.name_or_path is '{tmp_path / 'other'}'" in result.stderr
    result = run_ranks(0, TRAIN, changed, "--resume", "auto")
    assert result.returncode == 0, result.stdout
    assert losses(copy) == losses(tmp_path / "run")


def test_a_mistyped_resume_leaves_nothing_behind(tiny_llama: Path, run_ranks: RunRanks, tmp_path: Path) -> None:
    settings = run_settings(tiny_llama, tmp_path / "run", max_steps=1, warmup_steps=0)
    settings["data"] = pair_rows(tmp_path)
    result = run_ranks(0, TRAIN, settings, "--resume", "atuo")
    assert result.returncode == 2
    assert "--resume atuo: no such folder; did you mean 'auto'?" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_saves_before_the_first_step_that_does_not_overflow(
    stage: int, tiny_llama: Path, run_ranks: RunRanks, tmp_path: Path
) -> None:
    """The loss is scaled by 2^40 at first, so that all the first steps are skipped."""
    settings = run_settings(tiny_llama, tmp_path / "run", max_steps=3, warmup_steps=0, save_every=1)
    settings["model"]["dtype"] = "fp16"
    settings["data"] = pair_rows(tmp_path)
    settings["deepspeed"] = {"zero_optimization": {"stage": stage}, "fp16": {"initial_scale_power": 40}}
    result = run_ranks(0, ON_FP16, [settings], ADEPT_DS_TEST_FP16="1")
    assert result.returncode == 0, result.stdout
    states = load_file(tmp_path / "run" / "checkpoints" / "step-00000001" / "optimizer.safetensors")
    assert states["loss_scaler"][0] == 0
    assert not states["soft_prompt.exp_avg"].any()

    copy = resumed_copy(tmp_path / "run", tmp_path / "copy", last_step=1)
    result = run_ranks(0, ON_FP16, [settings_of(tmp_path / "run", copy)], ADEPT_DS_TEST_FP16="1")
    assert result.returncode == 0, result.stdout
    assert losses(copy) == losses(tmp_path / "run")


def test_a_batch_that_does_not_divide_is_told_once(tiny_llama: Path, run_ranks: RunRanks, tmp_path: Path) -> None:
    result = run_ranks(2, TRAIN, run_settings(tiny_llama, tmp_path / "run", global_batch_size=3))
    assert result.returncode != 0
    assert result.stdout.count("train.global_batch_size") == 1
    assert "Traceback" not in result.stdout
