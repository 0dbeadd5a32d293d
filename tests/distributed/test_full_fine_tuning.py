"""Full fine-tuning on two ranks by the real launcher: against plain PyTorch, its checkpoints, the model it leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    get_linear_schedule_with_warmup,
)

from adept_ds.config.run import DataConfig
from adept_ds.data.batches import global_batches
from adept_ds.data.encode import EncodedDataset
from adept_ds.data.problems import load_examples
from adept_ds.storage.checkpoint import newest_checkpoint
from adept_ds.storage.run_folder import read_metrics
from tests.conftest import RunRanks, losses, run_settings

pytestmark = pytest.mark.slow
STEPS, HALF = 10, 5
RATE = 3e-3
SMOOTHING = 0.1

RUNS: dict[str, dict[str, Any]] = {
    "llama-stage0": {"zero": {"stage": 0}},
    "llama-stage1": {"zero": {"stage": 1}},
    "llama-stage2": {"zero": {"stage": 2}},
    "llama-stage3": {"zero": {"stage": 3}},
    "llama-stage3-accumulated-checkpointed": {
        "zero": {"stage": 3},
        "train": {"micro_batch_size": 1, "activation_checkpointing": True},
    },
    "llama-stage3-offloaded": {
        "zero": {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    },
    "t5-stage2": {"zero": {"stage": 2}},
    "t5-stage3": {"zero": {"stage": 3}},
    "t5-smoothed-stage3": {"zero": {"stage": 3}, "train": {"label_smoothing": SMOOTHING}},
    "llama-bf16-stage1": {"zero": {"stage": 1}, "model": {"dtype": "bf16"}},
    "llama-bf16-stage3": {"zero": {"stage": 3}, "model": {"dtype": "bf16"}},
    "t5-bf16-stage3": {"zero": {"stage": 3}, "model": {"dtype": "bf16"}},
}
"""What each run has other than fp32 and the whole share of a rank in one forward pass."""
RESUMED = [
    "llama-stage0",
    "llama-stage1",
    "llama-stage2",
    "llama-stage3",
    "llama-stage3-offloaded",
    "t5-stage3",
    "llama-bf16-stage1",
    "llama-bf16-stage3",
]
"""Runs that are taken again from their checkpoint in the middle."""
UNTOUCHED = ["llama-bf16-stage3", "t5-stage3"]
"""Runs that are taken for two steps at a rate that moves no weight."""


@pytest.fixture(scope="module")
def t5_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": f"sum of {a} and {b}", "completion": str(a + b)} for a in range(10) for b in range(10)]
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run_dirs(
    tiny_llama: Path, tiny_t5: Path, t5_data: Path, run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """All runs, in one start of the ranks."""
    root = tmp_path_factory.mktemp("full")

    def settings(name: str, run_dir: Path, rate: float, **train: Any) -> dict[str, Any]:
        wanted = RUNS[name]
        sums = {"format": "jsonl", "path": str(t5_data), "validation_path": str(t5_data)}
        model, data = (tiny_t5, sums) if "t5" in name else (tiny_llama, {})
        rates = {"learning_rate": {"backbone": rate}}
        made = run_settings(model, run_dir, **rates, **({"max_steps": STEPS, "save_every": HALF} | train))
        made["train"] |= wanted.get("train", {})
        made["method"] = {"name": "full", "max_file_gb": 2e-5}
        made["data"] = data
        made["model"] |= wanted.get("model", {})
        made["deepspeed"]["zero_optimization"] |= wanted["zero"]
        return made

    runs = [settings(name, root / name, RATE) for name in RUNS]
    for name in RESUMED:
        checkpoint = root / name / "checkpoints" / f"step-{HALF:08d}"
        runs.append(settings(name, root / f"{name}-resumed", RATE) | {"resume": str(checkpoint)})
    runs += [settings(name, root / f"{name}-untouched", 1e-30, max_steps=3) for name in UNTOUCHED]
    result = run_ranks(2, "tests/distributed/run_all.py", runs)
    assert result.returncode == 0, result.stdout[-6000:]
    (root / "out.txt").write_text(result.stdout)
    return root


def summed_loss(model: Any, example: Any, smoothing: float = 0.0) -> tuple[Tensor, int]:
    """By whole logits; and how many labels it is the sum over."""
    ids, targets = torch.tensor(example.input_ids)[None], torch.tensor(example.labels)
    if model.config.is_encoder_decoder:
        logits = model(input_ids=ids, labels=targets[None]).logits[0]
    else:
        logits, targets = model(input_ids=ids).logits[0, :-1], targets[1:]
    loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    return loss, int((targets != -100).sum())


class Plain:
    """The run written out with torch and transformers alone; the order of the examples is the project's."""

    def __init__(
        self, model: Path, tokenizer: PreTrainedTokenizerFast, data: DataConfig, is_t5: bool, smoothing: float = 0.0
    ) -> None:
        self.model = (AutoModelForSeq2SeqLM if is_t5 else AutoModelForCausalLM).from_pretrained(model).train()
        dataset = EncodedDataset(load_examples(data, "train"), tokenizer, data, 0, is_t5)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
        schedule = get_linear_schedule_with_warmup(optimizer, 2, STEPS)
        self.losses = []
        for batch in global_batches(dataset.lengths, 4, 42, 0, True)[:STEPS]:
            sums = [summed_loss(self.model, dataset[index], smoothing) for index in batch]
            total = torch.stack([loss for loss, _ in sums]).sum() / sum(count for _, count in sums)
            total.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            self.losses.append(float(total.detach()))


@pytest.fixture(scope="module")
def plain(tiny_llama: Path, tiny_t5: Path, t5_data: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> dict[str, Plain]:
    t5_config = DataConfig(format="jsonl", path=str(t5_data))
    return {
        "llama": Plain(tiny_llama, tiny_tokenizer, DataConfig(), is_t5=False),
        "t5": Plain(tiny_t5, tiny_tokenizer, t5_config, is_t5=True),
        "t5-smoothed": Plain(tiny_t5, tiny_tokenizer, t5_config, is_t5=True, smoothing=SMOOTHING),
    }


def load(name: str, folder: Path, **options: Any) -> Any:
    return (AutoModelForSeq2SeqLM if name.startswith("t5") else AutoModelForCausalLM).from_pretrained(folder, **options)


@pytest.mark.parametrize("name", [name for name in RUNS if "bf16" not in name])
def test_fp32_is_plain_pytorch(name: str, run_dirs: Path, plain: dict[str, Plain]) -> None:
    expected = plain[name.rpartition("-stage")[0] if "smoothed" in name else name.partition("-")[0]]
    assert losses(run_dirs / name) == pytest.approx(expected.losses, rel=1e-5)
    assert expected.losses[-1] < expected.losses[0]
    values = dict(load(name, run_dirs / name / "best").named_parameters())
    for key, value in expected.model.named_parameters():
        assert float((values[key] - value).abs().max() / value.abs().max()) < 1e-3


def test_the_validation_loss_is_without_label_smoothing(
    run_dirs: Path, t5_data: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    data, run_dir = DataConfig(format="jsonl", path=str(t5_data)), run_dirs / "t5-smoothed-stage3"
    # Validated on what it is trained on.
    dataset = EncodedDataset(load_examples(data, "train"), tiny_tokenizer, data, 0, True)
    model = load("t5", run_dir / "best")
    with torch.no_grad():
        sums = [summed_loss(model, example) for example in dataset]
    expected = float(sum(loss for loss, _ in sums)) / sum(count for _, count in sums)
    (line,) = [line for line in read_metrics(run_dir / "metrics.jsonl") if "eval/loss" in line]
    assert line["eval/loss"] == pytest.approx(expected, rel=1e-5)
    assert "loss: the training loss is with label smoothing 0.1" in (run_dirs / "out.txt").read_text()


@pytest.mark.parametrize("name", [name for name in RUNS if "bf16" in name])
def test_bf16_follows_fp32(name: str, run_dirs: Path, plain: dict[str, Plain]) -> None:
    assert losses(run_dirs / name) == pytest.approx(plain[name.partition("-")[0]].losses, rel=1e-2)


@pytest.mark.parametrize("name", RESUMED)
def test_losses_after_resume_are_equal_to_the_bit(name: str, run_dirs: Path) -> None:
    assert losses(run_dirs / f"{name}-resumed") == losses(run_dirs / name)[HALF:]


@pytest.mark.parametrize("name", UNTOUCHED)
def test_the_saved_model_has_the_weights_to_the_bit(name: str, run_dirs: Path, tiny_llama: Path, tiny_t5: Path) -> None:
    source = tiny_t5 if name.startswith("t5") else tiny_llama
    folder = run_dirs / f"{name}-untouched" / "best"
    saved, original = load(name, folder, dtype="auto"), load(name, source)
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    assert saved.dtype == dtype
    parameters = dict(saved.named_parameters())
    assert parameters.keys() == dict(original.named_parameters()).keys()
    for key, value in original.named_parameters():
        assert torch.equal(parameters[key], value.to(dtype))


def test_the_saved_model_is_a_folder_of_the_hubs_format(run_dirs: Path) -> None:
    folder = run_dirs / "t5-stage3" / "best"
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "training.json"} <= names
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert files == {name for name in names if name.endswith(".safetensors")}
    assert len(files) > 2
    # The table is shared by encoder, decoder and head, and is saved once.
    assert [name for name in index["weight_map"] if "embed" in name or "shared" in name or "head" in name] == [
        "shared.weight"
    ]
    assert AutoTokenizer.from_pretrained(folder)("def f").input_ids
    training = json.loads((folder / "training.json").read_text())
    assert (training["method"]["name"], training["step"]) == ("full", STEPS)


def test_a_damaged_part_is_detected_and_the_older_checkpoint_taken(run_dirs: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dirs / "llama-stage3" / "checkpoints", tmp_path / "checkpoints")
    parts = sorted((tmp_path / "checkpoints" / f"step-{STEPS:08d}").rglob("*rank_1*optim_states.pt"))
    assert len(parts) == 1
    parts[0].write_bytes(parts[0].read_bytes()[:-100])
    warnings: list[str] = []
    checkpoint = newest_checkpoint(tmp_path / "checkpoints", warnings.append)
    assert checkpoint is not None
    assert checkpoint.state.step == HALF
    assert parts[0].name in warnings[0]


@pytest.mark.parametrize(("ranks", "stage"), [(0, 3), (2, 2)])
def test_other_ranks_or_another_stage_are_refused(
    ranks: int, stage: int, run_dirs: Path, tiny_llama: Path, run_ranks: RunRanks, tmp_path: Path
) -> None:
    settings = json.loads((run_dirs / "llama-stage3" / "config.json").read_text())
    settings["logging"]["run_dir"] = str(tmp_path / "run")
    settings["deepspeed"]["zero_optimization"]["stage"] = stage
    checkpoint = run_dirs / "llama-stage3" / "checkpoints" / f"step-{HALF:08d}"
    result = run_ranks(ranks, "launchers/train.py", settings, "--resume", str(checkpoint))
    assert result.returncode != 0
    assert "split over 2 ranks at ZeRO stage 3, which DeepSpeed cannot split anew" in result.stdout
    assert "Traceback" not in result.stdout
