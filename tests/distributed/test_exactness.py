"""The same mathematics however the model is held and the batch is split: every run against plain PyTorch."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    get_linear_schedule_with_warmup,
)

from adept_ds.config.method import AdeptConfig
from adept_ds.config.run import DataConfig
from adept_ds.data.batches import global_batches
from adept_ds.data.encode import EncodedDataset
from adept_ds.data.problems import load_examples
from adept_ds.model.adapted_model import get_adept_model
from tests.conftest import RunRanks, losses, run_settings

pytestmark = pytest.mark.slow
STEPS = 20

RUNS: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "llama-stage0": {"stage": 0},
        "llama-stage2-accumulated": {"stage": 2, "train": {"micro_batch_size": 2}},
        "llama-stage3-accumulated-checkpointed": {
            "stage": 3,
            "train": {"micro_batch_size": 1, "activation_checkpointing": True},
        },
        "llama-nf4-stage1": {"stage": 1, "model": {"quantization": "nf4"}},
        "llama-fp8-stage0": {"stage": 0, "model": {"quantization": "fp8"}},
        "llama-nf4-stage1-compiled": {"stage": 1, "model": {"quantization": "nf4"}, "train": {"compile": True}},
        "t5-stage0": {"stage": 0},
        "t5-stage3": {"stage": 3},
        "t5-nf4-stage1": {"stage": 1, "model": {"quantization": "nf4", "double_quantization": True}},
    },
    2: {
        "llama-stage0": {"stage": 0},
        "llama-stage2": {"stage": 2},
        "llama-stage2-compiled-checkpointed": {
            "stage": 2,
            "train": {"compile": True, "activation_checkpointing": True},
        },
        "llama-stage3-compiled": {"stage": 3, "train": {"compile": True}},
        "llama-stage3-checkpointed": {"stage": 3, "train": {"activation_checkpointing": True}},
        "llama-stage3-offloaded": {"stage": 3, "zero": {"offload_param": {"device": "cpu"}}},
        "llama-bf16-stage1": {"stage": 1, "model": {"dtype": "bf16"}},
        "llama-bf16-stage3": {"stage": 3, "model": {"dtype": "bf16"}},
        "llama-nf4-stage3": {"stage": 3, "model": {"quantization": "nf4"}},
        "llama-nf4-stage3-compiled-checkpointed": {
            "stage": 3,
            "model": {"quantization": "nf4"},
            "train": {"compile": True, "activation_checkpointing": True},
        },
        "llama-nf4-stage3-accumulated-checkpointed": {
            "stage": 3,
            "model": {"quantization": "nf4", "keep_expanded": True},
            "train": {"micro_batch_size": 1, "activation_checkpointing": True},
        },
        "llama-int8-stage3": {"stage": 3, "model": {"quantization": "int8"}},
        "llama-fp8-stage3": {"stage": 3, "model": {"quantization": "fp8"}},
        "llama-fp8-stage3-checkpointed": {
            "stage": 3,
            "model": {"quantization": "fp8", "dtype": "bf16"},
            "train": {"activation_checkpointing": True},
        },
        "llama-fp16-stage2": {"stage": 2, "model": {"dtype": "fp16"}},
        "llama-fp16-stage3": {"stage": 3, "model": {"dtype": "fp16"}},
        "t5-stage2": {"stage": 2},
        "t5-stage3": {"stage": 3},
        "t5-bf16-stage3": {"stage": 3, "model": {"dtype": "bf16"}},
        "t5-nf4-stage3": {"stage": 3, "model": {"quantization": "nf4", "double_quantization": True}},
    },
    4: {
        "llama-global": {"train": {"sharding": "global"}},
        "llama-node": {"train": {"sharding": "node"}},
        "llama-replicate": {"train": {"sharding": "replicate"}},
        "llama-auto": {"train": {"sharding": "auto"}},
        "llama-nf4-node": {"train": {"sharding": "node"}, "model": {"quantization": "nf4"}},
        "t5-node": {"train": {"sharding": "node", "activation_checkpointing": True}},
    },
}
"""Ranks to runs, each what it has other than fp32, the whole share of a rank in one forward pass, and no sharding."""


@pytest.fixture(scope="module")
def t5_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": f"sum of {a} and {b}", "completion": str(a + b)} for a in range(10) for b in range(10)]
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run_dirs(
    tiny_llama: Path,
    tiny_t5: Path,
    t5_data: Path,
    run_ranks: RunRanks,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[int], Path]:
    """Take all runs of a number of ranks, once; four ranks stand for two nodes."""
    root = tmp_path_factory.mktemp("exactness")
    done: set[int] = set()

    def settings(ranks: int, name: str, wanted: dict[str, Any]) -> dict[str, Any]:
        model, data = (
            (tiny_t5, {"format": "jsonl", "path": str(t5_data)}) if name.startswith("t5") else (tiny_llama, {})
        )
        train = {"max_steps": STEPS, "save_every": STEPS // 2, **wanted.get("train", {})}
        made = run_settings(model, root / f"{ranks}-{name}", **train)
        made["data"] = data
        made["model"] |= wanted.get("model", {})
        made["deepspeed"]["zero_optimization"] |= wanted.get("zero", {})
        made["deepspeed"]["zero_optimization"].pop("stage")
        if "stage" in wanted:
            made["deepspeed"]["zero_optimization"]["stage"] = wanted["stage"]
        return made

    def run(ranks: int) -> Path:
        if ranks not in done:
            runs = [settings(ranks, name, wanted) for name, wanted in RUNS[ranks].items()]
            (root / f"{ranks}.out").write_text(train_all(run_ranks, ranks, runs))
            done.add(ranks)
        return root

    return run


def train_all(run_ranks: RunRanks, ranks: int, runs: list[dict[str, Any]]) -> str:
    """All runs in one start of the ranks, and what they print; of four ranks each pair is a node."""
    nodes = 2 if ranks == 4 else 1
    variables = {"ADEPT_DS_TEST_FP16": "1", "ADEPT_DS_TEST_NAN_MEMORY": "1"}
    result = run_ranks(ranks, "tests/distributed/run_all.py", runs, nodes=nodes, **variables)
    assert result.returncode == 0, result.stdout[-6000:]
    return result.stdout


def expand_nf4(backbone: PreTrainedModel) -> None:
    """Give every linear layer but the head the weight that bitsandbytes makes of it.

    As one row: of narrower ones than a block its AVX-512 kernel reads wrong scales.
    """
    for module in backbone.modules():
        if isinstance(module, nn.Linear) and module is not backbone.get_output_embeddings():
            row = module.weight.data.view(1, -1)
            module.weight.data = bnb.dequantize_4bit(*bnb.quantize_4bit(row, quant_type="nf4")).view_as(module.weight)


class Plain:
    """The runs written out with torch and transformers alone; start values and order of examples are the project's."""

    def __init__(self, model: Path, tokenizer: PreTrainedTokenizerFast, data: DataConfig, nf4: bool = False) -> None:
        self.is_t5 = "t5" in model.name
        auto = AutoModelForSeq2SeqLM if self.is_t5 else AutoModelForCausalLM
        start = get_adept_model(auto.from_pretrained(model), AdeptConfig(num_virtual_tokens=5, bottleneck=2), seed=42)
        self.values = {
            name: value.detach().clone().requires_grad_() for name, value in start.trainable_parameters().items()
        }
        self.backbone = auto.from_pretrained(model).requires_grad_(False)
        if nf4:
            expand_nf4(self.backbone)
        dataset = EncodedDataset(load_examples(data, "train"), tokenizer, data, 5, self.is_t5)
        batches = global_batches(dataset.lengths, 4, 42, 0, True)[:STEPS]
        prompt, *network = self.values.values()
        optimizer = torch.optim.AdamW(
            [{"params": [prompt], "lr": 0.03}, {"params": network, "lr": 0.01}],
            betas=(0.9, 0.98),
            eps=1e-6,
            weight_decay=0.01,
        )
        schedule = get_linear_schedule_with_warmup(optimizer, 2, STEPS)
        self.losses = []
        for batch in batches:
            sums = [self.loss(dataset[index]) for index in batch]
            labels = sum(count for _, count in sums)
            total = torch.stack([loss for loss, _ in sums]).sum() / labels
            total.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            self.losses.append(float(total.detach()))

    def loss(self, example: Any) -> tuple[Tensor, int]:
        prompt, w_down, b1, w_up, b2 = self.values.values()
        embeddings = self.backbone.get_input_embeddings()(torch.tensor(example.input_ids))
        inputs = torch.cat([prompt, embeddings + F.relu(embeddings @ w_down + b1) @ w_up + b2])[None]
        targets = torch.tensor(example.labels)
        if self.is_t5:
            decoder = self.backbone.prepare_decoder_input_ids_from_labels(labels=targets[None])
            logits = self.backbone(inputs_embeds=inputs, decoder_input_ids=decoder).logits[0]
        else:
            logits, targets = self.backbone(inputs_embeds=inputs).logits[0, 5:-1], targets[1:]
        return F.cross_entropy(logits, targets, reduction="sum"), int((targets != -100).sum())


@pytest.fixture(scope="module")
def plain(tiny_llama: Path, tiny_t5: Path, t5_data: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> dict[str, Plain]:
    return {
        "llama": Plain(tiny_llama, tiny_tokenizer, DataConfig()),
        "llama-nf4": Plain(tiny_llama, tiny_tokenizer, DataConfig(), nf4=True),
        "t5": Plain(tiny_t5, tiny_tokenizer, DataConfig(format="jsonl", path=str(t5_data))),
    }


def runs(*, having: str = "", lacking: tuple[str, ...] = ()) -> list[tuple[int, str]]:
    pairs = itertools.chain.from_iterable([(ranks, name) for name in names] for ranks, names in RUNS.items())
    return [(ranks, name) for ranks, name in pairs if having in name and not any(word in name for word in lacking)]


def parameters(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "checkpoints" / f"step-{STEPS:08d}" / "adapter_model.safetensors")


def largest_difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of any element, relative to the largest of its tensor."""
    return max(float((actual[name] - value).abs().max() / value.abs().max()) for name, value in expected.items())


@pytest.mark.parametrize(("ranks", "name"), runs(lacking=("nf4", "int8", "fp8", "bf16", "fp16")))
def test_fp32_is_plain_pytorch(ranks: int, name: str, run_dirs: Callable[[int], Path], plain: dict[str, Plain]) -> None:
    expected = plain[name.partition("-")[0]]
    run_dir = run_dirs(ranks) / f"{ranks}-{name}"
    assert losses(run_dir) == pytest.approx(expected.losses, rel=1e-5)
    values = {key: value.detach() for key, value in expected.values.items()}
    assert largest_difference(parameters(run_dir), values) < 1e-3


def test_runs_say_what_was_compiled(run_dirs: Callable[[int], Path]) -> None:
    _, *texts = (run_dirs(2) / "2.out").read_text().split("trainable params:")
    said = [[line for line in text.splitlines() if line.startswith("train.compile: ")] for text in texts]
    assert [bool(lines) for lines in said] == ["compiled" in name for name in RUNS[2]]
    assert all(
        line.startswith("train.compile: compiled LlamaDecoderLayer in ") for line in itertools.chain.from_iterable(said)
    )


@pytest.mark.parametrize(("ranks", "name"), runs(having="llama-nf4"))
def test_nf4_is_plain_pytorch_on_the_weights_that_bitsandbytes_makes(
    ranks: int, name: str, run_dirs: Callable[[int], Path], plain: dict[str, Plain]
) -> None:
    assert losses(run_dirs(ranks) / f"{ranks}-{name}") == pytest.approx(plain["llama-nf4"].losses, rel=1e-5)


def test_nf4_of_t5_is_the_same_sharded_or_not(run_dirs: Callable[[int], Path]) -> None:
    whole, sharded = losses(run_dirs(1) / "1-t5-nf4-stage1"), losses(run_dirs(2) / "2-t5-nf4-stage3")
    assert sharded == pytest.approx(whole, rel=1e-5)


def test_fp8_is_the_same_sharded_or_not(run_dirs: Callable[[int], Path]) -> None:
    # The last bit of what a layer reads may turn its rounding to 8 bits.
    whole, sharded = losses(run_dirs(1) / "1-llama-fp8-stage0"), losses(run_dirs(2) / "2-llama-fp8-stage3")
    assert sharded == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("llama-fp8-stage3", 5e-3),
        ("llama-fp8-stage3-checkpointed", 5e-3),
        ("llama-bf16-stage1", 3e-3),
        ("llama-bf16-stage3", 3e-3),
        ("t5-bf16-stage3", 1e-2),
        ("llama-int8-stage3", 1e-3),
    ],
)
def test_lower_precision_follows_fp32(
    name: str, tolerance: float, run_dirs: Callable[[int], Path], plain: dict[str, Plain]
) -> None:
    expected = plain[name.partition("-")[0]].losses
    assert losses(run_dirs(2) / f"2-{name}") == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("name", ["llama-fp16-stage2", "llama-fp16-stage3"])
def test_fp16_scales_the_loss_and_trains(name: str, run_dirs: Callable[[int], Path], plain: dict[str, Plain]) -> None:
    curve, expected = losses(run_dirs(2) / f"2-{name}"), plain["llama"].losses
    assert curve == pytest.approx(expected, rel=1e-2)
    states = load_file(run_dirs(2) / f"2-{name}" / "checkpoints" / f"step-{STEPS:08d}" / "optimizer.safetensors")
    adam_steps, scale, seen, *_ = states["loss_scaler"].tolist()
    assert (seen, scale > 1) == (STEPS, True)
    assert STEPS - 3 <= adam_steps <= STEPS


RESUMED = {
    "llama-stage2": ("global", 1e-5),
    "llama-nf4-stage3": ("node", 1e-5),
    "llama-fp8-stage3": ("replicate", 1e-4),
    "llama-bf16-stage3": ("replicate", 1e-3),
    "llama-fp16-stage3": ("global", 1e-3),
    "t5-stage3": ("node", 1e-5),
}
"""Runs of two ranks that go on from the middle on four, with other sharding; and the tolerance of their losses."""


@pytest.fixture(scope="module")
def resumed_dirs(
    run_dirs: Callable[[int], Path], run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("resumed")
    configs = []
    for name, (sharding, _) in RESUMED.items():
        copy = shutil.copytree(run_dirs(2) / f"2-{name}", root / name, symlinks=True)
        shutil.rmtree(copy / "checkpoints" / f"step-{STEPS:08d}")
        (copy / "status.json").unlink()
        settings = json.loads((copy / "config.json").read_text())
        settings["logging"]["run_dir"] = str(copy)
        settings["train"]["sharding"] = sharding
        del settings["deepspeed"]["zero_optimization"]["stage"]
        configs.append(settings)
    train_all(run_ranks, 4, configs)
    return root


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_with_other_sharding_and_other_ranks(
    name: str, run_dirs: Callable[[int], Path], resumed_dirs: Path
) -> None:
    resumed, whole = losses(resumed_dirs / name), losses(run_dirs(2) / f"2-{name}")
    assert resumed[: STEPS // 2] == whole[: STEPS // 2]
    assert resumed == pytest.approx(whole, rel=RESUMED[name][1])


def test_memory_that_nothing_was_written_to_counts_nowhere(
    tiny_llama: Path, run_ranks: RunRanks, tmp_path: Path
) -> None:
    """Two ranks have three elements to share, and DeepSpeed fills the second one's part up with what it finds."""

    def settings(name: str, **train: Any) -> dict[str, Any]:
        made = run_settings(tiny_llama, tmp_path / name, max_steps=6, save_every=3, **train)
        made["method"]["bottleneck"] = 3
        return made

    runs = [settings("free"), settings("clipped", max_grad_norm=1e6)]
    result = run_ranks(2, "tests/distributed/run_all.py", runs, ADEPT_DS_TEST_NAN_MEMORY="1")
    assert result.returncode == 0, result.stdout[-6000:]
    free, clipped = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("free", "clipped")
    )
    norms = [line["grad_norm"] for line in free if "grad_norm" in line]
    assert len(norms) == 6
    assert all(map(math.isfinite, norms))
    assert [line.get("loss") for line in clipped] == [line.get("loss") for line in free]
