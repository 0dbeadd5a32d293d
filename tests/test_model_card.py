"""Model cards: what the hub reads of them, what people read, and what is left out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn

from adept_ds.cli.card import main
from adept_ds.config.method import AdapterConfig, AdeptConfig, FullConfig
from adept_ds.errors import UserError
from adept_ds.model.adapted_model import AdaptedModel, get_adept_model
from adept_ds.storage.adapter_folder import load_adapter
from tests.models import BACKBONES, seeded
from tests.small_hub import SmallHub, small_hub
from tests.test_adapter_folder import edit_config
from tests.test_run_report import write_evaluation, write_metrics

BASE = "owner/base-1b"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose adapter passes 5 of 10 problems, the backbone 2, and an earlier adapter's evaluation 3."""
    folder = tmp_path / "house"
    model = get_adept_model(seeded(BACKBONES["llama"]), AdeptConfig(num_virtual_tokens=3, bottleneck=2))
    torch.manual_seed(0)
    for parameter in model.trainable_parameters().values():
        nn.init.normal_(parameter)
    model.save_pretrained(folder / "best")
    edit_config(folder / "best", lambda config: config["backbone"].update(name_or_path="/home/me/models/base"))
    settings: dict[str, Any] = {
        "_about": "Learns the custom of a house.",
        "model": {"name_or_path": "/home/me/models/base", "dtype": "bf16"},
        "method": {"name": "adept", "num_virtual_tokens": 3, "bottleneck": 2},
        "data": {"format": "mbpp-paper", "path": "/home/me/mbpp.jsonl"},
        "train": {"max_steps": 20, "seed": 4},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    write_metrics(folder)
    write_evaluation(folder, "adept", [number < 5 for number in range(10)], adapter="best")
    write_evaluation(folder, "old", [number < 3 for number in range(10)], adapter="earlier")
    write_evaluation(folder, "base", [number < 2 for number in range(10)], adapter=None)
    protocol = {"format": "mbpp-paper", "split": "test", "generation": {"do_sample": False, "max_new_tokens": 64}}
    isolation = {"tier": "namespaces", "self_test": "13 of 13 attacks stopped"}
    digest = load_adapter(folder / "best").facts["tensors_sha256"]
    edit_summary(folder, "adept", adapter_sha256=digest, protocol=protocol, isolation=isolation)
    edit_summary(folder, "base", protocol=protocol, isolation=isolation)
    return folder


def edit_summary(run: Path, name: str, **changes: Any) -> None:
    path = run / "eval" / name / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    with small_hub(monkeypatch, tmp_path / "cache") as running:
        yield running


def card_of(folder: Path, *flags: str) -> ModelCard:
    main([str(folder), "--force", *flags])
    return ModelCard.load(folder / "README.md")


def test_the_hub_reads_base_library_tags_and_figures(run: Path) -> None:
    data = card_of(run / "best", "--base", BASE).data
    assert data.base_model == BASE
    assert data.base_model_relation == "adapter"
    assert data.library_name == "adept_ds"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["adept_ds", "adept", f"base_model:adapter:{BASE}"]
    assert data.license is None
    (result,) = data.eval_results or []
    assert (result.metric_type, result.metric_value) == ("pass@1", 0.5)
    assert (result.dataset_type, result.dataset_split) == ("google-research-datasets/mbpp", "test")
    assert result.metric_name == "pass@1, 95 % interval 0.400 to 0.600, n = 10"


def test_people_read_figures_protocol_data_and_settings(run: Path) -> None:
    text = card_of(run / "best", "--base", BASE).text
    assert text.strip().startswith("# house\n")
    assert "Learns the custom of a house." in text
    assert "| mbpp-paper | pass@1 | 50.0 % | 40.0 to 60.0 | 20.0 % | 10 |" in text
    assert "The adapter (adept) solves 3 more of 10 problems than the backbone (base)" in text
    assert "split test; greedy decoding; at most 64 new tokens; programs were run isolated by namespaces" in text
    assert "13 of 13 attacks stopped" in text
    assert "- file or data set: mbpp.jsonl" in text
    assert "- steps: 20" in text
    assert f'AutoModelForCausalLM.from_pretrained("{BASE}")' in text
    assert load_adapter(run / "best").facts["tensors_sha256"] in text


def test_no_place_on_this_machine_is_published(run: Path) -> None:
    edit_config(run / "best", lambda config: config["method"].update(init_from="/home/me/runs/source/best"))
    card = card_of(run / "best")
    assert "/home/me" not in str(card)
    assert '"init_from": "best"' in card.text
    assert card.data.base_model is None


def test_an_adapter_of_several_tasks_says_which_and_how_they_are_asked_for(tmp_path: Path) -> None:
    config = AdapterConfig(tasks=("mood", "tone"), bottleneck=2)
    model = get_adept_model(seeded(BACKBONES["llama"]), config)
    model.save_pretrained(tmp_path / "best")
    settings = {"train": {"max_steps": 4}, "data": {"format": "tasks", "tasks": ["/home/me/mood.json", "tone.json"]}}
    (tmp_path / "config.json").write_text(json.dumps(settings | {"model": {"name_or_path": "base"}}))
    text = card_of(tmp_path / "best").text
    trained, _ = model.count_parameters()
    assert f"{trained:,} trained numbers, {trained / 2:,.0f} for each of 2 tasks: mood, tone." in text
    assert '--task mood "A prompt"' in text
    assert "0 is mood, 1 is tone." in text
    assert "- tasks: mood.json, tone.json" in text
    assert "bundled" not in text


def test_what_is_missing_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card_of(run / "best")
    printed = capsys.readouterr().out
    assert "note: the backbone is on record as '/home/me/models/base', a folder of this machine" in printed
    assert "eval/old is of other weights and is left out" in printed
    edit_summary(run, "adept", adapter_sha256="another")
    card = card_of(run / "best")
    assert "has no evaluation of these weights" in capsys.readouterr().out
    assert "There is no evaluation of it on record." in card.text
    assert card.data.eval_results is None


def test_an_adapter_without_its_run_has_a_card(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = (run / "best").rename(tmp_path / "somewhere")
    assert "The run that it came from is not on record here." in card_of(alone).text
    assert "no run is known" in capsys.readouterr().out
    assert "50.0 %" in card_of(alone, "--run", str(run)).text


def test_a_backbone_of_the_hub_needs_no_base(run: Path) -> None:
    edit_config(run / "best", lambda config: config["backbone"].update(name_or_path=BASE, revision="c" * 40))
    assert card_of(run / "best").data.base_model == BASE


def test_the_licence_is_the_one_that_is_given(run: Path) -> None:
    assert card_of(run / "best", "--license", "apache-2.0").data.license == "apache-2.0"


def test_a_folder_to_publish_from_has_what_others_need(run: Path, tmp_path: Path) -> None:
    (run / "best" / "optimizer.safetensors").write_bytes(b"")
    main([str(run / "best"), "--out", str(tmp_path / "new")])
    found = {path.name for path in (tmp_path / "new").iterdir()}
    assert found == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(UserError, match="is there already"):
        main([str(run / "best"), "--out", str(tmp_path / "new")])


def test_a_card_that_was_edited_stays(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run / "best")])
    (run / "best" / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"README\.md is there already; --force"):
        main([str(run / "best")])
    main([str(run / "best"), "--out", str(tmp_path / "new")])
    assert "is taken as it is" in capsys.readouterr().out
    assert (tmp_path / "new" / "README.md").read_text() == "mine"


def test_what_is_pushed_has_the_card_and_loads(run: Path, hub: SmallHub, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run / "best"), "--base", BASE, "--push", "me/house-adapter", "--private"])
    assert f"pushed: {hub.url}/me/house-adapter/commit/" in capsys.readouterr().out
    assert hub.created[0]["visibility"] == "private"
    found = hub.files("me/house-adapter")
    assert found
    card = ModelCard(found[1]["README.md"].decode())
    assert card.data.model_name == "house-adapter"
    assert 'AdaptedModel.from_pretrained(backbone, "me/house-adapter")' in card.text
    AdaptedModel.from_pretrained(seeded(BACKBONES["llama"]), "me/house-adapter")


@pytest.mark.parametrize(
    ("form", "library", "relation", "text"),
    [
        ("folded", "transformers", "finetune", "The tokenizer puts them there for plain text, and the chat template"),
        (
            "lora",
            "peft",
            "adapter",
            'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("exports/serving")',
        ),
    ],
)
def test_an_export_has_the_card_of_its_form(
    run: Path, tmp_path: Path, form: str, library: str, relation: str, text: str
) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    adapter = load_adapter(run / "best")
    manifest = {
        "format": "adept_ds-export/1",
        "form": form,
        "base": adapter.backbone,
        "adapter": {
            "folder": str(run / "best"),
            "tensors_sha256": adapter.facts["tensors_sha256"],
            "method": adapter.method.model_dump(mode="json"),
            "task": None,
        },
        "serving_base": "exports/serving" if form == "lora" else None,
        "prompt_tokens": ["<p0>", "<p1>", "<p2>"],
        "prompt_in": "both" if form == "folded" else "none",
        "verification": {"prompts": 8, "differing_texts": 0},
        "dtype": "fp32",
        "files": {},
        "versions": {"adept_ds": "1"},
    }
    (folder / "adept_export.json").write_text(json.dumps(manifest))
    if form == "lora":
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    card = card_of(folder, "--base", BASE)
    assert (card.data.library_name, card.data.base_model_relation) == (library, relation)
    assert form in card.data.tags
    assert text in card.text
    assert "3 prompt tokens, `<p0>` to `<p2>`" in card.text or "is 3 tokens, `<p0>` to `<p2>`" in card.text
    assert "- differing texts: 0" in card.text
    assert "| 50.0 % |" in card.text


def test_a_serving_base_says_what_it_is(tmp_path: Path) -> None:
    manifest = {
        "form": "serving-base",
        "base": {"name_or_path": BASE, "revision": "c" * 40, "model_type": "llama"},
        "adapter": None,
        "format": "adept_ds-export/1",
        "prompt_tokens": ["<p0>", "<p1>"],
        "dtype": "fp32",
        "files": {},
        "versions": {},
    }
    (tmp_path / "adept_export.json").write_text(json.dumps(manifest))
    card = card_of(tmp_path)
    assert f"{BASE} with 2 more tokens" in card.text
    assert "Results" not in card.text


def test_a_fully_tuned_model_has_a_card(tmp_path: Path) -> None:
    model = get_adept_model(seeded(BACKBONES["t5-tied"]), FullConfig())
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path, "--base", BASE)
    assert (card.data.library_name, card.data.base_model_relation) == ("transformers", "finetune")
    assert "AutoModelForSeq2SeqLM" in card.text


def test_a_folder_without_a_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected an adapter \(adapter_config\.json\)"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="no such folder"):
        main([str(tmp_path / "nowhere")])
