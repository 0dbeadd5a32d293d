"""Full fine-tuning in one process: what is trained, the backbone's own gradients, and the model that is left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from adept_ds.config.method import FullConfig
from adept_ds.config.run import ModelConfig
from adept_ds.errors import UserError
from adept_ds.evaluation.tuned import load_tuned
from adept_ds.model.adapted_model import get_adept_model
from adept_ds.storage.adapter_folder import load_adapter
from adept_ds.storage.model_folder import save_model
from tests.conftest import WORLD
from tests.models import VOCABULARY, character_tokenizer
from tests.tolerances import assert_equal_up_to_rounding

Make = Callable[[str], PreTrainedModel]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5-tied", "t5-untied"])
def test_every_parameter_is_trained_under_its_name_in_a_checkpoint(make_backbone: Make, name):
    expected = [name for name, _ in make_backbone(name).named_parameters()]
    model = get_adept_model(make_backbone(name), FullConfig())
    assert list(model.trainable_parameters()) == expected
    assert model.learning_rate_groups() == {"backbone": expected}
    trainable, total = model.count_parameters()
    assert trainable == total == sum(parameter.numel() for parameter in make_backbone(name).parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2", "codegen", "t5-tied", "t5-untied"])
def test_gradients_are_those_of_the_plain_model(make_backbone: Make, name):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=generator)
    plain, model = make_backbone(name), get_adept_model(make_backbone(name), FullConfig())
    reference = plain(input_ids=ids, labels=ids).loss
    reference.backward()
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert_equal_up_to_rounding(loss, reference)
    gradients = {name: parameter.grad for name, parameter in model.trainable_parameters().items()}
    assert gradients.keys() == dict(plain.named_parameters()).keys()
    for name, parameter in plain.named_parameters():
        if parameter.grad is None:  # T5's own table, where encoder and decoder have theirs
            assert gradients[name] is None
            continue
        assert_equal_up_to_rounding(gradients[name], parameter.grad)


def test_the_backbone_as_it_was_is_gone(make_backbone: Make):
    model = get_adept_model(make_backbone("llama"), FullConfig())
    with pytest.raises(UserError, match="load the backbone anew"), model.disable_adapter():
        pass


@pytest.mark.parametrize("name", ["llama", "gpt2", "codegen", "t5-tied", "t5-untied"])
@pytest.mark.parametrize("size", [1.0, 1e-5])
def test_a_saved_model_loads_with_equal_logits(make_backbone: Make, tmp_path: Path, name: str, size: float):
    model = get_adept_model(make_backbone(name), FullConfig(max_file_gb=size)).eval()
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.mul_(1.01)
    model.save_pretrained(tmp_path, step=3)
    loaded = type(model.backbone).from_pretrained(tmp_path).eval()
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    decoder = {"decoder_input_ids": ids} if model.is_encoder_decoder else {}
    assert torch.equal(loaded(input_ids=ids, **decoder).logits, model(ids, **decoder).logits)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert (files == ["model.safetensors"]) == (size == 1.0)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # not for this user alone
    largest = max(parameter.nbytes for parameter in loaded.parameters())
    sizes = [sum(tensor.nbytes for tensor in load_file(tmp_path / file).values()) for file in files]
    assert max(sizes) <= max(size * 1e9, largest)


def test_a_saved_model_has_the_names_that_older_readers_look_for(make_backbone: Make, tmp_path: Path):
    model = get_adept_model(make_backbone("llama"), FullConfig())
    model.save_backbone(tmp_path, character_tokenizer(), {})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoTokenizer.from_pretrained(tmp_path)("a b") == character_tokenizer()("a b")


def test_a_saved_model_says_what_it_was_trained_from(make_backbone: Make, tmp_path: Path):
    model = get_adept_model(make_backbone("llama"), FullConfig())
    before = model.backbone_facts["embedding_fingerprint"]
    model.save_pretrained(tmp_path, step=3)
    training = json.loads((tmp_path / "training.json").read_text())
    assert (training["method"]["name"], training["step"]) == ("full", 3)
    assert training["backbone"]["embedding_fingerprint"] == before


def test_a_model_is_evaluated_in_the_place_of_its_backbone(
    make_backbone: Make, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    model = get_adept_model(make_backbone("llama"), FullConfig())
    with torch.no_grad():
        model.trainable_parameters()["lm_head.weight"].mul_(2)
    save_model(tmp_path, model.backbone, tokenizer, FullConfig(), {}, {}, 10**9)
    loaded, its_tokenizer = load_tuned(ModelConfig(name_or_path="elsewhere", dtype="fp32"), tmp_path, WORLD)
    assert torch.equal(loaded.backbone.lm_head.weight, model.backbone.lm_head.weight)
    assert loaded.num_virtual_tokens == 0
    assert its_tokenizer("abc").input_ids == tokenizer("abc").input_ids


def test_a_model_is_no_adapter(make_backbone: Make, tmp_path: Path):
    get_adept_model(make_backbone("llama"), FullConfig()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"it is a whole model, to be given as model\.name_or_path"):
        load_adapter(tmp_path)
