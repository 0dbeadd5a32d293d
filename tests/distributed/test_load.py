"""What a rank holds while a backbone is loaded in shards, in 4 bits and plain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from tests.conftest import RunRanks
from tests.ranks import REPOSITORY
from tests.test_load_families import FAMILIES, saved

pytestmark = pytest.mark.slow
MB = 2**20


@pytest.fixture(scope="module")
def billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 1.1 billion parameters in five files; its rows repeat, which no figure here depends on."""
    return write_checkpoint(
        LlamaConfig(
            vocab_size=32000,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            architectures=["LlamaForCausalLM"],
        ),
        tmp_path_factory.mktemp("billion"),
    )


def write_checkpoint(config: PreTrainedConfig, folder: Path) -> Path:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    weight_map, pending = {}, {}
    # Tied ones once; experts apart, as the hub has them.
    parameters = revert_weight_conversion(model, dict(model.named_parameters()))
    for name, tensor in parameters.items():
        row = torch.randn(tensor.shape[-1], dtype=torch.bfloat16)
        pending[name] = row.expand(tensor.shape).contiguous()
        if sum(tensor.nbytes for tensor in pending.values()) > 400 * MB or len(weight_map) + len(pending) == len(
            parameters
        ):
            file = f"model-{len(set(weight_map.values())):05d}.safetensors"
            save_file(pending, folder / file)
            weight_map |= dict.fromkeys(pending, file)
            pending = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)
    return folder


def load_on(run_ranks: RunRanks, ranks: int, model: Path, quantization: str, warm_up: Path) -> list[dict[str, Any]]:
    script = "tests/distributed/load_rank.py"
    result = run_ranks(ranks, script, None, str(model), quantization, str(warm_up))
    assert result.returncode == 0, result.stdout[-4000:]
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(found) == ranks
    return found


@pytest.mark.parametrize(("ranks", "quantization"), [(4, "nf4"), (2, "none")])
def test_a_rank_never_holds_more_than_its_part_and_one_layer(
    billion: Path, ranks: int, quantization: str, tiny_llama: Path, run_ranks: RunRanks
) -> None:
    layer = 2 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192)
    for rank in load_on(run_ranks, ranks, billion, quantization, tiny_llama):
        assert rank["own"] == pytest.approx(rank["whole"] / ranks, rel=1e-3)
        assert rank["peak"] < rank["own"] + layer, rank
        assert rank["peak"] < 0.6 * rank["whole"]


def test_no_more_is_held_where_experts_are_stacked_than_two_layers(
    tiny_llama: Path, run_ranks: RunRanks, tmp_path: Path
) -> None:
    """The experts' tensors of one layer, and what they are stacked into."""
    sizes = {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 6, "num_local_experts": 8}
    config = MixtralConfig(vocab_size=8000, **sizes, num_attention_heads=16, num_key_value_heads=4)
    layer = 2 * 8 * 3 * 1024 * 3584
    for rank in load_on(run_ranks, 2, write_checkpoint(config, tmp_path), "none", tiny_llama):
        assert rank["own"] == pytest.approx(rank["whole"] / 2, rel=1e-3)
        assert rank["peak"] < rank["own"] + 2 * layer, rank


def test_four_bits_a_weight_and_a_half(tiny_llama: Path, run_ranks: RunRanks, tmp_path: Path) -> None:
    """SmolLM2-135M's shape, on 2 ranks: its table stays in 16 bits."""
    shape = json.loads((REPOSITORY / "adept_ds/backbone/architectures/smollm2-135m-instruct.json").read_text())
    model = write_checkpoint(AutoConfig.for_model(**shape), tmp_path)
    table = 49152 * 576
    for rank in load_on(run_ranks, 2, model, "nf4", tiny_llama):
        assert rank["dense"] == 2 * 134_515_008
        linear = 134_515_008 - table - 61 * 576
        assert rank["own"] == pytest.approx((2 * table + 61 * 2 * 576 + linear * 4.5 / 8) / 2, rel=1e-3)


def test_a_sharded_backbone_is_the_whole_one_to_the_bit(run_ranks: RunRanks, tmp_path: Path) -> None:
    """Of families whose tensors have other names in the files, or are stacked or transposed on the way."""
    folders = {name: str(saved(name, tmp_path / name, torch.float32)[0]) for name in FAMILIES}
    result = run_ranks(2, "tests/distributed/load_families_rank.py", None, *folders.values())
    assert result.returncode == 0, result.stdout[-4000:]
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('["')]
    expected = [[folder, quantization, True, [], True] for folder in folders.values() for quantization in (None, "nf4")]
    assert sorted(found, key=str) == sorted(2 * expected, key=str)
