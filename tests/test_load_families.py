"""Backbones of many families against `from_pretrained`: the same weights in the same precision, whole and quantised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from adept_ds.backbone.load import load_architecture, load_backbone
from adept_ds.backbone.quantization import QuantizedLinear
from adept_ds.config.run import ModelConfig
from adept_ds.errors import UserError
from tests.models import seeded

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 0}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "moe_k": 2}
EXPERTS |= {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
EXPERTS |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": GPT,  # Conv1D
    "gpt_neox": {},  # a head of another name
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"num_kv_heads": 1},  # linear layers of its own class
    "gemma2": {"head_dim": 8},
    "phi3": {},
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
    "olmoe": EXPERTS,
    "gpt_oss": EXPERTS | {"layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v3": EXPERTS | LATENT | {"num_key_value_heads": 4},  # a router's persistent buffer
    "ernie4_5_moe": EXPERTS,  # weights that stay in fp32
    "jamba": EXPERTS | {"mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "bart": BART,  # a persistent buffer that old checkpoints lack
    "marian": BART,  # positions that no checkpoint has
}
TEXT = SIZES | {"vocab_size": 120, "head_dim": 8}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
COMPOSITES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("Gemma3", {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4}),
    "llava": (
        "Llava",
        {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": VISION | {"model_type": "clip_vision_model"},
            "image_token_index": 100,
        },
    ),
}


def build(config: Any, auto: Any) -> PreTrainedModel:
    """With no weight or persistent buffer left at zero or one."""
    model = auto.from_config(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not name.endswith("embed_positions.weight"):
                tensor.add_(torch.randn_like(tensor) * 0.05)
    return model


def saved(name: str, folder: Path, dtype: torch.dtype) -> tuple[Path, Any]:
    config = AutoConfig.for_model(name, **SIZES | FAMILIES[name])
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    # Many files, so that tensors that belong together lie apart.
    seeded(lambda: build(config, auto)).to(dtype).save_pretrained(folder, max_shard_size="40KB")
    return folder, auto


def load(folder: Path, dtype: str = "fp32", quantization: str | None = None) -> PreTrainedModel:
    settings = {"name_or_path": str(folder), "dtype": dtype, "quantization": quantization}
    return load_backbone(ModelConfig.model_validate(settings), show_progress=False)


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(4, 24).view(2, 10)
    inputs = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_weights_and_buffers_are_those_of_transformers_to_the_bit(name: str, dtype: str, tmp_path: Path) -> None:
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    folder, auto = saved(name, tmp_path, precision)
    ours, theirs = load(folder, dtype), auto.from_pretrained(folder, dtype=precision)
    actual, expected = ours.state_dict(), theirs.state_dict()
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, key
        assert torch.equal(actual[key], value), key
    assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_settings_of_generation_in_an_old_config_are_read(name: str, tmp_path: Path) -> None:
    folder, auto = saved(name, tmp_path, torch.float32)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_beams": 3}))
    assert load(folder).generation_config.num_beams == 3
    assert load(folder).generation_config == auto.from_pretrained(folder).generation_config


@pytest.mark.parametrize("name", FAMILIES)
def test_a_quantised_model_is_the_plain_one_on_its_own_weights_quantised(name: str, tmp_path: Path) -> None:
    folder, auto = saved(name, tmp_path, torch.float32)
    ours, plain = load(folder, quantization="nf4"), auto.from_pretrained(folder)
    for key, layer in ours.named_modules():
        if isinstance(layer, QuantizedLinear):
            weight = plain.get_submodule(key).weight
            own = layer.storage_of(weight.data, torch.device("cpu"))
            dense = layer.scheme.dequantize(own, torch.Size((layer.out_features, layer.in_features)))
            weight.data = (dense.t() if layer.is_transposed else dense).contiguous()
    torch.testing.assert_close(logits(ours), logits(plain))


def test_the_weights_of_experts_that_were_stacked_can_be_quantised_no_more_and_that_is_said(tmp_path: Path, capsys):
    folder, _ = saved("mixtral", tmp_path, torch.float32)
    load_backbone(ModelConfig(name_or_path=str(folder), dtype="fp32", quantization="nf4"))
    said = capsys.readouterr().err
    assert "parameters (" in said
    assert "stay in float32, such as model.layers.0.mlp.experts.gate_up_proj" in said


@pytest.mark.parametrize("name", COMPOSITES)
def test_of_a_model_with_a_vision_part_the_language_model_is_loaded(name: str, tmp_path: Path, capsys) -> None:
    family, settings = COMPOSITES[name]
    config = getattr(transformers, f"{family}Config")(**settings)
    whole = seeded(lambda: getattr(transformers, f"{family}ForConditionalGeneration")(config))
    whole.save_pretrained(tmp_path)
    settings = ModelConfig(name_or_path=str(tmp_path), dtype="fp32")
    assert load_architecture(settings).hidden_size == 32
    assert torch.equal(logits(load_backbone(settings)), logits(whole))
    assert "ForCausalLM has no place for are left out: " in capsys.readouterr().err


def test_a_model_that_has_no_language_model_is_refused_by_name(tmp_path: Path) -> None:
    transformers.ViTConfig(**VISION).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.name_or_path is .* type 'vit', which .* expected a causal or an enc"):
        load_architecture(ModelConfig(name_or_path=str(tmp_path)))


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes", "gptq", "awq", "compressed-tensors", "mxfp4"])
def test_a_quantised_checkpoint_is_refused_with_what_to_do(method: str, tmp_path: Path) -> None:
    folder, _ = saved("llama", tmp_path, torch.float32)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "load_in_4bit": True, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=rf"quantised already \({method} .* set model\.quantization to 'nf4', 'int8' or 'fp8'"
    ):
        load_architecture(ModelConfig(name_or_path=str(folder)))


def changed(folder: Path, change: dict[str, torch.Tensor | None]) -> Path:
    """A checkpoint in one file with other tensors; None takes one away."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, {"format": "pt"})
    return folder


@pytest.fixture
def olmoe(tmp_path: Path) -> Path:
    config = AutoConfig.for_model("olmoe", **SIZES | EXPERTS)
    seeded(lambda: AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path)
    return tmp_path


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm_head.weight": None}, r"lack 1 of the weights of OlmoeForCausalLM, the first is lm_head\.weight"),
        ({EXPERT: None}, r"layers\.1\.mlp\.experts\.gate_up_proj \(made of 7 tensors .* cannot be made"),
        ({EXPERT: torch.zeros(3, 3)}, r"layers\.1\.mlp\.experts\.gate_up_proj \(made of 8 tensors .* cannot be made"),
        ({"model.norm.weight": torch.zeros(3)}, r"model\.norm\.weight has shape \[3\], expected \[32\]"),
        (
            {"model.norm.weight": torch.zeros(32).to(torch.float8_e4m3fn)},
            r"model\.norm\.weight is of type F8_E4M3: the checkpoint is quantised already",
        ),
    ],
)
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(olmoe: Path, change, message: str, quantization) -> None:
    with pytest.raises(UserError, match=rf"model\.name_or_path is .*{message}"):
        load(changed(olmoe, change), quantization=quantization)


def test_a_tensor_without_a_place_is_named(olmoe: Path, capsys) -> None:
    load_backbone(ModelConfig(name_or_path=str(changed(olmoe, {"score.weight": torch.zeros(2, 32)})), dtype="fp32"))
    assert (
        "that OlmoeForCausalLM has no place for are left out: 1, the first is score.weight" in capsys.readouterr().err
    )


def test_a_model_without_layers_to_quantise_is_refused(tmp_path: Path) -> None:
    config = transformers.MambaConfig(**SIZES | {"state_size": 4})
    seeded(lambda: AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.quantization is 'nf4', .* MambaForCausalLM has none"):
        load(tmp_path, quantization="nf4")
