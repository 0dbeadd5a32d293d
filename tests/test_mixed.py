"""Rows of one batch read with different adapters, each equal to itself alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from adept_ds.config.method import MethodConfig
from adept_ds.errors import UserError
from adept_ds.methods import Untuned
from adept_ds.model.adapted_model import AdaptedModel, get_adept_model
from tests.models import BACKBONES, EOS, PAD, VOCABULARY, seeded

SETTINGS: dict[str, dict[str, Any]] = {
    "wide": {"name": "adept", "num_virtual_tokens": 3, "bottleneck": 5},
    "long": {"name": "adept", "num_virtual_tokens": 9, "bottleneck": 1},
    "prompt": {"name": "pt", "num_virtual_tokens": 4},
    "encoded": {"name": "p_tuning", "num_virtual_tokens": 2},
    "offset": {"name": "adept", "num_virtual_tokens": 0, "bottleneck": 2},
    "several": {"name": "mpt", "num_virtual_tokens": 5, "tasks": ["one", "two"]},
}
NAMES = [None, "wide", "long", "prompt", "encoded", "offset", "several/one", "several/two", "wide"]
GREEDY = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": PAD, "eos_token_id": EOS}


def trained(name: str, settings: dict[str, Any], folder: Path) -> Path:
    config = TypeAdapter(MethodConfig).validate_python(settings)
    model = get_adept_model(seeded(BACKBONES[name]), config)
    generator = torch.Generator().manual_seed(len(str(settings)))
    for parameter in model.trainable_parameters().values():
        parameter.data = parameter.data + torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def mixed(name: str, tmp_path: Path) -> AdaptedModel:
    model = AdaptedModel(seeded(BACKBONES[name]), Untuned()).eval()
    folders = {one: trained(name, settings, tmp_path / one) for one, settings in SETTINGS.items()}
    model.load_adapters(dict(list(folders.items())[:2]))
    model.load_adapters(dict(list(folders.items())[2:]))
    return model


def alone(name: str, adapter: str | None, tmp_path: Path) -> tuple[AdaptedModel, dict[str, Any]]:
    backbone = seeded(BACKBONES[name])
    if adapter is None:
        return AdaptedModel(backbone, Untuned()).eval(), {}
    one, _, task = adapter.partition("/")
    tasks = {"task_ids": torch.tensor([["one", "two"].index(task)])} if task else {}
    return AdaptedModel.from_pretrained(backbone, tmp_path / one), tasks


def rows(lengths: list[int], is_causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    width = max(lengths)
    ids, mask = torch.full((len(lengths), width), PAD), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        part = slice(width - length, None) if is_causal else slice(0, length)
        ids[row, part] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask[row, part] = 1
    return ids, mask


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5-tied"])
@torch.no_grad()
def test_each_row_is_what_it_is_alone(name: str, tmp_path: Path) -> None:
    model = mixed(name, tmp_path)
    ids, mask = rows([7, 3, 7, 5, 6, 4, 7, 2, 6], not model.is_encoder_decoder)
    labels = {"decoder_input_ids": torch.full((len(NAMES), 1), PAD)} if model.is_encoder_decoder else {}
    logits = model(ids, mask, adapter_names=NAMES, **labels).logits
    written = model.generate(ids, mask, adapter_names=NAMES, **GREEDY)
    beams = model.generate(ids, mask, adapter_names=NAMES, **GREEDY, num_beams=3, num_return_sequences=2)
    assert not torch.equal(logits[1, -1], logits[2, -1])
    start = 0 if model.is_encoder_decoder else ids.shape[1]
    for number, adapter in enumerate(NAMES):
        one, options = alone(name, adapter, tmp_path)
        row = ids[number][mask[number].bool()][None]
        decoder = {"decoder_input_ids": torch.full((1, 1), PAD)} if model.is_encoder_decoder else {}
        torch.testing.assert_close(
            logits[number, -1], one(row, **options, **decoder).logits[0, -1], atol=2e-4, rtol=1e-4
        )
        begin = 0 if model.is_encoder_decoder else row.shape[1]
        expected = one.generate(row, **options, **GREEDY)[0, begin:].tolist()
        assert written[number, start:][: len(expected)].tolist() == expected
        best = one.generate(row, **options, **GREEDY, num_beams=3, num_return_sequences=2)[:, begin:].tolist()
        assert [found[: len(best[0])] for found in beams[2 * number : 2 * number + 2, start:].tolist()] == best


@torch.no_grad()
def test_without_adapter_a_row_is_the_backbones_to_the_bit(tmp_path: Path) -> None:
    model, ids = mixed("llama", tmp_path), rows([6], True)[0]
    plain = seeded(BACKBONES["llama"])
    expected = plain(torch.cat([torch.full((1, 9), PAD), ids], 1), **masked(9, 6)).logits
    assert torch.equal(model(ids, adapter_names=[None]).logits[:, -6:], expected[:, -6:])
    with model.disable_adapter():
        assert torch.equal(model(ids, adapter_names=["wide"]).logits, AdaptedModel(plain, Untuned())(ids).logits)


def masked(padding: int, length: int) -> dict[str, torch.Tensor]:
    mask = torch.tensor([[0] * padding + [1] * length])
    return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def test_mistakes(tmp_path: Path) -> None:
    model, ids = mixed("llama", tmp_path), rows([6], True)[0]
    with pytest.raises(UserError, match=r"adapter_names has 'wied'.*did you mean 'wide'"):
        model(ids, adapter_names=["wied"])
    with pytest.raises(UserError, match="for each of 1 rows"):
        model.generate(ids)
    dept = trained("llama", {"name": "dept", "num_virtual_tokens": 2, "rank": 2, "max_positions": 32}, tmp_path / "d")
    with pytest.raises(UserError, match=r"is of method 'dept', .*expected methods adept, pt"):
        model.load_adapters({"dept": dept})
    with pytest.raises(UserError, match="has a method of its own"):
        AdaptedModel.from_pretrained(seeded(BACKBONES["llama"]), dept).load_adapters({"wide": tmp_path / "wide"})
    other = trained("gpt2", SETTINGS["wide"], tmp_path / "other")
    with pytest.raises(UserError, match="other token embeddings"):
        model.load_adapters({"other": other})
    assert model(ids, adapter_names=["wide"]).logits.isfinite().all()
