"""Every method under ZeRO-3 on two ranks: the same losses and values as one process, and the same after a resume."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from adept_ds.backbone.load import load_backbone
from adept_ds.config.batch import learning_rates
from adept_ds.config.method import PromptTuningConfig
from adept_ds.config.run import ModelConfig, RunConfig
from adept_ds.data.batches import global_batches
from adept_ds.data.encode import EncodedDataset, collate
from adept_ds.data.problems import load_examples
from adept_ds.model.adapted_model import get_adept_model
from adept_ds.training.optimizer import build_optimizer, set_learning_rates
from tests.conftest import RunRanks, losses, run_settings

from .test_exactness import largest_difference, train_all

pytestmark = pytest.mark.slow
STEPS, SAVED = 6, 3
TASKS = ["sum", "difference"]

METHODS: dict[str, dict[str, Any]] = {
    "adept": {"num_virtual_tokens": 4, "bottleneck": 3},
    "pt": {"num_virtual_tokens": 5},
    "dept": {"num_virtual_tokens": 3, "rank": 2, "max_positions": 40},
    "pt_embedding": {"num_virtual_tokens": 3},
    "p_tuning": {"num_virtual_tokens": 4, "hidden_size": 8, "reparameterization": "lstm"},
    "dpt": {"num_virtual_tokens": 5, "rank": 3},
    "residual_pt": {"num_virtual_tokens": 4, "bottleneck": 6},
    "mpt": {"num_virtual_tokens": 4, "tasks": TASKS, "factor_init": "ones"},
    "attempt": {"num_virtual_tokens": 4, "bottleneck": 6, "temperature": 1.0},
    "attempt-tasks": {"num_virtual_tokens": 4, "bottleneck": 6, "temperature": 1.0, "tasks": TASKS},
    "prefix": {"prefix_length": 4, "projection": True, "hidden_size": 8},
    "lora": {"rank": 3, "dropout": 0.0},
    "ia3": {"feed_forward": True},
    "vera": {"rank": 5},
    "adapter": {"bottleneck": 3},
    "adapter-tasks": {"bottleneck": 3, "post_norm": True, "tasks": TASKS},
    "adapter_drop": {"bottleneck": 3, "dropped_layers": 1},
    "hyperformer-tasks": {"bottleneck": 3, "embedding_size": 5, "hidden_size": 6, "tasks": TASKS},
    "hyperdecoder": {"bottleneck": 3, "hidden_size": 6},
    "bitfit": {},
    "lst": {"reduction": 2, "init": "magnitude"},
}
RUNS = [
    (model, method)
    for model in ("llama-nf4", "t5")
    for method in METHODS
    if (model, method) != ("llama-nf4", "hyperdecoder")
]
RESUMED = [(model, method) for model, method in RUNS if model == "llama-nf4" or method == "hyperdecoder"]


@pytest.fixture(scope="module")
def all_settings(tiny_llama: Path, tiny_t5: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, dict]:
    root = tmp_path_factory.mktemp("methods")
    rows = [{"prompt": f"sum of {a} and {b}", "completion": str(a + b)} for a in range(6) for b in range(6)]
    data = root / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task in TASKS:
        declared = {"files": {"train": data.name}, "source": f"{task}: {{prompt}}", "target": "completion"}
        (root / f"{task}.json").write_text(json.dumps(declared | {"metrics": ["exact_match"]}))

    @cache
    def source_prompt(backbone: Path, seed: int) -> str:
        folder = root / f"{backbone.name}-source-{seed}"
        pt = get_adept_model(
            load_backbone(ModelConfig(name_or_path=str(backbone), dtype="fp32")),
            PromptTuningConfig(num_virtual_tokens=4, prompt_init="normal"),
            seed=seed,
        )
        pt.save_pretrained(folder)
        return str(folder)

    def settings(model: str, method: str) -> dict[str, Any]:
        backbone = tiny_t5 if model == "t5" else tiny_llama
        made = run_settings(backbone, root / f"{model}-{method}", max_steps=STEPS)
        made["model"]["quantization"] = "nf4" if model == "llama-nf4" else None
        made["method"] = {"name": method.removesuffix("-tasks"), **METHODS[method]}
        made["data"] = {"format": "jsonl", "path": str(data)}
        sources = [source_prompt(backbone, seed) for seed in (1, 2)]
        if made["method"]["name"] == "attempt":
            made["method"]["sources"] = sources
        if method == "mpt":
            made["method"]["teachers"] = dict(zip(TASKS, sources, strict=True))
        if "tasks" in made["method"]:
            made["data"] = {"format": "tasks", "tasks": [str(root / f"{task}.json") for task in TASKS]}
        made["train"] |= {"save_every": SAVED}
        if method in ("lst", "hyperformer-tasks", "hyperdecoder"):
            # With layers that are recomputed, which changes no loss.
            made["train"]["activation_checkpointing"] = True
        made["train"]["learning_rate"] = {"soft_prompt": 0.03, "network": 0.01, "adapter": 0.01, "side": 0.003}
        return made

    return {run: settings(*run) for run in RUNS}


def resumed(settings: dict[str, Any]) -> dict[str, Any]:
    folder = settings["logging"]["run_dir"]
    logging = settings["logging"] | {"run_dir": f"{folder}-resumed"}
    return settings | {"logging": logging, "resume": f"{folder}/checkpoints/step-{SAVED:08d}"}


@pytest.fixture(scope="module")
def trained(all_settings: dict[Any, dict], run_ranks: RunRanks) -> None:
    """All runs, and some of their second halves, in one start of two ranks."""
    train_all(run_ranks, 2, [*all_settings.values(), *(resumed(all_settings[run]) for run in RESUMED)])


def in_one_process(run: RunConfig, tokenizer: PreTrainedTokenizerFast) -> tuple[list[float], dict[str, Tensor]]:
    """The run's losses and last values by torch alone."""
    model = get_adept_model(load_backbone(run.model), run.method, tokenizer, run.train.seed).train()
    dataset = EncodedDataset(
        load_examples(run.data, "train"),
        tokenizer,
        run.data,
        model.num_virtual_tokens,
        model.is_encoder_decoder,
        prompt_tasks=model.prompt_tasks,
    )
    optimizer, curve = build_optimizer(model, run.train), []
    rates = learning_rates(run.train, model.learning_rate_groups(), STEPS)
    batches = global_batches(dataset.lengths, 4, run.train.seed, 0, True)
    for step in range(STEPS):
        set_learning_rates(optimizer, rates(step))
        batch = collate([dataset[index] for index in batches[step]], tokenizer.pad_token_id)
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(float(loss.detach()))
    values = {**model.trainable_parameters(), **model.method.constants()}
    return curve, {name: value.detach() for name, value in values.items()}


@pytest.mark.parametrize("run", RUNS, ids="-".join)
def test_two_ranks_are_one_process(
    run: tuple[str, str], all_settings: dict[Any, dict], trained: None, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = all_settings[run]
    expected, values = in_one_process(RunConfig.model_validate(settings), tiny_tokenizer)
    folder = Path(settings["logging"]["run_dir"])
    assert losses(folder) == pytest.approx(expected, rel=1e-5)
    actual = load_file(folder / "best" / "adapter_model.safetensors")
    assert actual.keys() == values.keys()
    # A bias of T5's keys adds the same to every score of a query: its gradient is rounding, which Adam scales up.
    values = {name: value for name, value in values.items() if not name.endswith("Attention.k.bias")}
    assert largest_difference(actual, values) < 1e-3


@pytest.mark.parametrize("run", RESUMED, ids="-".join)
def test_a_resumed_run_is_equal_to_the_bit(run: tuple[str, str], all_settings: dict[Any, dict], trained: None) -> None:
    whole = Path(all_settings[run]["logging"]["run_dir"])
    second_half = Path(f"{whole}-resumed")
    assert losses(second_half) == losses(whole)[SAVED:]
    ours, theirs = (load_file(folder / "best" / "adapter_model.safetensors") for folder in (second_half, whole))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
