"""The adapter folder: round trip, and every way in which it may not fit."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from adept_ds.config.method import AdeptConfig
from adept_ds.errors import UserError
from adept_ds.model.adapted_model import AdaptedModel, get_adept_model
from adept_ds.storage import adapter_folder
from tests.models import VOCABULARY, WIDTH

Make = Callable[[str], PreTrainedModel]


@pytest.fixture
def saved(make_backbone: Make, tmp_path: Path) -> Path:
    """Folder of a saved adapter for the small Llama."""
    torch.manual_seed(0)
    model = get_adept_model(make_backbone("llama"), AdeptConfig(num_virtual_tokens=3, bottleneck=2))
    for parameter in model.trainable_parameters().values():
        nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter", step=12)
    return tmp_path / "adapter"


def edit_config(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / adapter_folder.CONFIG_NAME
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def rewrite_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors, and the digest with them: a folder that is whole but does not fit."""
    path = folder / adapter_folder.TENSORS_NAME
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    digest = adapter_folder.hashlib.sha256(path.read_bytes()).hexdigest()
    edit_config(folder, lambda config: config.update(tensors_sha256=digest))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5-tied"])
def test_round_trip_is_bit_exact(make_backbone: Make, tmp_path, name):
    model = get_adept_model(make_backbone(name), AdeptConfig(num_virtual_tokens=3, bottleneck=2))
    for parameter in model.trainable_parameters().values():
        nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    loaded = AdaptedModel.from_pretrained(make_backbone(name), tmp_path)
    assert loaded.method.config == model.method.config
    for key, parameter in model.trainable_parameters().items():
        assert torch.equal(loaded.trainable_parameters()[key], parameter)
    extra = {"decoder_input_ids": torch.tensor([[0, 5]])} if model.is_encoder_decoder else {}
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded.eval()(ids, **extra).logits, model.eval()(ids, **extra).logits)


def test_the_file_holds_fp32_under_the_methods_names(saved: Path):
    tensors = load_file(saved / adapter_folder.TENSORS_NAME)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "soft_prompt": (3, WIDTH),
        "network.w_down": (WIDTH, 2),
        "network.b1": (2,),
        "network.w_up": (2, WIDTH),
        "network.b2": (WIDTH,),
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_the_config_tells_backbone_versions_and_facts(saved: Path):
    config = json.loads((saved / adapter_folder.CONFIG_NAME).read_text())
    assert config["method"]["num_virtual_tokens"] == 3
    assert config["step"] == 12
    assert set(config["versions"]) == {"adept_ds", "torch", "transformers", "deepspeed"}
    backbone = config["backbone"]
    assert (backbone["model_type"], backbone["hidden_size"], backbone["vocab_size"]) == ("llama", WIDTH, VOCABULARY)
    assert {"name_or_path", "revision", "embedding_fingerprint"} < backbone.keys()


def test_an_adapter_loads_on_its_backbone_in_another_precision(make_backbone: Make, saved: Path):
    AdaptedModel.from_pretrained(make_backbone("llama").bfloat16(), saved)


def test_the_fingerprint_sees_other_embeddings(make_backbone: Make):
    backbone = make_backbone("llama")
    before = adapter_folder.embedding_fingerprint(backbone.get_input_embeddings())
    with torch.no_grad():
        backbone.get_input_embeddings().weight.mul_(1.1)
    assert adapter_folder.embedding_fingerprint(backbone.get_input_embeddings()) != before


def other_backbone(**changes: int) -> PreTrainedModel:
    options = {"vocab_size": VOCABULARY, "hidden_size": WIDTH} | changes
    return LlamaForCausalLM(
        LlamaConfig(**options, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "with embedding width 32; '' has 64"),
        ({"vocab_size": 120}, "with vocabulary size 99; '' has 120"),
        ({}, "the same width and vocabulary but other token embeddings"),
    ],
)
def test_another_backbone_is_refused(saved: Path, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        AdaptedModel.from_pretrained(other_backbone(**changes), saved)


@pytest.mark.parametrize("name", [adapter_folder.CONFIG_NAME, adapter_folder.TENSORS_NAME])
def test_a_missing_file_is_named(make_backbone: Make, saved: Path, name):
    (saved / name).unlink()
    with pytest.raises(UserError, match=f"is not an adapter folder: it has no {re.escape(name)}"):
        AdaptedModel.from_pretrained(make_backbone("llama"), saved)


def test_a_damaged_tensor_file_is_refused(saved: Path):
    path = saved / adapter_folder.TENSORS_NAME
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged or belongs to another"):
        adapter_folder.load_adapter(saved)


def test_a_file_that_is_no_safetensors_file_is_refused(saved: Path):
    (saved / adapter_folder.TENSORS_NAME).write_bytes(b"none")
    digest = adapter_folder.hashlib.sha256(b"none").hexdigest()
    edit_config(saved, lambda config: config.update(tensors_sha256=digest))
    with pytest.raises(UserError, match="is not a safetensors file"):
        adapter_folder.load_adapter(saved)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '{"peft_type": "LORA"}'])
def test_a_config_that_is_not_ours_is_refused(saved: Path, text):
    (saved / adapter_folder.CONFIG_NAME).write_text(text)
    with pytest.raises(UserError, match="is not a config of an adept_ds adapter"):
        adapter_folder.load_adapter(saved)


def test_an_unknown_setting_is_refused(saved: Path):
    edit_config(saved, lambda config: config["method"].update(bottlneck=3))
    with pytest.raises(UserError, match="bottlneck"):
        adapter_folder.load_adapter(saved)


def test_another_format_is_refused(saved: Path):
    edit_config(saved, lambda config: config.update(format="adept_ds/9"))
    with pytest.raises(UserError, match="has the format 'adept_ds/9'; this version reads 'adept_ds/1'"):
        adapter_folder.load_adapter(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("network.b2"), "network.b2 is missing"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "extra is unknown"),
        (
            lambda tensors: tensors.update({"network.w_dwn": tensors.pop("network.w_down")}),
            "network.w_dwn is unknown; did you mean 'network.w_down'?",
        ),
        (
            lambda tensors: tensors.update(soft_prompt=torch.zeros(4, WIDTH)),
            "soft_prompt has shape (4, 32), expected (3, 32)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(make_backbone: Make, saved: Path, change, message):
    rewrite_tensors(saved, change)
    with pytest.raises(UserError, match=re.escape(message)):
        AdaptedModel.from_pretrained(make_backbone("llama"), saved)


def test_saving_again_replaces_the_adapter(make_backbone: Make, saved: Path):
    get_adept_model(make_backbone("llama"), AdeptConfig(num_virtual_tokens=9)).save_pretrained(saved)
    assert AdaptedModel.from_pretrained(make_backbone("llama"), saved).num_virtual_tokens == 9
    assert sorted(path.name for path in saved.iterdir()) == [adapter_folder.CONFIG_NAME, adapter_folder.TENSORS_NAME]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused_by_the_name_of_their_tensor(saved: Path, make_backbone: Make, number: float):
    def destroy(tensors: dict[str, torch.Tensor]) -> None:
        tensors["network.w_up"][1, 3] = number

    rewrite_tensors(saved, destroy)
    with pytest.raises(UserError, match=r"NaN or infinity in network\.w_up"):
        AdaptedModel.from_pretrained(make_backbone("llama"), saved)


def test_an_adapter_of_nan_is_not_saved(make_backbone: Make, tmp_path: Path):
    model = get_adept_model(make_backbone("llama"), AdeptConfig(num_virtual_tokens=3, bottleneck=2))
    nn.init.constant_(model.trainable_parameters()["soft_prompt"], math.nan)
    with pytest.raises(UserError, match="NaN or infinity in soft_prompt"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / adapter_folder.CONFIG_NAME).exists()
