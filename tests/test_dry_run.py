"""The dry run: counts, sizes, steps, for every shipped recipe, without weights or network."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import MixtralConfig

from adept_ds.backbone.load import resolve_architecture
from adept_ds.config.loader import load_config
from adept_ds.config.method import AttemptConfig, VeraConfig
from adept_ds.errors import UserError
from adept_ds.planner.dry_run import Plan, dry_run, make_plan
from adept_ds.planner.meta_step import meta_model

FOLDER = Path(__file__).resolve().parent.parent / "ds_configs"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.create_connection", lambda *_, **__: pytest.fail("a dry run went to the network"))


def plan(name: str, *overrides: str, world_size: int = 1) -> Plan:
    return make_plan(load_config(FOLDER / f"{name}.json", overrides).run, world_size)


@pytest.mark.parametrize(
    ("name", "trained", "backbone"),
    [
        ("t5_base", 76_051, 222_903_552),
        ("t5_base_lst", 3_878_712, 222_903_552),
        ("t5_3b", 101_395, 2_851_598_336),
        ("codegen_350m", 10_241, 356_712_448),
        ("llama3_8b", 40_961, 8_030_261_248),
        ("smollm2_135m", 5_761, 134_515_008),
    ],
)
def test_parameter_counts(name, trained, backbone):
    result = plan(name)
    assert result.trained_parameters == trained
    assert result.backbone_parameters == backbone


def jsonl(path: str) -> tuple[str, ...]:
    """Overrides that turn a recipe for tasks into one for a JSON lines file."""
    data = {
        "format": "jsonl",
        "path": path,
        "validation_path": path,
        "prompt_field": "source",
        "target_field": "target",
    }
    return (f"data={json.dumps(data)}", "eval.metric=loss")


@pytest.mark.parametrize("method", [AttemptConfig(sources=("a", "b")), VeraConfig(rank=8)], ids=lambda one: one.name)
def test_an_adapters_size_counts_what_is_not_trained(tmp_path, method):
    """Two source prompts, or the projections that all layers share."""
    run = load_config(FOLDER / "codegen_350m.json", ()).run.model_copy(update={"method": method})
    model = meta_model(run, resolve_architecture(run.model)[0])
    places = {**model.trainable_parameters(), **model.method.constants()}
    tensors = {name: torch.ones(place.shape) for name, place in places.items()}
    safetensors.torch.save_file(tensors, tmp_path / "adapter.safetensors", metadata={"format": "pt"})
    assert make_plan(run, 1).result_bytes == (tmp_path / "adapter.safetensors").stat().st_size


def test_adapter_size_is_that_of_the_file(tmp_path):
    result = plan("codegen_350m")
    tensors = {name: torch.ones(shape) for name, shape in result.shapes.items()}
    safetensors.torch.save_file(tensors, tmp_path / "adapter.safetensors", metadata={"format": "pt"})
    assert result.result_bytes == (tmp_path / "adapter.safetensors").stat().st_size


def test_each_group_drives_its_parameters():
    groups = plan("llama3_8b").learning_rate_groups
    assert groups["soft_prompt"] == ["soft_prompt"]
    assert sorted(groups["network"]) == ["network.b1", "network.b2", "network.w_down", "network.w_up"]


@pytest.mark.parametrize("name", ["llama3_8b", "codegen_350m", "smollm2_135m"])
def test_steps_of_the_papers_mbpp_runs(name):
    assert plan(name).total_steps == 1_220


def test_steps_from_the_real_file(shared_dir):
    result = plan("llama3_8b", f"data.path={shared_dir / 'data' / 'mbxp_mbpp_release_v1.jsonl'}")
    assert result.training_examples == 487
    assert result.total_steps == 1_220


def test_steps_from_a_file_of_the_users_own(tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"source": f"q {i}", "target": "a"}) + "\n" for i in range(65)))
    epochs = ("train.max_steps=null", "train.epochs=2", "train.warmup_steps=5")
    assert plan("t5_base", *jsonl(str(data)), *epochs).total_steps == 6


def test_steps_are_unknown_without_the_users_data():
    overrides = ("train.max_steps=null", "train.epochs=2")
    assert plan("t5_base", *jsonl("nowhere.jsonl"), *overrides).total_steps is None


def test_steps_of_tasks_follow_from_their_released_sizes():
    epochs = ("train.max_steps=null", "train.epochs=2", "train.warmup_steps=5")
    assert plan("t5_base", *epochs).total_steps == 2 * 78  # RTE's 2,490 examples, 32 at a time
    both = 'data.tasks=["rte", "cb"]'
    assert plan("t5_base", both, *epochs).total_steps == 2 * 86  # CB's 250 more
    assert plan("t5_base", both, "data.mixture=equal", *epochs).total_steps == 2 * 156
    # sqrt(2,490 * 250) of CB's at a temperature of 2
    tempered = ("data.mixture=temperature", "data.mixture_temperature=2")
    assert plan("t5_base", both, *tempered, *epochs).total_steps == 2 * 103


def test_an_unknown_task_is_refused():
    with pytest.raises(UserError, match=r"unknown task 'cbb'; .*did you mean 'cb'\?"):
        plan("t5_base", 'data.tasks=["cbb"]')


def test_a_warm_up_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"train\.warmup_steps is 500, but the run has 122 steps") as caught:
        plan("llama3_8b", "train.epochs=1")
    assert "set train.warmup_ratio 0.1 and train.warmup_steps null" in str(caught.value)
    plan("llama3_8b", "train.epochs=1", "train.warmup_ratio=0.1", "train.warmup_steps=null")


def test_options_of_the_schedule_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"polynomial.* a peak rate of 0\.001: lr_end"):
        plan("llama3_8b", "train.schedule=polynomial", "train.schedule_options.lr_end=0.01")
    # No parameter has the rate `backbone`, so the floor may be above it.
    changed = ("train.schedule_options.lr_end=1e-4", "train.learning_rate.backbone=1e-9")
    plan("llama3_8b", "train.schedule=polynomial", *changed)


def test_an_unknown_attention_is_refused():
    with pytest.raises(UserError, match=r"attn_implementation is 'sdap'; .* did you mean 'sdpa'"):
        plan("llama3_8b", "model.attn_implementation=sdap")


def test_an_attention_without_its_package_here_can_be_planned():
    assert plan("llama3_8b", "model.attn_implementation=flash_attention_3").total_steps == 1_220


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"train\.global_batch_size = 4, .* world size = 8"):
        plan("llama3_8b", world_size=8)


def test_a_local_folder_needs_only_its_config(tmp_path):
    model = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(model))
    assert plan("llama3_8b", f"model.name_or_path={tmp_path}").trained_parameters == 7 * 64 + 2 * 64 + 1 + 64


@functools.cache
def recipe_text(name: str) -> str:
    return dry_run(load_config(FOLDER / f"{name}.json"), world_size=2)


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.json") if path.stem != "schema"))
def test_every_recipe_can_be_planned(name):
    text = recipe_text(name)
    result = "result " if name == "t5_base_full_m" else "adapter "
    for line in ("backbone ", "trainable parameters", result, "learning rate ", "batch ", "steps ", "warm-up "):
        assert line in text


def test_text_of_the_llama3_recipe():
    text = recipe_text("llama3_8b")
    assert "8,030,261,248 parameters, frozen; bf16, 16.06 GB" in text
    assert "40,961 trainable parameters" in text
    assert "4 = 2 (micro-batch) x 1 (accumulation) x 2 (ranks)" in text
    assert "1,220 = 10 epochs x 122" in text
    assert "500 steps, then linear decay to zero" in text
    assert "0.001 (train.learning_rate.soft_prompt) for soft_prompt [7, 4096]" in text


def test_the_dry_run_tells_warm_up_schedule_and_early_stopping():
    ratio = ["train.warmup_steps=null", "train.warmup_ratio=0.1"]
    others = ["train.schedule=cosine", "train.schedule_options.num_cycles=1.5", "train.early_stopping_patience=3"]
    text = dry_run(load_config(FOLDER / "smollm2_135m.json", ratio + others), world_size=2)
    assert "warm-up        122 steps (10 % of the steps), then cosine (num_cycles 1.5)" in text
    assert "10 epochs x 122; fewer after 3 evaluations without a better figure" in text


def test_the_dry_run_tells_that_smoothed_labels_make_another_loss():
    text = recipe_text("t5_base_full_m")
    assert (
        "loss           the training loss is with label smoothing 0.1 (train.label_smoothing), the validation" in text
    )
    assert "label smoothing" not in recipe_text("t5_base")


def test_the_dry_run_tells_the_memory_of_this_machines_ranks():
    text = dry_run(load_config(FOLDER / "smollm2_135m.json", ["train.sharding=global"]), world_size=2)
    for line in ("frozen weights", "gathered weights in flight", "global *", "largest micro-batch"):
        assert line in text


def test_the_dry_run_decides_where_the_weights_go():
    assert "replicate *" in dry_run(load_config(FOLDER / "smollm2_135m.json"), world_size=2)


def test_full_fine_tuning_trains_the_whole_backbone_and_leaves_a_model():
    text = dry_run(load_config(FOLDER / "llama3_8b.json", ["method.name=full"]), world_size=4)
    assert "8,030,261,248 parameters, all trained" in text
    assert "full: 8,030,261,248 trainable parameters (100.0000 % of all)" in text
    assert "a model folder with 16,060,522,496 bytes of weights" in text
    assert "5e-05 (train.learning_rate.backbone) for model.embed_tokens.weight [128256, 4096]" in text
    assert "and 287 more" in text


def test_what_stays_unquantised_is_said(tmp_path):
    MixtralConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=100).save_pretrained(tmp_path)
    settings = (f"model.name_or_path={tmp_path}", "model.quantization=nf4")
    experts = 2 * 8 * 3 * 64 * 96
    said = plan("smollm2_135m", *settings).unquantized
    assert said is not None
    assert "are in no linear layer and stay in bfloat16, such as model.layers.0.mlp.experts.gate_up_proj" in said
    assert experts < int(said.split(" of ")[0].replace(",", "")) < 1.02 * experts
    assert plan("smollm2_135m", "model.quantization=nf4").unquantized is None
