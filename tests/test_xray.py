"""The X-ray of adapters: constructed faults are found and named, a healthy adapter has none."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5ForConditionalGeneration,
)

from adept_ds.backbone.weight_sources import WeightFiles
from adept_ds.cli.xray import main
from adept_ds.config.method import (
    AdeptConfig,
    DeptConfig,
    LoraConfig,
    MethodConfig,
    MptConfig,
    PromptEmbeddingConfig,
    PromptTuningConfig,
    PTuningConfig,
)
from adept_ds.config.run import ModelConfig
from adept_ds.errors import UserError
from adept_ds.evaluation import xray as xray_module
from adept_ds.evaluation.xray import XRay, xray
from adept_ds.model.adapted_model import AdaptedModel, get_adept_model
from adept_ds.reports.xray_report import write_xray
from tests.models import llama_config, save, seeded
from tests.test_adapter_folder import edit_config, rewrite_tensors

TOKENS = 99
ZERO_ROW = "Tokens with a row of zeros, not among those moved most and least: 1."


@pytest.fixture(scope="module")
def base(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with more rows than tokens."""
    model = seeded(lambda: LlamaForCausalLM(llama_config(vocab_size=104, initializer_range=0.3)))
    return save(model, tokenizer, tmp_path_factory.mktemp("base"))


def backbone_of(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base)


def adapter(base: Path, folder: Path, config: MethodConfig, **values: Any) -> Path:
    """Save an adapter with small random values, and those given by their names (dots as two underscores)."""
    model = get_adept_model(backbone_of(base), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.trainable_parameters().items():
            nn.init.normal_(parameter, std=0.1)
            given = values.get(name.replace(".", "__"))
            if given is not None:
                parameter.copy_(given(parameter) if callable(given) else given)
    model.save_pretrained(folder)
    return folder


def seen(adapter: Path, base: Path) -> XRay:
    return xray(adapter, ModelConfig(name_or_path=str(base), dtype="fp32"))


def rows_of(base: Path) -> Tensor:
    return backbone_of(base).get_input_embeddings().weight.detach()


def test_a_healthy_adapter_has_no_warnings(base: Path, tmp_path: Path) -> None:
    found = seen(adapter(base, tmp_path, AdeptConfig(num_virtual_tokens=3, bottleneck=4)), base)
    assert found.warnings == ()
    assert [unit.state for unit in found.units] == ["works"] * 4
    assert found.tokens == TOKENS
    assert found.notes == ("Rows of the table that belong to no token, left out: 5.", ZERO_ROW)


def test_offsets_and_lengths_are_those_of_the_model(base: Path, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path, AdeptConfig(num_virtual_tokens=3, bottleneck=4))
    embedding = AdaptedModel.from_pretrained(backbone_of(base), folder).method.embedding
    with torch.no_grad():
        before, after = embedding.table.weight[:TOKENS], embedding(torch.arange(TOKENS))
        prompt = embedding(104 + torch.arange(3))
    found = seen(folder, base)
    torch.testing.assert_close(found.rows, before.norm(dim=1))
    torch.testing.assert_close(found.offsets, (after - before).norm(dim=1))
    assert torch.equal(before[0], torch.zeros(32))  # of padding, which has no length to compare with
    assert ZERO_ROW in found.notes
    shares = (after - before).norm(dim=1)[1:] / before.norm(dim=1)[1:]
    assert found.moved_most[0].token.id == 1 + int(shares.argmax())
    assert found.moved_least[0].token.id == 1 + int(shares.argmin())
    assert [one.length for one in found.prompt] == pytest.approx(prompt.norm(dim=1).tolist())
    cosines = torch.cosine_similarity(prompt[:, None], before[None], dim=-1)
    assert [one.nearest[0].token.id for one in found.prompt] == cosines.argmax(1).tolist()
    after = torch.nn.functional.normalize(after, dim=1)
    pairs = (after @ after.T).fill_diagonal_(-2)
    torch.testing.assert_close(found.nearest[:, 1], pairs.max(1).values)
    assert found.mean_cosine[1] == pytest.approx(float(pairs.fill_diagonal_(0).sum() / (TOKENS * (TOKENS - 1))))


def test_a_dead_a_linear_and_an_idle_unit_are_named(base: Path, tmp_path: Path) -> None:
    def idle(w_up: Tensor) -> Tensor:
        return w_up.clone().index_fill(0, torch.tensor([3]), 0.0)

    bias = torch.tensor([0.0, -100.0, 100.0, 0.0])
    config = AdeptConfig(num_virtual_tokens=3, bottleneck=4)
    found = seen(adapter(base, tmp_path, config, network__b1=bias, network__w_up=idle), base)
    assert [unit.state for unit in found.units] == ["works", "dead", "linear", "without effect"]
    assert [unit.woken for unit in found.units][1:3] == [0, TOKENS]
    assert "unit 2 of 4 is woken by no token: it does nothing" in found.warnings
    assert any(warning.startswith("unit 4 of 4 adds nothing") for warning in found.warnings)
    assert any(note.startswith("unit 3 of 4 is woken by every token") for note in found.notes)


def test_an_offset_of_zero_is_one_warning(base: Path, tmp_path: Path) -> None:
    zero = {"network__w_up": torch.zeros_like, "network__b2": torch.zeros_like}
    found = seen(adapter(base, tmp_path, AdeptConfig(num_virtual_tokens=3, bottleneck=4), **zero), base)
    assert found.warnings == ("the offset is zero for every token: it does nothing, as before the first step",)


def test_tokens_that_fall_together_are_named(base: Path, tmp_path: Path) -> None:
    """f takes a row's part along the difference of two rows away: the one unit wakes for one of them alone."""
    rows = rows_of(base)
    first, second = 40, 70
    difference = rows[first] - rows[second]
    direction = difference / difference.square().sum()
    # The unit is 1 at the first row and 0 at the second, and takes the difference off where it is 1.
    values = {
        "network__w_down": direction[:, None],
        "network__b1": -(rows[second] @ direction)[None],
        "network__w_up": -difference[None],
        "network__b2": torch.zeros_like,
    }
    found = seen(adapter(base, tmp_path, AdeptConfig(num_virtual_tokens=1, bottleneck=1), **values), base)
    pair = found.pairs[0]
    assert {pair.first.id, pair.second.id} == {first, second}
    assert (pair.first.text, pair.second.text) in {("E", "c"), ("c", "E")}
    assert pair.fallen
    assert pair.distances == pytest.approx((float(difference.norm()), 0.0), abs=1e-5)
    assert found.fallen == 1
    assert any(re.search(r"fall together.*: ('E' and 'c'|'c' and 'E')$", warning) for warning in found.warnings)


def test_a_shift_in_which_all_rows_drown_is_told(base: Path, tmp_path: Path) -> None:
    config = AdeptConfig(num_virtual_tokens=1, bottleneck=1)
    found = seen(adapter(base, tmp_path, config, network__b2=lambda b2: 1000 * torch.ones_like(b2)), base)
    assert found.mean_cosine[1] > 0.99
    assert any("drown" in warning for warning in found.warnings)
    assert any(warning.startswith("tokens fall together") and "more pairs" in warning for warning in found.warnings)


@pytest.mark.parametrize("config", [AdeptConfig(num_virtual_tokens=3), PromptTuningConfig(num_virtual_tokens=3)])
def test_a_prompt_that_has_run_away_is_told(base: Path, tmp_path: Path, config: MethodConfig) -> None:
    longest = rows_of(base)[:TOKENS].norm(dim=1).max()

    def away(prompt: Tensor) -> Tensor:
        changed = prompt.clone()
        changed[1] *= 40 * longest / changed[1].norm()
        return changed

    found = seen(adapter(base, tmp_path, config, soft_prompt=away), base)
    assert any(
        warning.startswith("1 of the prompt's 3 vectors are more than 10 times") and "up to 40 times" in warning
        for warning in found.warnings
    )


def test_rows_are_those_that_a_scaling_layer_returns(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Gemma multiplies by sqrt(d); the prompt is as long as the scaled rows."""
    shape = {"head_dim": 8, "initializer_range": 0.3}
    base = save(seeded(lambda: GemmaForCausalLM(llama_config(GemmaConfig, **shape))), tokenizer, tmp_path / "base")
    scaled = 32**0.5 * rows_of(base)
    folder = adapter(base, tmp_path / "adapter", PromptTuningConfig(num_virtual_tokens=2), soft_prompt=scaled[7:9])
    found = seen(folder, base)
    torch.testing.assert_close(found.rows, scaled.norm(dim=1))
    assert found.warnings == ()
    assert [vector.nearest[0].token.id for vector in found.prompt] == [7, 8]


def test_free_offsets_say_which_tokens_were_never_trained(base: Path, tmp_path: Path) -> None:
    def some(offsets: Tensor) -> Tensor:
        return offsets * (torch.arange(len(offsets)) < 30)[:, None]

    found = seen(adapter(base, tmp_path, PromptEmbeddingConfig(num_virtual_tokens=2), offset__weight=some), base)
    assert found.units == ()
    assert f"Tokens without an offset, since no training text had them: {TOKENS - 30} of {TOKENS}." in found.notes


def test_prompts_of_several_tasks_and_of_an_encoder_are_named(base: Path, tmp_path: Path) -> None:
    mpt = seen(adapter(base, tmp_path / "mpt", MptConfig(num_virtual_tokens=2, tasks=("rte", "cola"))), base)
    assert [vector.name for vector in mpt.prompt] == ["rte 1", "rte 2", "cola 1", "cola 2"]
    encoded = seen(adapter(base, tmp_path / "p_tuning", PTuningConfig(num_virtual_tokens=2, hidden_size=4)), base)
    assert [vector.name for vector in encoded.prompt] == ["1", "2"]
    assert encoded.offsets is None


def test_what_was_sampled_is_said(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xray_module, "PRODUCTS", 20 * TOKENS * 32)
    monkeypatch.setattr(xray_module, "BLOCK", 16)
    folder = adapter(base, tmp_path, AdeptConfig(num_virtual_tokens=3, bottleneck=4))
    found = seen(folder, base)
    assert found.nearest.shape == (20, 2)
    assert "for 20 of them: the 10 that are moved most, and 10 drawn at random" in found.notes[-1]
    monkeypatch.undo()
    whole = seen(folder, base)
    assert (found.units, found.prompt) == (whole.units, whole.prompt)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (DeptConfig(num_virtual_tokens=2), "goes by a token's position.*analyse sizes"),
        (LoraConfig(), "changes the backbone's layers.*adept-ds try"),
    ],
)
def test_methods_that_are_no_function_of_the_token_are_refused(
    base: Path, tmp_path: Path, config: MethodConfig, reason: str
) -> None:
    folder = adapter(base, tmp_path, config)
    # Before anything of the backbone is asked for.
    with pytest.raises(UserError, match=f"method '{config.name}'.*{reason}"):
        seen(folder, tmp_path / "nowhere")


def test_a_wrong_or_missing_base_is_told(base: Path, tiny_llama: Path, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path / "adapter", AdeptConfig())
    with pytest.raises(UserError, match="no such folder"):
        seen(folder, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"with vocabulary size 104; .* has 400"):
        seen(folder, tiny_llama)
    edit_config(folder, lambda config: config.update(backbone={}))
    with pytest.raises(UserError, match="does not say which backbone"):
        main([str(folder), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_weights_of_layers_are_not_read(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    get = WeightFiles.__getitem__
    monkeypatch.setattr(WeightFiles, "__getitem__", lambda self, name: (read.append(name), get(self, name))[1])
    seen(adapter(base, tmp_path, AdeptConfig()), base)
    assert read == ["model.embed_tokens.weight"]


def test_tensors_that_do_not_fit_the_settings_are_told(base: Path, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path, AdeptConfig())
    rewrite_tensors(folder, lambda tensors: tensors.pop("network.b1"))
    with pytest.raises(UserError, match=r"network\.b1 is missing"):
        seen(folder, base)


def test_an_encoder_decoders_table_is_looked_at(tiny_t5: Path, tmp_path: Path) -> None:
    model = get_adept_model(T5ForConditionalGeneration.from_pretrained(tiny_t5), AdeptConfig(num_virtual_tokens=2))
    model.save_pretrained(tmp_path)
    assert "the offset is zero for every token" in seen(tmp_path, tiny_t5).warnings[0]


def test_the_command_writes_a_page_and_a_file(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bias = torch.tensor([0.0, -100.0])
    folder = adapter(base, tmp_path / "adapter", AdeptConfig(num_virtual_tokens=3, bottleneck=2), network__b1=bias)
    main([str(folder), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "warning: unit 2 of 2 is woken by no token: it does nothing" in printed
    values = json.loads((tmp_path / "out" / "xray.json").read_text())
    assert values["units"][1]["state"] == "dead"
    assert values["offset_lengths"]["0%"] <= values["offset_lengths"]["50%"] <= values["offset_lengths"]["100%"]
    assert values["neighbours_looked_for"] == TOKENS
    page = (tmp_path / "out" / "xray.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "unit 2 of 2 is woken by no token" in page


def test_the_page_of_a_method_without_offsets_has_what_there_is(base: Path, tmp_path: Path) -> None:
    found = seen(adapter(base, tmp_path, PromptTuningConfig(num_virtual_tokens=3)), base)
    page = write_xray(found, tmp_path / "out").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "Nothing is wrong." in page
    assert "Units of the bottleneck" not in page
