"""Analyses of trained adapters: sizes of embeddings and offsets, speed, other settings for the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from adept_ds.cli.analysis import main
from adept_ds.config.method import AdeptConfig
from adept_ds.config.run import DataConfig, RunConfig
from adept_ds.data.encode import EncodedDataset
from adept_ds.data.tasks import TaskExamples, load_task_examples
from adept_ds.distributed import World
from adept_ds.errors import UserError
from adept_ds.evaluation.analysis import Moments, embedding_sizes, samples_per_second, write_variant
from adept_ds.model.adapted_model import AdaptedModel, get_adept_model
from adept_ds.storage.adapter_folder import load_adapter


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    (tmp_path / "rte").mkdir()
    rows = [{"sentence1": "a" * i, "sentence2": "b", "label": i % 2} for i in range(40)]
    for split in ("train", "validation"):
        (tmp_path / "rte" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(format="tasks", tasks=("rte",), path=str(tmp_path))


@pytest.fixture
def examples(data: DataConfig) -> TaskExamples:
    return load_task_examples(data, "train")


@pytest.fixture(params=["llama", "t5-tied"])
def model(request: pytest.FixtureRequest, make_backbone: Callable[[str], PreTrainedModel]) -> AdaptedModel:
    adapted = get_adept_model(make_backbone(request.param), AdeptConfig(num_virtual_tokens=3, bottleneck=2))
    for parameter in adapted.trainable_parameters().values():
        torch.nn.init.normal_(parameter, std=0.5)
    return adapted


def test_moments_are_those_of_absolute_values() -> None:
    values = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    moments = Moments()
    for part in values:
        moments.add(part)
    assert moments.mean == pytest.approx(float(values.abs().mean()))
    assert moments.variance == pytest.approx(float(values.abs().var(correction=0)))


def test_sizes_are_over_the_tokens_and_leave_out_prompt_and_padding(
    model: AdaptedModel, data: DataConfig, examples: TaskExamples, tokenizer: PreTrainedTokenizerFast
) -> None:
    encoded = EncodedDataset(examples, tokenizer, data, model.num_virtual_tokens, model.is_encoder_decoder)
    plain, offsets = embedding_sizes(model, encoded, tokenizer.pad_token_id, torch.device("cpu"))
    ids = torch.cat([torch.tensor(encoded[index].input_ids) for index in range(len(encoded))])
    reader = model.backbone.get_encoder() if model.is_encoder_decoder else model.backbone
    embedding = reader.get_input_embeddings()
    with torch.no_grad():
        tuned = embedding(ids)
        with model.disable_adapter():
            table = embedding(ids)
    assert plain.count == table.numel()
    assert plain.mean == pytest.approx(float(table.abs().mean()), rel=1e-5)
    assert offsets.mean == pytest.approx(float((tuned - table).abs().mean()), rel=1e-5)
    assert offsets.variance == pytest.approx(float((tuned - table).abs().var(correction=0)), rel=1e-4)


def test_speed_is_measured_in_rounds(
    model: AdaptedModel, data: DataConfig, examples: TaskExamples, tokenizer: PreTrainedTokenizerFast, world: World
) -> None:
    run = RunConfig.model_validate({"model": {"name_or_path": "m"}, "train": {"epochs": 1}, "data": data.model_dump()})
    rates = samples_per_second(model, tokenizer, examples[:4], run, world, rounds=2)
    assert len(rates) == 2
    assert all(rate > 0 for rate in rates)


def test_a_variant_has_the_same_weights_and_other_settings(model: AdaptedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "best", step=7)
    arguments = ["--adapter", str(tmp_path / "best"), "--set", "dropout=0.2", "--out", str(tmp_path / "variant")]
    main(["variant", *arguments])
    source, made = load_adapter(tmp_path / "best"), load_adapter(tmp_path / "variant")
    assert made.method == source.method.model_copy(update={"dropout": 0.2})
    assert all(torch.equal(made.tensors[name], tensor) for name, tensor in source.tensors.items())
    assert (made.facts["step"], made.facts["variant_of"]) == (7, str(tmp_path / "best"))
    assert made.backbone == source.backbone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("dropuot=0.2", "no setting of method 'adept'.*did you mean 'dropout'"),
        ("dropout=2", "dropout: Input should be less than 1"),
        ("name=full", "--set name: no setting"),
        ("dropout", "expected key=value"),
    ],
)
def test_a_wrong_setting_is_told(model: AdaptedModel, tmp_path: Path, change: str, message: str) -> None:
    model.save_pretrained(tmp_path / "best")
    with pytest.raises(UserError, match=message):
        write_variant(tmp_path / "best", [change], tmp_path / "variant")


def test_an_unknown_analysis_is_told() -> None:
    with pytest.raises(UserError, match="did you mean 'sizes'"):
        main(["size"])
