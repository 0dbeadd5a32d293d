"""Adapters on the hub, against a small hub on this machine: uploading, loading by id, the cache without a hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from adept_ds.backbone.hub import cached_adapter, hub_adapter
from adept_ds.config.method import AdeptConfig
from adept_ds.config.run import ModelConfig, RunConfig
from adept_ds.errors import UserError
from adept_ds.evaluation.results import adapter_digest
from adept_ds.evaluation.side_by_side import origin_of
from adept_ds.evaluation.tuned import open_tuned
from adept_ds.model.adapted_model import AdaptedModel, get_adept_model
from adept_ds.slurm.checks import adapter_problems
from adept_ds.storage.adapter_folder import adapter_path, load_adapter
from tests.conftest import WORLD
from tests.models import BACKBONES, seeded
from tests.small_hub import SmallHub, small_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    with small_hub(monkeypatch, tmp_path / "cache") as running:
        yield running


def tuned(seed: int = 0) -> AdaptedModel:
    model = get_adept_model(seeded(BACKBONES["llama"]), AdeptConfig(num_virtual_tokens=3, bottleneck=2))
    torch.manual_seed(seed)
    for parameter in model.trainable_parameters().values():
        nn.init.normal_(parameter)
    return model


def test_an_adapter_that_was_pushed_is_loaded_by_its_id(hub: SmallHub) -> None:
    model = tuned()
    url = model.push_to_hub("me/house", step=7)
    assert url.startswith(f"{hub.url}/me/house/commit/")
    found = hub.files("me/house")
    assert found
    assert found[1].keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    loaded = AdaptedModel.from_pretrained(seeded(BACKBONES["llama"]), "me/house")
    for name, value in model.trainable_parameters().items():
        assert torch.equal(loaded.trainable_parameters()[name], value)
    assert load_adapter("me/house").facts["step"] == 7


def test_a_revision_is_another_adapter(hub: SmallHub) -> None:
    tuned(0).push_to_hub("me/house")
    first = hub.repositories["me/house"][0][0]
    second = tuned(1)
    second.push_to_hub("me/house")
    old, new = load_adapter("me/house", first).tensors, load_adapter("me/house").tensors
    assert not torch.equal(old["soft_prompt"], new["soft_prompt"])
    assert torch.equal(new["soft_prompt"], second.trainable_parameters()["soft_prompt"])
    assert torch.equal(load_adapter(f"me/house@{first}").tensors["soft_prompt"], old["soft_prompt"])


def test_the_cache_serves_without_a_hub(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned().push_to_hub("me/house")
    assert cached_adapter("me/house") is None
    folder = adapter_path("me/house")
    assert cached_adapter("me/house") == folder
    assert adapter_digest(Path("me/house")) == load_adapter(folder).facts["tensors_sha256"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert adapter_path("me/house") == folder
    with pytest.raises(UserError, match="me/other: no such folder, and as a repository of the hub not to be had"):
        adapter_path("me/other")


def test_what_the_hub_lacks_is_told(hub: SmallHub) -> None:
    with pytest.raises(UserError, match="me/nothing: no such folder, and as a repository of the hub"):
        load_adapter("me/nothing")
    tuned().push_to_hub("me/house")
    with pytest.raises(UserError, match="at revision v9"):
        load_adapter("me/house@v9")
    hub.repositories["me/model"] = [("0" * 40, {"config.json": b"{}"})]
    with pytest.raises(UserError, match=r"is not an adapter folder: it has no adapter_config\.json"):
        load_adapter("me/model")


def test_a_refused_upload_is_told(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"me/house: the hub refuses .*hf auth login"):
        tuned().push_to_hub("me/house")


def test_a_hub_that_cannot_be_reached_is_told(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"me/house: the hub refuses the upload, or cannot be reached: .*refused"):
        tuned().push_to_hub("me/house")
    with pytest.raises(UserError, match="me/house: no such folder, and as a repository of the hub not to be had"):
        load_adapter("me/house")


def test_an_evaluation_and_a_start_take_a_hub_id(hub: SmallHub, tiny_llama: Path) -> None:
    config = AdeptConfig(num_virtual_tokens=2)
    model = get_adept_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config)
    model.push_to_hub("me/tiny")
    assert origin_of(Path("me/tiny"), None).model.name_or_path == str(tiny_llama)
    backbone = ModelConfig(name_or_path=str(tiny_llama), dtype="fp32")
    loaded = open_tuned(backbone, Path("me/tiny")).load(WORLD)
    assert torch.equal(loaded.trainable_parameters()["soft_prompt"], model.trainable_parameters()["soft_prompt"])
    start = config.model_copy(update={"init_from": "me/tiny"})
    started = get_adept_model(AutoModelForCausalLM.from_pretrained(tiny_llama), start, seed=9)
    assert torch.equal(started.trainable_parameters()["soft_prompt"], model.trainable_parameters()["soft_prompt"])


def test_a_job_without_the_hub_needs_its_adapters_in_the_cache(hub: SmallHub) -> None:
    run = RunConfig.model_validate(
        {"model": {"name_or_path": "me/base"}, "method": {"init_from": "me/house"}, "train": {"max_steps": 900}}
    )
    tuned().push_to_hub("me/house")
    assert not list(adapter_problems(run, offline=False))
    (problem,) = adapter_problems(run, offline=True)
    assert problem == (
        "method.init_from is 'me/house': not in this machine's cache, and the nodes are offline; fetch it by "
        "`hf download me/house`"
    )
    adapter_path("me/house")
    assert not list(adapter_problems(run, offline=True))


def test_folders_come_before_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "best").mkdir(parents=True)
    assert hub_adapter("me/house") == ("me/house", None)
    assert hub_adapter("me/house@v1") == ("me/house", "v1")
    # `runs` is a folder here, so that this is a misspelt one.
    for folder in ("runs/best", "runs/bset", "best", "./me/house", "a/b/c", str(tmp_path)):
        assert hub_adapter(folder) is None
