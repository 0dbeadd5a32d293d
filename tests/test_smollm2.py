"""Every method on a real model: it learns, and comes back from its file as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from adept_ds.backbone.load import load_backbone
from adept_ds.config.method import AttemptConfig, FullConfig, MethodConfig, PromptTuningConfig
from adept_ds.config.run import DataConfig, ModelConfig
from adept_ds.data.problems import load_examples
from adept_ds.model.adapted_model import AdaptedModel, get_adept_model
from adept_ds.storage.adapter_folder import save_adapter
from tests.test_methods import METHODS, OF_CAUSAL_MODELS, take_steps

pytestmark = pytest.mark.slow

RATES = {"soft_prompt": 0.01, "network": 0.003, "adapter": 0.003, "side": 0.003, "backbone": 1e-5}
LENGTH = METHODS["attempt"].num_virtual_tokens


@pytest.fixture(scope="module")
def problem(smollm2: Path) -> Tensor:
    """The end of one bundled problem, its solution, as ids [1, S]."""
    example = load_examples(DataConfig(), "train")[0]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return tokenizer(example.prompt + example.target, return_tensors="pt").input_ids[:, -48:]


@pytest.fixture(scope="module")
def sources(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Prompts of two source tasks: rows of the table."""
    table = backbone_of(smollm2).get_input_embeddings().weight
    facts = {"name_or_path": "any", "hidden_size": table.shape[1], "vocab_size": len(table)}
    folders = [tmp_path_factory.mktemp("source") for _ in range(2)]
    for number, folder in enumerate(folders):
        prompt = {"soft_prompt": table[1000 * number :][:LENGTH].detach().clone()}
        config = PromptTuningConfig(num_virtual_tokens=LENGTH)
        save_adapter(folder, config, prompt, {**facts, "embedding_fingerprint": None}, {})
    return tuple(map(str, folders))


def backbone_of(folder: Path) -> PreTrainedModel:
    return load_backbone(ModelConfig(name_or_path=str(folder), dtype="fp32"))


def logits(model: AdaptedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("name", [*dict.fromkeys(METHODS[method].name for method in OF_CAUSAL_MODELS), "full"])
def test_a_method_learns_a_solution_and_is_saved(
    smollm2: Path, problem: Tensor, sources: tuple[str, ...], tmp_path: Path, name: str
) -> None:
    config: MethodConfig = FullConfig() if name == "full" else METHODS[name]
    if isinstance(config, AttemptConfig):
        config = config.model_copy(update={"sources": sources})
    model = get_adept_model(backbone_of(smollm2), config).train()
    losses = take_steps(model, {"input_ids": problem, "labels": problem}, 5, RATES)
    assert losses[-1] < losses[0]

    expected = logits(model, problem)
    model.save_pretrained(tmp_path)
    if config.saves_model:
        loaded = get_adept_model(backbone_of(tmp_path), config)
    else:
        loaded = AdaptedModel.from_pretrained(backbone_of(smollm2), tmp_path)
    assert torch.equal(logits(loaded, problem), expected)
