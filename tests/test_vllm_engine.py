"""Evaluation by a real vLLM, in its own environment: the same samples as those of the model here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from adept_ds.config.method import AdeptConfig
from adept_ds.config.run import EvalConfig, ModelConfig, RunConfig
from adept_ds.distributed import World
from adept_ds.errors import UserError
from adept_ds.evaluation.decoders import check_engine, open_decoder
from adept_ds.evaluation.tuned import open_tuned
from adept_ds.formats import Example
from adept_ds.model.adapted_model import get_adept_model
from adept_ds.serving.vllm_decode import Prompts, decode
from adept_ds.serving.vllm_environment import find_vllm
from tests.models import llama_config, save, seeded, t5_config, talkative_t5
from tests.test_export import SIZE, tokenizer

PROMPTS = ["The capital of France is", "def add(a, b):\n    return", "Who wrote Faust?", "1, 2, 3, 4,"]
EXAMPLES = [Example(str(number), text, "", chat=number == 2) for number, text in enumerate(PROMPTS)]


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    # vLLM's attention on CPUs wants heads of 32 or more.
    config = llama_config(
        vocab_size=SIZE, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3
    )
    return save(seeded(lambda: LlamaForCausalLM(config)), tokenizer(is_t5=False), tmp_path / "backbone")


@pytest.fixture
def adapter(backbone: Path, tmp_path: Path) -> Path:
    model = get_adept_model(LlamaForCausalLM.from_pretrained(backbone), AdeptConfig(num_virtual_tokens=5, bottleneck=3))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.trainable_parameters().values():
        parameter.data = parameter.data + torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def run(backbone: Path, tmp_path: Path, engine: str, **generation: object) -> RunConfig:
    decoding = {"max_new_tokens": 24, "stop": ("\n",), **generation}
    return RunConfig.model_validate(
        {
            "model": {"name_or_path": str(backbone), "dtype": "fp32"},
            "data": {"max_prompt_length": 60, "max_length": 90},
            "train": {"max_steps": 1, "warmup_steps": 0},
            "eval": {"generation": decoding, "engine": engine, "export_cache": str(tmp_path / "cache")},
        }
    )


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_writes_what_is_written_here(
    backbone: Path, adapter: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        find_vllm()
    except UserError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    texts = {}
    for engine in ("transformers", "vllm"):
        settings = run(backbone, tmp_path, engine, do_sample=False)
        decoder = open_decoder(settings, open_tuned(settings.model, adapter), world)
        texts[engine] = [one.completion for one in decoder.samples(EXAMPLES, settings.eval.generation, settings.data)]
        assert decoder.engine["name"] == engine
    assert texts["vllm"] == texts["transformers"]
    assert len(set(texts["vllm"])) > 1
    (folder,) = (tmp_path / "cache").iterdir()
    assert json.loads((folder / "adept_export.json").read_text())["prompt_in"] == "none"
    options = {"model": str(folder), "dtype": "float32", "max_model_len": 64, "enforce_eager": True}
    prompts = Prompts([[5, 9, 40]] * 3, [1, 1, 2])
    (decoded,) = decode(find_vllm(), options, {"max_tokens": 12, "temperature": 1.0}, [prompts])
    written = decoded.written
    assert written[0].ids == written[1].ids != written[2].ids


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    model = talkative_t5(t5_config(vocab_size=SIZE, initializer_factor=2.0))
    folder = save(model, tokenizer(is_t5=True), tmp_path / "t5")
    with pytest.raises(UserError, match="has no encoder-decoder models"):
        check_engine(EvalConfig(engine="vllm"), open_tuned(ModelConfig(name_or_path=str(folder), dtype="fp32"), None))


def test_without_vllm_the_message_says_how_it_is_installed(
    backbone: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ADEPT_VLLM_PYTHON", str(tmp_path / "python"))
    with pytest.raises(UserError, match=r"pip install vllm"):
        check_engine(EvalConfig(engine="vllm"), open_tuned(ModelConfig(name_or_path=str(backbone), dtype="fp32"), None))
