"""The files in ds_configs: they load, and they hold the paper's hyperparameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from adept_ds.config.loader import load_config
from adept_ds.config.run import RunConfig
from adept_ds.config.schema import json_schema
from adept_ds.data.tasks import find_task

FOLDER = Path(__file__).resolve().parent.parent / "ds_configs"
FILES = sorted(path.stem for path in FOLDER.glob("*.json") if path.stem != "schema")


def load(name: str) -> RunConfig:
    return load_config(FOLDER / f"{name}.json").run


def test_the_schema_is_fresh():
    assert (FOLDER / "schema.json").read_text() == json_schema(), (
        "run: python -m adept_ds.config.schema ds_configs/schema.json"
    )


def test_all_recipes_are_there():
    assert FILES == [
        "codegen_350m",
        "llama3_8b",
        "smollm2_135m",
        "smollm2_135m_demo",
        "smollm2_135m_dept",
        "smollm2_135m_lora",
        "smollm2_135m_pt",
        "t5_3b",
        "t5_base",
        "t5_base_adapter_m",
        "t5_base_attempt_m",
        "t5_base_full_m",
        "t5_base_hyperdecoder_m",
        "t5_base_hyperformer_m",
        "t5_base_lst",
        "t5_base_mpt_m",
    ]


@pytest.mark.parametrize("name", FILES)
def test_a_file_says_what_it_reproduces_and_on_which_hardware(name):
    about = load(name).about
    assert "ADePT" in about
    assert "Hardware" in about


@pytest.mark.parametrize("name", [name for name in FILES if name != "smollm2_135m_demo"])
def test_a_recipe_splits_the_weights_only_where_they_do_not_fit(name):
    assert load(name).train.sharding == "auto"


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_a_run_folder_of_its_own(name):
    assert [load(other).logging.run_dir for other in FILES].count(load(name).logging.run_dir) == 1


@pytest.mark.parametrize(
    ("name", "figure"), [("codegen_350m", "17.86"), ("llama3_8b", "43.22"), ("smollm2_135m", None)]
)
def test_mbpp_recipes_follow_the_paper(name, figure):
    run = load(name)
    assert (run.method.num_virtual_tokens, run.method.bottleneck) == (7, 1)
    assert (run.train.epochs, run.train.global_batch_size, run.train.warmup_steps) == (10, 4, 500)
    assert (run.train.learning_rate.soft_prompt, run.train.learning_rate.network) == (1e-3, 1e-3)
    assert (run.data.format, run.data.max_prompt_length, run.data.max_length) == ("mbpp-paper", 325, 581)
    assert (run.eval.generation.temperature, run.eval.generation.top_p) == (0.6, 0.95)
    assert figure is None or figure in run.about


@pytest.mark.parametrize(("name", "length", "accumulation"), [("t5_base", 256, None), ("t5_3b", 512, 2)])
def test_t5_recipes_follow_the_paper(name, length, accumulation):
    run = load(name)
    assert (run.method.num_virtual_tokens, run.method.bottleneck) == (60, 19)
    assert (run.train.max_steps, run.train.global_batch_size, run.train.warmup_steps) == (30_000, 32, 500)
    assert (run.train.learning_rate.soft_prompt, run.train.learning_rate.network) == (3e-1, 1e-4)
    assert run.train.gradient_accumulation_steps == accumulation
    (task,) = map(find_task, run.data.tasks)
    assert (run.data.max_source_length or task.max_source_length) == length
    assert run.eval.every_steps == 1_000


@pytest.mark.parametrize("name", [name for name in FILES if name != "t5_base_lst"])
def test_every_recipe_uses_the_papers_optimizer(name):
    train = load(name).train
    assert (train.adam_betas, train.adam_eps, train.weight_decay) == ((0.9, 0.98), 1e-6, 0.01)
    assert (train.schedule, train.max_grad_norm) == ("linear", 0.0)


def test_the_recipe_of_lst_follows_its_authors():
    run = load("t5_base_lst")
    assert (run.method.reduction, run.method.layers) == (8, (1, 2, 3, 5, 6, 7, 9, 10, 11))
    assert (run.train.global_batch_size, run.train.warmup_steps, run.train.epochs) == (100, 500, 20)
    assert (run.train.learning_rate.side, run.data.max_source_length) == (3e-3, 128)


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_says_its_label_smoothing(name):
    run = load(name)
    assert run.train.label_smoothing == (0.1 if "label smoothing 0.1" in run.about else 0)


@pytest.mark.parametrize("name", ["t5_base_adapter_m", "t5_base_full_m"])
def test_the_baselines_of_hyperformer_have_its_label_smoothing(name):
    assert load(name).train.label_smoothing == 0.1


def test_the_demo_shards_every_parameter():
    zero = load("smollm2_135m_demo").deepspeed["zero_optimization"]
    assert (zero["stage"], zero["stage3_param_persistence_threshold"]) == (3, 0)
