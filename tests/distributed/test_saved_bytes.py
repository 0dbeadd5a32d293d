"""What a frozen backbone keeps for the backward pass on two ZeRO-3 ranks, beside plain PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.real_runs import REPOSITORY, free_port

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bytes_by_variant(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    folder = tmp_path_factory.mktemp("depths")
    for layers in (1, 3):
        torch.manual_seed(0)
        shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
        LlamaForCausalLM(LlamaConfig(vocab_size=400, num_hidden_layers=layers, **shape)).save_pretrained(
            folder / str(layers)
        )
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "tests/distributed/saved_bytes.py", str(folder / "1"), str(folder / "3")],
            cwd=REPOSITORY,
            env=environment | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)[-4000:]
    return json.loads(outputs[0].splitlines()[-1])


@pytest.mark.parametrize("variant", ["ours", "ours, nf4"])
def test_a_frozen_layer_keeps_no_more_than_plain_pytorch(bytes_by_variant: dict[str, float], variant: str) -> None:
    assert 0 < bytes_by_variant[variant] <= bytes_by_variant["plain"] < bytes_by_variant["deepspeed's linear"]


@pytest.mark.parametrize("variant", ["ours", "ours, nf4"])
def test_a_checkpointed_layer_keeps_its_input_alone(bytes_by_variant: dict[str, float], variant: str) -> None:
    assert bytes_by_variant[f"{variant}, checkpointed"] <= 4 * 576 * 1.01
