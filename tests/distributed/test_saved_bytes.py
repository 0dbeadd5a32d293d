"""What a frozen backbone keeps for the backward pass on two ZeRO-3 ranks, beside plain PyTorch."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.conftest import RunRanks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bytes_by_variant(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    folder = tmp_path_factory.mktemp("depths")
    for layers in (1, 3):
        torch.manual_seed(0)
        shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
        LlamaForCausalLM(LlamaConfig(vocab_size=400, num_hidden_layers=layers, **shape)).save_pretrained(
            folder / str(layers)
        )
    arguments = (str(folder / "1"), str(folder / "3"))
    result = run_ranks(2, "tests/distributed/saved_bytes.py", None, *arguments)
    assert result.returncode == 0, result.stdout[-4000:]
    (found,) = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    return found


@pytest.mark.parametrize("variant", ["ours", "ours, nf4"])
def test_a_frozen_layer_keeps_no_more_than_plain_pytorch(bytes_by_variant: dict[str, float], variant: str) -> None:
    assert 0 < bytes_by_variant[variant] <= bytes_by_variant["plain"] < bytes_by_variant["deepspeed's linear"]


@pytest.mark.parametrize("variant", ["ours", "ours, nf4"])
def test_a_checkpointed_layer_keeps_its_input_alone(bytes_by_variant: dict[str, float], variant: str) -> None:
    assert bytes_by_variant[f"{variant}, checkpointed"] <= 4 * 576 * 1.01
