"""Backbones filled weight by weight, in one process; on several ranks see tests/distributed/test_load.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from adept_ds.backbone.load import load_backbone
from adept_ds.backbone.quantization import QuantizedLinear
from adept_ds.backbone.sharding import prepare_disk
from adept_ds.config.run import ModelConfig
from adept_ds.errors import NodeError, UserError
from adept_ds.methods import Untuned
from adept_ds.model.adapted_model import AdaptedModel
from tests.models import llama_config, seeded

NAMES = ["llama", "codegen", "t5-tied", "t5-untied", "gpt2"]


@pytest.fixture
def saved(make_backbone, tmp_path: Path):
    """Save a small model by name, in several files; returns its folder."""

    def save(name: str, max_shard_size: str = "20KB") -> Path:
        make_backbone(name).save_pretrained(tmp_path / name, max_shard_size=max_shard_size)
        return tmp_path / name

    return save


def load(folder: Path, **settings):
    return load_backbone(ModelConfig(name_or_path=str(folder), **{"dtype": "fp32", "quantization": "nf4"} | settings))


def logits(backbone, **inputs) -> torch.Tensor:
    ids = torch.arange(2, 26).view(2, 12)
    if backbone.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :5]
    with torch.no_grad():
        return backbone(input_ids=ids, **inputs).logits


def in_fp8(x: torch.Tensor) -> torch.Tensor:
    scales = (x.abs().amax(-1, keepdim=True) / 448).clamp_min(1e-30)
    return (x / scales).to(torch.float8_e4m3fn).float() * scales


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quantization", ["nf4", "int8", "fp8"])
def test_the_model_is_the_plain_one_on_the_expanded_weights(saved, make_backbone, name: str, quantization: str) -> None:
    ours, plain = load(saved(name), quantization=quantization), make_backbone(name)
    for key, module in ours.named_modules():
        if isinstance(module, QuantizedLinear):
            weight = module.dense_weight()
            plain.get_submodule(key).weight.data = weight.t() if module.is_transposed else weight
            if quantization == "fp8":  # which rounds what the layers read, too
                plain.get_submodule(key).register_forward_pre_hook(lambda _, args: (in_fp8(args[0]),))
    # A last bit may turn a rounding to 8 bits.
    tolerance = {"rtol": 0, "atol": 1e-3} if quantization == "fp8" else {}
    torch.testing.assert_close(logits(ours), logits(plain), **tolerance)
    ours_tied = ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
    assert ours_tied == (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight)
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in ours.parameters())
    assert not any(buffer.is_meta for buffer in ours.buffers())


@pytest.mark.parametrize("double", [False, True])
def test_nf4_is_the_model_that_transformers_loads(tmp_path: Path, double: bool) -> None:
    # Rows of whole blocks: of others bitsandbytes' own layers read wrong scales on processors with AVX-512.
    config = llama_config(hidden_size=64, intermediate_size=128, initializer_range=0.3)
    seeded(lambda: LlamaForCausalLM(config)).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    for module in theirs.modules():
        if isinstance(module, Linear4bit):
            # Or its first evaluation repacks the weights on CPUs with AVX512-BF16, for a kernel that is fetched.
            module.support_avx512bf16_for_cpu = False
    torch.testing.assert_close(logits(load(tmp_path, double_quantization=double)), logits(theirs))


def test_a_quantised_model_counts_the_weights_that_it_stands_for(saved, make_backbone) -> None:
    _, total = AdaptedModel(load(saved("llama")), Untuned()).count_parameters()
    assert total == sum(parameter.numel() for parameter in make_backbone("llama").parameters())


def test_generation_settings_are_read(saved) -> None:
    folder = saved("llama")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"top_k": 7}))
    assert load(folder).generation_config.top_k == 7


def test_a_checkpoint_of_the_model_below_the_head_is_read(make_backbone, tmp_path: Path) -> None:
    model = make_backbone("gpt2")
    model.transformer.save_pretrained(tmp_path / "base")
    assert torch.equal(load(tmp_path / "base").get_input_embeddings().weight, model.transformer.wte.weight)


def test_a_missing_weight_is_named(saved) -> None:
    folder = saved("llama", "1GB")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"lack 1 of the weights .* model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


@pytest.mark.parametrize("key", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_a_weight_of_another_shape_is_named(saved, key: str) -> None:
    folder = saved("llama", "1GB")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {key: torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=rf"{key} has shape \[3\], expected"):
        load(folder)


def test_a_folder_without_safetensors_is_refused(saved) -> None:
    folder = saved("llama", "1GB")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load(folder)


@pytest.mark.parametrize("quantization", ["nf4", "fp8"])
def test_the_cache_is_written_once_and_read_after(saved, tmp_path: Path, quantization: str) -> None:
    folder, cache = saved("llama"), tmp_path / "cache"
    first = load(folder, quantized_cache=str(cache), quantization=quantization)
    (entry,) = cache.iterdir()
    # If the second load converted anew, it would not see this.
    (file,) = entry.iterdir()
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: torch.zeros_like(tensors[name])}, file)
    second = load(folder, quantized_cache=str(cache), quantization=quantization)
    assert not second.get_submodule(name.removesuffix(".weight")).dense_weight().any()
    down = "model.layers.0.mlp.down_proj"
    assert torch.equal(first.get_submodule(down).dense_weight(), second.get_submodule(down).dense_weight())


def test_another_checkpoint_or_scheme_has_a_cache_of_its_own(saved, tmp_path: Path) -> None:
    folder, cache = saved("llama", "1GB"), tmp_path / "cache"
    load(folder, quantized_cache=str(cache))
    load(folder, quantized_cache=str(cache), double_quantization=True)
    load(folder, quantized_cache=str(cache), dtype="bf16")
    assert len(list(cache.iterdir())) == 3
    tensors = load_file(folder / "model.safetensors")
    save_file({key: tensor + 0.5 for key, tensor in tensors.items()}, folder / "model.safetensors")
    load(folder, quantized_cache=str(cache))
    assert len(list(cache.iterdir())) == 4


def test_a_half_written_cache_is_not_read(saved, tmp_path: Path) -> None:
    folder, cache = saved("llama"), tmp_path / "cache"
    load(folder, quantized_cache=str(cache))
    (entry,) = cache.iterdir()
    half = entry.rename(cache / f".{entry.name}.1.tmp")
    (file,) = half.iterdir()
    file.write_bytes(b"cut short")
    load(folder, quantized_cache=str(cache))
    assert entry.is_dir()


def test_a_buffer_holds_the_largest_part_and_there_are_some_for_each_matrix_of_a_layer(
    make_backbone, tmp_path: Path
) -> None:
    backbone = make_backbone("llama")
    largest = max(parameter.numel() for parameter in backbone.parameters())
    section = {"device": "nvme", "nvme_path": str(tmp_path)}
    first, second = dict(section), dict(section)
    prepare_disk(first, backbone, 3)
    prepare_disk(second, backbone, 3)
    assert 3 * (first["buffer_size"] - 1) < largest <= 3 * first["buffer_size"]
    assert first["buffer_count"] >= 7  # four of the attention's, three of the feed-forward part's
    assert len({first["nvme_path"], second["nvme_path"], str(tmp_path)}) == 3
    assert Path(first["nvme_path"]).parent == tmp_path
    with pytest.raises(UserError, match=rf"buffer_size is 10, and a rank's part .* has {largest} elements"):
        prepare_disk(section | {"buffer_size": 10}, backbone, 1)


def test_a_folder_that_cannot_be_written_to_is_told(make_backbone) -> None:
    with pytest.raises(NodeError, match=r"nvme_path is '/proc/self', where .* cannot write past the cache"):
        prepare_disk({"device": "nvme", "nvme_path": "/proc/self"}, make_backbone("llama"), 1)
