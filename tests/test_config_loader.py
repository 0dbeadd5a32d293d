"""The config loader: merging, sources, and messages for everything a user can get wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from adept_ds.config.loader import config_hash, load_config, resolved_json
from adept_ds.config.method import AdeptConfig, FullConfig
from adept_ds.errors import UserError

MINIMAL: dict[str, Any] = {"model": {"name_or_path": "some/model"}, "train": {"epochs": 3}}


@pytest.fixture
def write(tmp_path: Path):
    """Function that writes `MINIMAL`, its top-level keys replaced, or a text, to a file."""

    def write(text: str | None = None, **sections: Any) -> Path:
        path = tmp_path / "run.json"
        path.write_text(json.dumps(MINIMAL | sections, indent=1) if text is None else text)
        return path

    return write


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_values_of_the_file_and_defaults(write):
    loaded = load_config(write(method={"num_virtual_tokens": 20}))
    assert loaded.run.method.num_virtual_tokens == 20
    assert loaded.run.method.bottleneck == 1


def test_every_value_has_a_source(write):
    path = write(method={"num_virtual_tokens": 20}, deepspeed={"zero_optimization": {"stage": 3}})
    sources = load_config(path, ["train.epochs=5", "deepspeed.zero_optimization.overlap_comm=false"]).sources
    assert re.fullmatch(rf"{re.escape(str(path))} line \d+", sources["method.num_virtual_tokens"])
    assert sources["train.epochs"] == "command line"
    assert sources["deepspeed.zero_optimization.overlap_comm"] == "command line"
    assert sources["deepspeed.zero_optimization.stage"].startswith(str(path))
    assert sources["eval.generation.temperature"] == "default"


def test_a_source_names_the_right_line(write):
    path = write('{"model": {"name_or_path": "x"},\n\n "train":\n  {"epochs": 3,\n   "seed": 1}}')
    sources = load_config(path).sources
    assert sources["train.epochs"] == f"{path} line 4"
    assert sources["train.seed"] == f"{path} line 5"


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("train.adam_eps=1e-7", "train", "adam_eps", 1e-7),
        ("train.group_by_length=false", "train", "group_by_length", False),
        ("train.adam_betas=[0.8, 0.9]", "train", "adam_betas", (0.8, 0.9)),
        ("model.name_or_path=other/model", "model", "name_or_path", "other/model"),
        ("model.revision=1234567", "model", "revision", "1234567"),
        ("model.revision=null", "model", "revision", None),
    ],
)
def test_an_override_is_read_as_json_or_else_as_a_string(write, override, section, name, value):
    assert getattr(getattr(load_config(write(), [override]).run, section), name) == value


def test_an_override_reaches_a_nested_section(write):
    run = load_config(write(), ["train.learning_rate.soft_prompt=3e-1"]).run
    assert run.train.learning_rate.soft_prompt == 0.3
    assert run.train.learning_rate.network == 1e-3


def test_the_method_is_adept_where_none_is_named(write):
    assert load_config(write(method={"bottleneck": 2})).run.method == AdeptConfig(bottleneck=2)
    assert load_config(write(), ["method.bottleneck=2"]).run.method == AdeptConfig(bottleneck=2)


def test_another_method_on_the_command_line_leaves_out_the_settings_of_the_file_s(write):
    path = write(method={"num_virtual_tokens": 20, "bottleneck": 3})
    loaded = load_config(path, ["method.name=full"])
    assert loaded.run.method == FullConfig()
    assert loaded.sources["method.name"] == "command line"
    same = load_config(path, ["method.bottleneck=2", "method.name=adept"]).run.method
    assert same == AdeptConfig(num_virtual_tokens=20, bottleneck=2)


def test_an_override_inside_deepspeed_keeps_its_siblings_and_its_type(write):
    path = write(deepspeed={"zero_optimization": {"stage": 3, "overlap_comm": True}, "wall_clock_breakdown": True})
    section = load_config(path, ["deepspeed.zero_optimization.stage=2"]).run.deepspeed
    assert section == {"zero_optimization": {"stage": 2, "overlap_comm": True}, "wall_clock_breakdown": True}


def test_the_last_override_wins(write):
    assert load_config(write(), ["train.epochs=5", "train.epochs=6"]).run.train.epochs == 6


def test_an_override_can_mend_the_file(write):
    assert load_config(write(train={"epochs": "three"}), ["train.epochs=3"]).run.train.epochs == 3


BAD_SECTIONS = [
    # sections, text that stands in the message for each of: key with value, expectation, nearest
    ({"trian": {}}, "trian = {}", "did you mean train?"),
    ({"train": {"epoch": 3}}, "train.epoch = 3", "did you mean train.epochs?"),
    ({"train": {"epochs": "3"}}, 'train.epochs = "3"', "expected integer >= 1 or null; write the number without"),
    ({"train": {"epochs": True}}, "train.epochs = true", "expected integer >= 1"),
    ({"train": {"epochs": 3.0}}, "train.epochs = 3.0", "expected integer >= 1"),
    ({"train": {"epochs": 0}}, "train.epochs = 0", "expected integer >= 1"),
    ({"train": {"epochs": 3, "learning_rate": 0.3}}, "train.learning_rate = 0.3", "the keys soft_prompt, network"),
    (
        {"train": {"epochs": 3, "soft_prompt": 0.3}},
        "soft_prompt = 0.3",
        "did you mean train.learning_rate.soft_prompt?",
    ),
    ({"train": {"epochs": 3, "adam_betas": [0.9, 1.0]}}, "train.adam_betas.1 = 1.0", "number >= 0 and < 1"),
    ({"train": {"epochs": 3, "label_smoothing": 1.0}}, "train.label_smoothing = 1.0", "number >= 0 and < 1"),
    ({"train": {"epochs": 3, "label_smoothing": -0.1}}, "train.label_smoothing = -0.1", "number >= 0 and < 1"),
    ({"train": {"epochs": 3, "weight_decay": True}}, "train.weight_decay = true", "expected number >= 0"),
    ({"train": {"epochs": 3, "group_by_length": "True"}}, "group_by_length", "did you mean 'true'?"),
    ({"train": {"epochs": 3, "max_steps": 100}}, "train: give exactly one", "train.max_steps = 100"),
    ({"train": {}}, "train: give exactly one", "train.epochs = null (default)"),
    ({"train": {"max_steps": 100}}, "must be below max_steps (100)", "train.warmup_steps = 500 (default)"),
    ({"train": {"max_steps": 100}}, "set train.warmup_ratio 0.1", "train.max_steps = 100"),
    (
        {"train": {"epochs": 3, "warmup_steps": 5, "warmup_ratio": 0.1}},
        "give one of warmup_steps and warmup_ratio",
        "train.warmup_steps = 5",
    ),
    ({"train": {"epochs": 3, "schedule": "cosin"}}, 'train.schedule = "cosin"', "did you mean 'cosine'?"),
    ({"train": {"epochs": 3, "schedule": "greedy"}}, "train.schedule: schedule 'greedy'", "follows the loss of every"),
    (
        {"train": {"epochs": 3, "schedule_options": {"power": 2}}},
        "'power', which schedule 'linear' has",
        '{"power": 2}',
    ),
    (
        {"train": {"epochs": 3, "early_stopping_threshold": 0.1}},
        "goes with early_stopping_patience",
        "= null (default)",
    ),
    ({"model": {}}, "model.name_or_path", "missing; expected non-empty string"),
    ({"model": "some/model"}, 'model = "some/model"', "expected an object with the keys name_or_path"),
    ({"model": {"name_or_path": "x", "dtype": "bf_16"}}, 'model.dtype = "bf_16"', "did you mean 'bf16'?"),
    (
        {"method": {"name": "adetp"}},
        'method.name = "adetp"',
        "did you mean 'adept'?",
    ),
    (
        {"method": {"name": 3}},
        "method.name = 3",
        'expected one of "adapter", "adapter_drop", "adept", "attempt", "bitfit"',
    ),
    ({"method": "full"}, 'method = "full"', "expected an object with the keys name, init_from, num_virtual_tokens"),
    ({"method": {"botleneck": 2}}, "method.botleneck = 2", "unknown key of method 'adept'; did you mean method.bott"),
    (
        {"method": {"name": "full", "bottleneck": 2}},
        "method.bottleneck = 2",
        "'full' (method.name 'adapter' or 'adapter_drop' or 'adept' or 'attempt' or 'hyperdecoder' or 'hyperformer'",
    ),
    ({"method": {"bottleneck": 0}}, "method.bottleneck = 0", "expected integer >= 1"),
    (
        {"method": {"name": "full"}, "model": {"name_or_path": "x", "quantization": "nf4"}},
        "method.name full trains weights of the backbone",
        'model.quantization = "nf4"',
    ),
    (
        {"model": {"name_or_path": "x", "quantization": "fp8", "double_quantization": True}},
        "model: double_quantization goes with quantization: nf4",
        'model.quantization = "fp8"',
    ),
    (
        {"model": {"name_or_path": "x", "quantization": "fp8", "keep_expanded": True}},
        "model: keep_expanded goes with quantization: nf4 or int8",
        "model.keep_expanded = true",
    ),
    (
        {"model": {"name_or_path": "x", "quantization": "nf4", "keep_expanded": True}},
        "model.keep_expanded goes with train.activation_checkpointing",
        "train.activation_checkpointing = false (default)",
    ),
    (
        {"method": {"name": "full"}, "train": {"epochs": 3, "sharding": "node"}},
        "train.sharding node is for frozen weights",
        'train.sharding = "node"',
    ),
    ({"method": {"prompt_init": "text"}}, "method: prompt_init_text goes with", 'method.prompt_init = "text"'),
    ({"method": {"num_virtual_tokens": 400}}, "method.num_virtual_tokens = 400", "data.max_prompt_length = 325"),
    ({"data": {"format": "mbbp"}}, 'data.format = "mbbp"', "did you mean 'mbpp'?"),
    ({"data": {"format": "jsonl"}}, "data: format: jsonl needs path", "data.path = null (default)"),
    ({"eval": {"generation": {"top_p": 1.5}}}, "eval.generation.top_p = 1.5", "number > 0 and <= 1"),
    ({"logging": {"trackers": "wandb"}}, 'logging.trackers = "wandb"', "expected list of strings"),
    ({"xyzzy": {}}, "xyzzy = {}", "unknown key; expected one of"),
    ({"train.epochs": 8}, "train.epochs", "dotted keys are for the command line"),
    ({"train_batch_size": 8}, "train_batch_size = 8", "did you mean train.global_batch_size?"),
    ({"zero_optimization": {}}, "zero_optimization = {}", "did you mean deepspeed.zero_optimization?"),
    ({"deepspeed": {"zero_optimisation": {}}}, "deepspeed.zero_optimisation = {}", "did you mean 'zero_optimization'?"),
    ({"deepspeed": {"optimizer": {"type": "Adam"}}}, "deepspeed.optimizer", "two parameter groups"),
    ({"deepspeed": {"gradient_clipping": 1.0}}, "deepspeed.gradient_clipping = 1.0", "train.max_grad_norm = 0.0"),
]


@pytest.mark.parametrize(("sections", "key", "expectation"), BAD_SECTIONS, ids=lambda part: str(part)[:40])
def test_a_mistake_is_named_with_its_key_and_what_was_expected(write, sections, key, expectation):
    text = message(write(**sections))
    assert "1 problem\n" in text
    assert key in text
    assert expectation in text


def test_a_mistake_is_named_with_its_line(write):
    path = write('{"model": {"name_or_path": "x"},\n "train": {"epochs": 3,\n  "seed": -1}}')
    assert f"train.seed = -1 ({path} line 3)" in message(path)


def test_a_mistake_on_the_command_line_is_named_as_such(write):
    assert 'train.epochs = "three" (command line)' in message(write(), "train.epochs=three")


def test_all_problems_are_told_at_once(write):
    path = write(
        model={"name_or_path": "x", "dtype": "fp8"},
        trian={"epoch": "3", "batchsize": 4},
        train={"epochs": 3},
        data={"max_length": 100},
        deepspeed={"scheduler": {}, "zero_optimization": {"stage": 4}},
    )
    text = message(path, "method.bottleneck=0", "logging.run_dri=x")
    assert f"{path}: 9 problems\n" in text
    for key in (
        "model.dtype", "trian", "train.epoch ", "train.batchsize", "data.max_length = 100", "deepspeed.scheduler",
        "deepspeed.zero_optimization.stage = 4", "method.bottleneck = 0", 'logging.run_dri = "x" (command line)',
    ):  # fmt: skip
        assert key in text


def test_a_misspelt_key_brings_no_second_message(write):
    text = message(write(model={"nme_or_path": "x"}, train={"epoch": 3}))
    assert "2 problems" in text
    assert "missing" not in text
    assert "exactly one" not in text


def test_a_key_given_twice(write):
    path = write('{"model": {"name_or_path": "x"},\n"train": {"epochs": 3,\n"seed": 1,\n"seed": 2}}')
    text = message(path)
    assert f"train.seed ({path} lines 3 and 4)" in text
    assert "given twice" in text


def test_equal_names_in_two_objects_of_a_list_are_not_twice(write):
    text = '{"model": {"name_or_path": "x"}, "train": {"epochs": 3}, "deepspeed": {"pruning": [{"a": 1}, {"a": 2}]}}'
    assert "given twice" not in message(write(text))


def test_a_missing_file_names_the_nearest_one(write):
    path = write()
    assert f"did you mean '{path}'?" in message(path.with_name("rum.json"))


def test_broken_json_names_line_and_column_and_shows_the_line(write):
    text = message(write('{"model": {"name_or_path": "x"},\n  "train": {"epochs": 3,,}}'))
    assert "line 2, column 25" in text
    assert '\n      "train": {"epochs": 3,,}}\n' in text


@pytest.mark.parametrize("text", ["[]", "3", '"x"'])
def test_a_file_that_is_no_object(write, text):
    assert "expected an object with the sections model, method" in message(write(text))


def test_a_number_that_is_not_json(write):
    assert "NaN is not JSON" in message(write('{"model": {"name_or_path": "x"}, "train": {"adam_eps": NaN}}'))


def test_a_folder_is_no_config(tmp_path):
    assert "this is a folder" in message(tmp_path)


def test_the_schema_key_is_no_setting(write):
    text = json.dumps({"$schema": "schema.json", **MINIMAL})
    assert load_config(write(text)).run == load_config(write()).run


def test_the_resolved_config_loads_back_to_itself(write, tmp_path):
    run = load_config(write(deepspeed={"zero_optimization": {"stage": 3}}, _about="x")).run
    resolved = tmp_path / "resolved.json"
    resolved.write_text(resolved_json(run))
    assert load_config(resolved).run == run


def test_the_hash_follows_values_and_not_their_order(write):
    first = config_hash(load_config(write(deepspeed={"wall_clock_breakdown": True, "dump_state": False})).run)
    second = config_hash(load_config(write(deepspeed={"dump_state": False, "wall_clock_breakdown": True})).run)
    other = config_hash(load_config(write(train={"epochs": 4})).run)
    assert first == second != other


@pytest.mark.parametrize(
    ("key", "value", "limit"),
    [
        ("method.bottleneck", 10**30, "4,294,967,295"),
        ("train.seed", 10**30, "4,294,967,295"),
        ("train.learning_rate.soft_prompt", 1e300, "1e+38"),
    ],
)
def test_a_number_that_no_tensor_holds_is_refused(write, key, value, limit):
    assert f"{key}: expected at most {limit}" in message(write(), f"{key}={json.dumps(value)}")


DEEP = '{"a":' * 700 + "1" + "}" * 700
LONG = '{"train": {"epochs": ' + "1" * 5000 + "}}"


@pytest.mark.parametrize("text", ["[" * 100_000, DEEP, LONG], ids=["unclosed", "deep", "long"])
def test_a_config_that_python_cannot_hold_is_refused(write, text):
    assert "run.json" in message(write(text))


# A config that changes another


def test_a_config_is_set_on_top_of_its_base(tmp_path):
    write = lambda name, values: (tmp_path / name).write_text(json.dumps(values, indent=1))  # noqa: E731
    write("below.json", {"model": {"name_or_path": "m"}, "method": {"bottleneck": 3}, "train": {"max_steps": 900}})
    write("same.json", {"_base": "below.json", "_about": "a", "method": {"num_virtual_tokens": 2}})
    write("other.json", {"_base": "same.json", "method": {"name": "pt"}, "train": {"warmup_steps": 4}})
    same = load_config(tmp_path / "same.json")
    assert (same.run.method.bottleneck, same.run.method.num_virtual_tokens) == (3, 2)
    assert same.sources["method.bottleneck"] == f"{tmp_path / 'below.json'} line 6"
    assert same.sources["method.num_virtual_tokens"] == f"{tmp_path / 'same.json'} line 5"
    other = load_config(tmp_path / "other.json", ["train.max_steps=700"])
    # A section about another method does not apply.
    assert (other.run.method.name, other.run.method.num_virtual_tokens) == ("pt", 10)
    assert (other.run.train.max_steps, other.run.train.warmup_steps, other.run.about) == (700, 4, "a")
    assert other.sources["method.num_virtual_tokens"] == "default"


def test_a_shipped_config_may_be_the_base(tmp_path):
    (tmp_path / "own.json").write_text('{"_base": "t5_base", "train": {"max_steps": 5, "warmup_steps": 0}}')
    run = load_config(tmp_path / "own.json").run
    assert (run.train.max_steps, run.method.bottleneck) == (5, 19)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("own.json", "_base leads back to this file"),
        ("t5_bas", r"own\.json: _base t5_bas: no such file"),
        (3, "_base is 3; expected the name of a config"),
    ],
)
def test_a_base_that_is_none_is_refused(tmp_path, base, message):
    (tmp_path / "own.json").write_text(json.dumps({"_base": base}))
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "own.json")
