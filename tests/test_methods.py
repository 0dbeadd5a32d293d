"""What every method must do: train, count, save and load, give the backbone back, work on 4 bits, generate."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast, RwkvConfig, RwkvForCausalLM

from adept_ds.backbone import frozen_linear
from adept_ds.backbone.frozen_linear import FrozenLinear
from adept_ds.backbone.quantization import QuantizedLinear, Scheme, quantize_linears
from adept_ds.config.method import (
    CONSTANTS,
    AdapterConfig,
    AdapterDropConfig,
    AdeptConfig,
    AttemptConfig,
    BitFitConfig,
    DeptConfig,
    DptConfig,
    HyperDecoderConfig,
    HyperFormerConfig,
    Ia3Config,
    LoraConfig,
    LstConfig,
    MethodConfig,
    MptConfig,
    PrefixTuningConfig,
    PromptEmbeddingConfig,
    PromptTuningConfig,
    PTuningConfig,
    ResidualPromptConfig,
    VeraConfig,
)
from adept_ds.config.run import DataConfig, ModelConfig, RunConfig, TrainConfig
from adept_ds.config.schema import method_docs
from adept_ds.errors import UserError
from adept_ds.model.adapted_model import AdaptedModel, get_adept_model
from adept_ds.planner.meta_step import meta_model
from adept_ds.reports.runs import count_parameters
from adept_ds.storage.adapter_folder import load_adapter, save_adapter
from tests.models import EOS, PAD, TOKENS, VOCABULARY, WIDTH, causal, seeded
from tests.tolerances import assert_equal_up_to_rounding

Make = Callable[[str], PreTrainedModel]

METHODS: dict[str, MethodConfig] = {
    "adept": AdeptConfig(num_virtual_tokens=4, bottleneck=3),
    "pt": PromptTuningConfig(num_virtual_tokens=5),
    "dept": DeptConfig(num_virtual_tokens=3, rank=2, max_positions=12),
    "pt_embedding": PromptEmbeddingConfig(num_virtual_tokens=3),
    "p_tuning": PTuningConfig(num_virtual_tokens=4, hidden_size=8),
    "p_tuning-lstm": PTuningConfig(num_virtual_tokens=4, hidden_size=8, reparameterization="lstm"),
    "dpt": DptConfig(num_virtual_tokens=5, rank=3),
    "residual_pt": ResidualPromptConfig(num_virtual_tokens=4, bottleneck=6),
    "mpt": MptConfig(num_virtual_tokens=4, factor_init="ones"),
    "mpt-tasks": MptConfig(num_virtual_tokens=8, rank=2, tasks=("a", "b"), factor_init="ones"),
    "attempt": AttemptConfig(num_virtual_tokens=6, sources=("x", "y"), bottleneck=6, temperature=1.0),
    "attempt-tasks": AttemptConfig(
        num_virtual_tokens=6, sources=("x", "y"), bottleneck=6, temperature=1.0, tasks=("a", "b"), prompt_init="source"
    ),
    "prefix": PrefixTuningConfig(prefix_length=4),
    "prefix-projected": PrefixTuningConfig(prefix_length=4, projection=True, hidden_size=8),
    "lora": LoraConfig(rank=3, dropout=0.0),
    "ia3": Ia3Config(),
    "ia3-feed-forward": Ia3Config(feed_forward=True),
    "vera": VeraConfig(rank=5),
    "adapter": AdapterConfig(bottleneck=3),
    "adapter-tasks": AdapterConfig(bottleneck=3, tasks=("a", "b")),
    "adapter_drop": AdapterDropConfig(bottleneck=3, dropped_layers=1),
    "hyperformer": HyperFormerConfig(bottleneck=3, embedding_size=5, hidden_size=6),
    "hyperformer-tasks": HyperFormerConfig(bottleneck=3, embedding_size=5, hidden_size=6, tasks=("a", "b")),
    "hyperdecoder": HyperDecoderConfig(bottleneck=3, hidden_size=6),
    "hyperdecoder-mlp": HyperDecoderConfig(bottleneck=3, hidden_size=6, process_encoder=True),
    "bitfit": BitFitConfig(),
    "lst": LstConfig(reduction=2),
}
"""Every method but `full`, whose tests are in `test_full.py`."""
BACKBONES = ("llama", "codegen", "gpt2", "t5-tied")
MAIN = ("llama", "t5-tied")


OF_CAUSAL_MODELS = [name for name, config in METHODS.items() if config.name != "hyperdecoder"]
"""The others need an encoder."""


def on(backbones: Sequence[str], methods: Iterable[str] = METHODS) -> pytest.MarkDecorator:
    """Cells of the matrix of backbones and methods."""
    cells = [(n, m) for m in methods for n in backbones if n == "t5-tied" or m in OF_CAUSAL_MODELS]
    return pytest.mark.parametrize(("name", "method"), cells)


TASKS = torch.tensor([1, 0])
"""Of the two rows of every batch here, which matter to a method with prompts by task."""


@pytest.fixture(autouse=True)
def source_prompts(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of source tasks, which any backbone here takes, in the folders that the settings above name."""
    folder = tmp_path_factory.mktemp("sources")
    monkeypatch.chdir(folder)
    generator = torch.Generator().manual_seed(6)
    backbone = {"name_or_path": "any", "hidden_size": WIDTH, "vocab_size": VOCABULARY, "embedding_fingerprint": None}
    for name in ("x", "y"):
        prompt = {"soft_prompt": 0.3 * torch.randn(6, WIDTH, generator=generator)}
        save_adapter(folder / name, PromptTuningConfig(num_virtual_tokens=6), prompt, backbone, {})


def random_ids(rows: int, columns: int, seed: int = 4) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(seed))


def batch(model: AdaptedModel, rows: int = 2, columns: int = 7) -> dict[str, Tensor]:
    ids = random_ids(rows, columns)
    labels = random_ids(rows, 4, seed=5) if model.is_encoder_decoder else ids
    return {"input_ids": ids, "labels": labels, "task_ids": TASKS}


def far_from_start(model: AdaptedModel) -> AdaptedModel:
    """Move every trained value, so that the method has an effect."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def logits(model: AdaptedModel | PreTrainedModel, columns: int = 7, pads: int = 0) -> Tensor:
    """Logits of the last tokens that are read."""
    backbone = model.backbone if isinstance(model, AdaptedModel) else model
    ids = torch.cat([torch.full((2, pads), PAD), random_ids(2, columns)], 1)
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(pads + columns) >= pads).long().expand(2, -1)}
    if model is not backbone:
        inputs["task_ids"] = TASKS
    if backbone.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = random_ids(2, 4, seed=5)
        columns = 4
    elif model is backbone:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(**inputs).logits[:, -columns:]


def quantized(make_backbone: Make, name: str) -> PreTrainedModel:
    backbone, scheme = make_backbone(name).requires_grad_(False), Scheme("nf4")
    weights = {key: value.detach().clone() for key, value in backbone.named_parameters()}
    for key, layer in quantize_linears(backbone, scheme).items():
        layer.weight.copy_(scheme.quantize(weights[key], torch.device("cpu"), torch.float32))
    return backbone


RATES = {"soft_prompt": 0.01, "network": 0.003, "adapter": 0.03, "side": 0.003}


def take_steps(
    model: AdaptedModel, data: dict[str, Tensor], steps: int = 40, rates: dict[str, float] = RATES
) -> list[float]:
    named = model.trainable_parameters()
    groups = model.learning_rate_groups().items()
    optimizer = torch.optim.Adam([{"params": [named[n] for n in names], "lr": rates[g]} for g, names in groups])
    losses = []
    for _ in range(steps):
        loss = model(**data).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_no_method_is_left_out() -> None:
    assert {config.name for config in METHODS.values()} == method_docs().keys() - {"full"}


@on(MAIN)
def test_the_loss_falls_and_nothing_else_changes(make_backbone: Make, name: str, method: str) -> None:
    model = get_adept_model(make_backbone(name), METHODS[method]).train()
    trained = {id(parameter) for parameter in model.trainable_parameters().values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    frozen = {key: p.clone() for key, p in model.named_parameters() if id(p) not in trained}
    losses = take_steps(model, batch(model))
    # By how much is Adam's affair, whose first steps have the size of the rate however small a gradient is.
    assert losses[-1] < losses[0]
    after = dict(model.named_parameters())
    assert all(torch.equal(after[key], value) for key, value in frozen.items())


@on(["t5-tied"])
def test_what_is_not_trained_is_not_counted(make_backbone: Make, tmp_path: Path, name: str, method: str) -> None:
    model = get_adept_model(make_backbone(name), METHODS[method])
    model.save_pretrained(tmp_path)
    trained, _ = model.count_parameters()
    assert set(model.method.constants()) <= set(CONSTANTS)
    assert (load_adapter(tmp_path).trained_parameters, count_parameters(tmp_path)) == (trained, trained)


@on(MAIN)
def test_every_gradient_is_the_slope_of_the_loss(make_backbone: Make, name: str, method: str) -> None:
    """Along each tensor's gradient; along any direction where there is none, as there the loss must not change.

    A central difference comes as near to the slope as one likes when the step shrinks, until rounding outweighs it.
    """
    model = far_from_start(get_adept_model(make_backbone(name), METHODS[method])).train()
    data, generator = batch(model), torch.Generator().manual_seed(0)
    named = model.trainable_parameters()
    loss = model(**data).loss
    rounding = 16 * torch.finfo(loss.dtype).eps * float(loss.detach())
    for (key, parameter), gradient in zip(named.items(), torch.autograd.grad(loss, [*named.values()]), strict=True):
        random = torch.randn(parameter.shape, generator=generator)
        direction = gradient if float(gradient.norm()) > rounding else random
        direction = direction / direction.norm()
        slope = float((gradient * direction).sum())

        def difference(step: float, moved=parameter, direction=direction) -> float:
            start, ends = moved.detach().clone(), []
            with torch.no_grad():
                for sign in (1, -1):
                    moved.copy_(start + sign * step * direction)
                    ends.append(float(model(**data).loss))
                moved.copy_(start)
            return (ends[0] - ends[1]) / (2 * step)

        steps = [2.0**-power for power in range(4, 12)]
        close = (abs(difference(step) - slope) <= abs(slope) / 2 + rounding / step for step in steps)
        assert any(close), (key, slope, [difference(step) for step in steps])


@on(MAIN)
def test_a_4_bit_backbone_trains_as_a_plain_one_on_the_expanded_weights(
    make_backbone: Make, name: str, method: str
) -> None:
    backbones = quantized(make_backbone, name), make_backbone(name)
    layers = {key: m for key, m in backbones[0].named_modules() if isinstance(m, QuantizedLinear)}
    assert layers
    for key, layer in layers.items():
        backbones[1].get_submodule(key).weight.data = layer.dense_weight()
    results = []
    for backbone in backbones:
        model = far_from_start(get_adept_model(backbone, METHODS[method])).train()
        loss = model(**batch(model)).loss
        results.append((loss, torch.autograd.grad(loss, [*model.trainable_parameters().values()])))
    (loss, gradients), (expected, references) = results
    assert_equal_up_to_rounding(loss, expected)
    largest = max(float(reference.abs().max()) for reference in references)
    for gradient, reference in zip(gradients, references, strict=True):
        assert_equal_up_to_rounding(gradient, reference, largest)


def logits_with_every_result_rounded(model: AdaptedModel, generator: torch.Generator) -> Tensor:
    """What an fp32 model gives if each module's result is off by up to a rounding to bf16."""

    def off(module: nn.Module, args: object, output: object) -> object:
        if not isinstance(output, Tensor):
            return output
        return output * (
            1 + torch.finfo(torch.bfloat16).eps / 2 * (2 * torch.rand(output.shape, generator=generator) - 1)
        )

    handles = [module.register_forward_hook(off) for module in model.backbone.modules()]
    try:
        return logits(model)
    finally:
        for handle in handles:
            handle.remove()


@on(MAIN)
@pytest.mark.parametrize("fast_bf16", [True, False], ids=["", "widened"])
def test_a_bf16_backbone_is_followed_in_its_precision(
    make_backbone: Make, monkeypatch: pytest.MonkeyPatch, name: str, method: str, fast_bf16: bool
) -> None:
    monkeypatch.setattr(frozen_linear, "has_fast_bf16", lambda: fast_bf16)
    model = far_from_start(get_adept_model(make_backbone(name).bfloat16(), METHODS[method]))
    assert {parameter.dtype for parameter in model.trainable_parameters().values()} == {torch.float32}
    exact = far_from_start(get_adept_model(make_backbone(name).bfloat16().float(), METHODS[method]))
    expected, actual = logits(exact), logits(model)
    assert actual.dtype == torch.bfloat16
    # How much a model amplifies the rounding of what it reads is its own: it is measured, not guessed. A module rounds
    # more than once inside, and both sides are draws of chance, hence the factor.
    generator = torch.Generator().manual_seed(0)
    rounded = torch.stack([logits_with_every_result_rounded(exact, generator) for _ in range(4)])
    assert float((actual - expected).norm()) < 4 * float((rounded - expected).norm()) / 4**0.5


ROUNDED_FIRST = ("pt", "prefix")
"""Methods whose values enter a bf16 backbone as they are, so that rounding them is all that happens to them."""


@on(MAIN)
def test_an_adapter_in_a_bf16_backbone_computes_in_fp32(make_backbone: Make, name: str, method: str) -> None:
    """Else its values would be rounded first, and rounding them beforehand would change nothing."""
    model = far_from_start(get_adept_model(make_backbone(name).bfloat16(), METHODS[method]))
    before = logits(model)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.copy_(parameter.bfloat16())
    assert torch.equal(logits(model), before) == (method in ROUNDED_FIRST)


@on(BACKBONES)
def test_a_saved_adapter_gives_the_same_logits(make_backbone: Make, tmp_path: Path, name: str, method: str) -> None:
    model = far_from_start(get_adept_model(make_backbone(name), METHODS[method]))
    model.save_pretrained(tmp_path)
    loaded = AdaptedModel.from_pretrained(make_backbone(name), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.allclose(logits(model), logits(make_backbone(name)), atol=1e-2)


@on(BACKBONES)
def test_disabled_it_is_the_backbone(make_backbone: Make, name: str, method: str) -> None:
    model = far_from_start(get_adept_model(make_backbone(name), METHODS[method]))
    tuned = logits(model)
    with model.disable_adapter():
        assert_equal_up_to_rounding(logits(model), logits(make_backbone(name)))
    assert torch.equal(logits(model), tuned)
    assert {parameter.requires_grad for parameter in model.trainable_parameters().values()} == {True}


STARTS_ELSEWHERE = ("prefix", "prefix-projected", "hyperformer", "hyperformer-tasks")


@on(BACKBONES, [m for m in METHODS if not METHODS[m].num_virtual_tokens and m not in STARTS_ELSEWHERE])
def test_methods_without_a_prompt_start_as_the_backbone(make_backbone: Make, name: str, method: str) -> None:
    if (name, method) == ("t5-tied", "lst"):
        pytest.skip("LST as published puts its side network's last state in the place of T5's")
    model = get_adept_model(make_backbone(name), METHODS[method]).eval()
    assert_equal_up_to_rounding(logits(model), logits(make_backbone(name)))


@on(BACKBONES)
def test_padding_on_the_left_changes_nothing(make_backbone: Make, name: str, method: str) -> None:
    if name == "t5-tied":
        pytest.skip("T5 reads positions relative to one another, padding included, and is padded on the right")
    model = far_from_start(get_adept_model(make_backbone(name), METHODS[method]))
    assert_equal_up_to_rounding(logits(model, pads=5), logits(model))


def greedy(model: AdaptedModel, ids: Tensor, mask: Tensor, **options: object) -> Tensor:
    # The end is never drawn, so that every row has as many tokens.
    options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [EOS, PAD], "pad_token_id": PAD} | options
    return model.generate(input_ids=ids, attention_mask=mask, task_ids=TASKS, **options)


@on(BACKBONES)
def test_generation_is_that_without_a_cache(make_backbone: Make, name: str, method: str) -> None:
    """Every generated token is the likeliest one by a full pass over what stands before it."""
    model = far_from_start(get_adept_model(make_backbone(name), METHODS[method]))
    ids, mask = random_ids(2, 7), torch.ones(2, 7, dtype=torch.long)
    if name != "t5-tied":
        mask[0, :3] = 0
    out = greedy(model, ids, mask)
    with torch.no_grad():
        if model.is_encoder_decoder:
            scores = model(ids, mask, task_ids=TASKS, decoder_input_ids=out[:, :-1]).logits
            new = out[:, 1:]
        else:
            whole, read = (torch.cat([mask, mask.new_full((2, 5), new)], 1) for new in (1, 0))
            scores = model(out[:, :-1], whole, task_ids=TASKS, context_mask=read).logits[:, -6:]
            new = out[:, 7:]
    scores[..., [EOS, PAD]] = -torch.inf
    assert torch.equal(scores.argmax(-1), new)


@on(
    MAIN,
    [
        "adept",
        "dept",
        "attempt",
        "attempt-tasks",
        "prefix",
        "adapter-tasks",
        "hyperformer-tasks",
        "hyperdecoder",
        "lst",
    ],
)
def test_generation_that_keeps_no_cache_is_the_same(make_backbone: Make, name: str, method: str) -> None:
    model = far_from_start(get_adept_model(make_backbone(name), METHODS[method]))
    ids, mask = random_ids(2, 7), torch.ones(2, 7, dtype=torch.long)
    if name != "t5-tied":
        mask[0, :3] = 0
    assert torch.equal(greedy(model, ids, mask, use_cache=False), greedy(model, ids, mask))


@on(MAIN)
def test_beams_run_and_leave_the_prompt_out(make_backbone: Make, name: str, method: str) -> None:
    model = far_from_start(get_adept_model(make_backbone(name), METHODS[method]))
    out = greedy(model, random_ids(2, 7), torch.ones(2, 7, dtype=torch.long), num_beams=3)
    assert int(out.max()) < VOCABULARY
    assert out.shape == (2, 7 if model.is_encoder_decoder else 13)


@pytest.mark.parametrize("method", METHODS)
def test_start_values_are_a_function_of_the_seed(make_backbone: Make, method: str) -> None:
    def values(seed: int) -> list[Tensor]:
        torch.manual_seed(torch.seed())
        model = get_adept_model(make_backbone("t5-tied"), METHODS[method], seed=seed)
        return list(model.trainable_parameters().values())

    assert all(torch.equal(a, b) for a, b in zip(values(1), values(1), strict=True))


# Names in the adapter file: those of earlier versions must load

ADAPTER = "adapter.w_down adapter.b_down adapter.w_up adapter.b_up"
NORMS = "*.input_layernorm.trained.weight *.post_attention_layernorm.trained.weight model.norm.trained.weight"
NAMES = {
    "adept": "soft_prompt network.w_down network.b1 network.w_up network.b2",
    "pt": "soft_prompt",
    "dept": "soft_prompt offset.a offset.b",
    "pt_embedding": "soft_prompt offset.weight",
    "mpt": "soft_prompt prefix_task_cols prefix_task_rows",
    "attempt": "soft_prompt sources network.w_down network.w_up network.norm_weight network.norm_bias",
    "prefix": "prefix_encoder.embedding.weight",
    "lora": " ".join(f"*.self_attn.{x}_proj.lora_{pair}.weight" for x in "qkv" for pair in "AB"),
    "dpt": "soft_prompt.a soft_prompt.b",
    "residual_pt": "soft_prompt "
    + " ".join(f"soft_prompt.{name}" for name in ("w_down", "b1", "w_up", "b2", "norm_weight", "norm_bias")),
    "vera": "vera_A vera_B " + " ".join(f"*.self_attn.{x}_proj.vera_lambda_{end}" for x in "qkv" for end in "bd"),
    "ia3-feed-forward": "*.self_attn.k_proj.ia3_l *.self_attn.v_proj.ia3_l *.mlp.down_proj.ia3_l",
    "adapter": " ".join(
        [*(f"*.{part}.{end}" for part in ("self_attn.o_proj", "mlp.down_proj") for end in ADAPTER.split()), NORMS]
    ),
    "bitfit": " ".join(
        [
            *(f"*.self_attn.{x}_proj.bias" for x in "qkvo"),
            *(f"*.mlp.{x}_proj.bias" for x in ("gate", "up", "down")),
            *("*.input_layernorm.bias", "*.post_attention_layernorm.bias", "lm_head.bias"),
        ]
    ),
    "lst": " ".join(
        f"side_network.{name}"
        for name in (
            *(f"{layer}.{end}" for layer in ("decoder.first", "up") for end in ("weight", "bias")),
            *("decoder.gates.weight", "decoder.norm.weight"),
            *(f"decoder.down.{layer}.{end}" for layer in range(2) for end in ("weight", "bias")),
            *(f"decoder.blocks.{layer}.self_attn.{x}_proj.weight" for layer in range(2) for x in "qkvo"),
            *(f"decoder.blocks.{layer}.mlp.{x}_proj.weight" for layer in range(2) for x in ("gate", "up", "down")),
            *(f"decoder.blocks.{layer}.input_layernorm.weight" for layer in range(2)),
            *(f"decoder.blocks.{layer}.post_attention_layernorm.weight" for layer in range(2)),
        )
    ),
}


@pytest.mark.parametrize("method", NAMES)
def test_names_in_the_adapter_file_stay(make_backbone: Make, tmp_path: Path, method: str) -> None:
    get_adept_model(make_backbone("llama"), METHODS[method]).save_pretrained(tmp_path)
    names = {re.sub(r"model\.layers\.\d", "*", name) for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert names == set(NAMES[method].split())


# Parameter counts

SHAPES = {"t5-base": "t5-base", "t5-3b": "t5-3b", "codegen": "codegen-350m-mono", "llama3": "meta-llama-3-8b"}

EIGHT = ("rte", *"abcdefg")
COUNTS: list[tuple[MethodConfig, str, int, str]] = [
    (AdeptConfig(num_virtual_tokens=60, bottleneck=19), "t5-base", 76_051, "76.1K"),
    (AdeptConfig(num_virtual_tokens=60, bottleneck=19), "t5-3b", 101_395, "101.4K"),
    (AdeptConfig(), "codegen", 10_241, "10.2K"),
    (AdeptConfig(), "llama3", 40_961, "41.0K"),
    (AdeptConfig(num_virtual_tokens=0, bottleneck=49), "t5-base", 76_081, "76.1K"),
    (PromptTuningConfig(num_virtual_tokens=100), "t5-base", 76_800, "76.8K"),
    (PromptTuningConfig(num_virtual_tokens=100), "t5-3b", 102_400, "102.4K"),
    (PromptTuningConfig(), "codegen", 10_240, "10.2K"),
    (PromptTuningConfig(), "llama3", 40_960, "41.0K"),
    (DeptConfig(num_virtual_tokens=40, rank=45, max_positions=256), "t5-base", 76_800, "76.8K"),
    (DeptConfig(num_virtual_tokens=60, rank=26, max_positions=512), "t5-3b", 101_376, "101.4K"),
    (DeptConfig(rank=2), "codegen", 10_378, "10.4K"),
    (DeptConfig(), "llama3", 42_703, "42.7K"),
    (PromptEmbeddingConfig(num_virtual_tokens=100), "t5-base", 24_751_104, "24.8M"),
    (LoraConfig(rank=34), "t5-base", 3_760_128, "3.8M"),
    (LoraConfig(rank=35), "t5-3b", 25_804_800, "25.8M"),
    (LoraConfig(), "codegen", 1_310_720, "1.3M"),
    (LoraConfig(), "llama3", 9_437_184, "9.4M"),
    # 77,668, which the papers that quote it print as 77.6K.
    (MptConfig(num_virtual_tokens=100), "t5-base", 77_668, "77.7K"),
    # Per task of eight that share what can be shared: 83,744 / 8 = 10.5K.
    (MptConfig(num_virtual_tokens=100, tasks=EIGHT), "t5-base", 83_744, "83.7K"),
    (AttemptConfig(num_virtual_tokens=100, sources=tuple("abcdef")), "t5-base", 231_936, "231.9K"),
    # For eight tasks; 96,192 and 1,822,656 for each.
    (AttemptConfig(num_virtual_tokens=100, sources=tuple("abcdef"), tasks=EIGHT), "t5-base", 769_536, "769.5K"),
    (AdapterConfig(post_norm=True, tasks=EIGHT), "t5-base", 14_581_248, "14.6M"),
    # 651,382 and 1,759,751 for each; the former twice as wide, and the latter with the MLP of today's code.
    (HyperFormerConfig(tasks=EIGHT), "t5-base", 5_211_056, "5.2M"),
    (HyperFormerConfig(tasks=EIGHT, bottleneck=48), "t5-base", 8 * 1_250_812, "10.0M"),
    (HyperDecoderConfig(), "t5-base", 14_078_008, "14.1M"),
    (HyperDecoderConfig(process_encoder=True), "t5-base", 8 * 1_907_399, "15.3M"),
    (DptConfig(num_virtual_tokens=100), "t5-base", 8_680, "8.7K"),
    (ResidualPromptConfig(num_virtual_tokens=100), "t5-base", 693_904, "693.9K"),
    (ResidualPromptConfig(num_virtual_tokens=100, bottleneck=800), "t5-base", 1_308_704, "1.3M"),
    # 72 layers, queries and values of encoder, decoder and cross-attention, with 256 and 768 each.
    (VeraConfig(), "t5-base", 72 * (256 + 768), "73.7K"),
    (Ia3Config(), "t5-base", 55_296, "55.3K"),
    (AdapterConfig(), "t5-base", 1_855_104, "1.9M"),
    (AdapterDropConfig(), "t5-base", 1_101_984, "1.1M"),
    (BitFitConfig(), "t5-base", 280_960, "281.0K"),
    (LstConfig(layers=(1, 2, 3, 5, 6, 7, 9, 10, 11)), "t5-base", 3_878_712, "3.9M"),
    (LstConfig(layers=(23,)), "t5-3b", 2_494_896, "2.5M"),
    (LstConfig(), "codegen", 6_837_652, "6.8M"),
    (LstConfig(), "llama3", 180_409_376, "180.4M"),
]


@pytest.mark.parametrize(("method", "shape", "count", "figure"), COUNTS, ids=lambda value: getattr(value, "name", None))
def test_counts_are_the_papers(method: MethodConfig, shape: str, count: int, figure: str) -> None:
    file = resources.files("adept_ds.backbone") / "architectures" / f"{SHAPES[shape]}.json"
    architecture = AutoConfig.for_model(**json.loads(file.read_text(encoding="utf-8")))
    run = RunConfig(
        model=ModelConfig(name_or_path=shape),
        method=method,
        data=DataConfig(format="tasks", tasks=("rte",)),
        train=TrainConfig(max_steps=1, warmup_steps=0),
    )
    trained, _ = meta_model(run, architecture).count_parameters()
    assert trained == count
    assert figure == (f"{trained / 1e3:.1f}K" if trained < 1e6 else f"{trained / 1e6:.1f}M")


# What only some do


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("make", [Make, None], ids=["plain", "nf4"])
def test_frozen_layers_below_lora_keep_nothing_for_the_backward_pass(make_backbone: Make, name: str, make) -> None:
    backbone = make_backbone(name) if make else quantized(make_backbone, name)
    model = get_adept_model(backbone, METHODS["lora"])
    plain = [key for key, module in model.named_modules() if type(module) is nn.Linear]
    assert all(".lora_" in key for key in plain)
    bases = [module for key, module in model.named_modules() if key.endswith(".base_layer")]
    assert bases
    assert all(isinstance(module, FrozenLinear) for module in bases)


def test_dept_offset_is_by_position_behind_the_prompt(make_backbone: Make) -> None:
    model = far_from_start(get_adept_model(make_backbone("llama"), METHODS["dept"]))
    embedding, values = model.method.embedding, model.trainable_parameters()
    seen: list[Tensor] = []
    embedding.register_forward_hook(lambda module, args, out: seen.append(out))
    logits(model, columns=14, pads=2)
    offsets = torch.zeros(14, 32)
    offsets[:12] = 8 / 2**0.5 * values["offset.a"] @ values["offset.b"]
    expected = embedding.table.weight[random_ids(2, 14)] + offsets
    assert_equal_up_to_rounding(seen[0][:, 5:], expected)


def test_dept_offsets_can_be_shifted_cyclically(make_backbone: Make, tmp_path: Path) -> None:
    model = far_from_start(get_adept_model(make_backbone("llama"), METHODS["dept"]))
    model.save_pretrained(tmp_path)
    shifted = AdaptedModel.from_pretrained(make_backbone("llama"), tmp_path, cyclic_shift=5)
    positions = torch.arange(12)
    expected = model.method.embedding.offset(positions).roll(-5, 0)
    assert torch.equal(shifted.method.embedding.offset(positions), expected)


@pytest.mark.parametrize("method", ["adept", "dept"])
def test_without_its_offset_in_evaluation_a_method_is_its_prompt(
    make_backbone: Make, tmp_path: Path, method: str
) -> None:
    model = far_from_start(get_adept_model(make_backbone("llama"), METHODS[method]))
    model.save_pretrained(tmp_path)
    changed = AdaptedModel.from_pretrained(make_backbone("llama"), tmp_path, offset_in_evaluation=False)
    prompt = model.trainable_parameters()["soft_prompt"]
    pt = get_adept_model(make_backbone("llama"), PromptTuningConfig(num_virtual_tokens=len(prompt))).eval()
    pt.load_trained({"soft_prompt": prompt})
    assert torch.equal(logits(changed.eval()), logits(pt))
    assert not torch.equal(logits(changed.train()), logits(pt))


@pytest.mark.parametrize("method", METHODS)
def test_training_starts_from_an_adapter_of_a_source_task(make_backbone: Make, tmp_path: Path, method: str) -> None:
    source = far_from_start(get_adept_model(make_backbone("t5-tied"), METHODS[method]))
    source.save_pretrained(tmp_path)
    config = METHODS[method].model_copy(update={"init_from": str(tmp_path)})
    assert torch.equal(logits(get_adept_model(make_backbone("t5-tied"), config).eval()), logits(source))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PromptTuningConfig(num_virtual_tokens=3), r"method\.init_from is .* of method 'pt'; expected .* 'adept'"),
        (AdeptConfig(num_virtual_tokens=3), r"soft_prompt has shape \(3, 32\), expected \(4, 32\)"),
    ],
)
def test_a_source_of_another_kind_is_refused(make_backbone: Make, tmp_path: Path, config, message) -> None:
    get_adept_model(make_backbone("llama"), config).save_pretrained(tmp_path)
    wanted = METHODS["adept"].model_copy(update={"init_from": str(tmp_path)})
    with pytest.raises(UserError, match=message):
        get_adept_model(make_backbone("llama"), wanted)


def test_a_prefix_has_the_one_head_of_multi_query_attention() -> None:
    model = get_adept_model(seeded(causal("falcon", multi_query=True)), METHODS["prefix"]).train()
    losses = take_steps(model, batch(model), steps=5)
    assert losses[-1] < losses[0]


def test_a_backbone_without_attention_takes_no_prefix() -> None:
    backbone = RwkvForCausalLM(RwkvConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, **TOKENS))
    with pytest.raises(UserError, match=r"method\.name is 'prefix'.* \(model type 'rwkv'\) has none"):
        get_adept_model(backbone, METHODS["prefix"])


def test_a_prefix_and_recomputed_layers_exclude_one_another() -> None:
    with pytest.raises(ValueError, match=r"method\.name prefix .* train\.activation_checkpointing"):
        RunConfig(
            model=ModelConfig(name_or_path="x"),
            method=PrefixTuningConfig(),
            train=TrainConfig(max_steps=1, warmup_steps=0, activation_checkpointing=True),
        )


# Backbones of other builds


def trained(backbone: PreTrainedModel, config: MethodConfig) -> AdaptedModel:
    return far_from_start(get_adept_model(backbone, config)).eval()


WINDOW = {"sliding_window": 6, "num_key_value_heads": 2}
WINDOWED = {
    "mistral": causal("mistral", **WINDOW),  # one mask for all layers
    "gemma3": causal("gemma3_text", **WINDOW, head_dim=8),  # a mask for each kind of layer
    "phi3": causal("phi3", **WINDOW),
}


@pytest.mark.parametrize("build", WINDOWED.values(), ids=WINDOWED)
def test_padding_does_not_push_a_prefix_out_of_a_sliding_window(build: Callable[[], PreTrainedModel]) -> None:
    model = trained(seeded(build), PrefixTuningConfig(prefix_length=3))
    ids = torch.arange(5, 9)[None]
    padded, mask = nn.functional.pad(ids, (8, 0)), nn.functional.pad(torch.ones_like(ids), (8, 0))
    alone = model(ids).logits[0, -1]
    assert_equal_up_to_rounding(model(padded, mask).logits[0, -1], alone)
    written = greedy(model, ids, torch.ones_like(ids))[:, 4:]
    assert torch.equal(greedy(model, padded, mask)[:, 12:], written)
    assert torch.equal(greedy(model, padded, mask, use_cache=False)[:, 12:], written)


@pytest.mark.parametrize("model_type", ["bloom", "mpt"])
def test_dept_generates_on_a_backbone_without_position_ids(model_type: str) -> None:
    sizes = {"n_layer": 2, "n_head": 4} if model_type == "bloom" else {"d_model": WIDTH, "n_layers": 2, "n_heads": 4}
    model = trained(seeded(causal(model_type, **sizes)), DeptConfig(num_virtual_tokens=3, rank=2, max_positions=20))
    ids = torch.randint(3, VOCABULARY, (1, 6))
    read = ids
    for _ in range(5):
        read = torch.cat([read, model(read).logits[:, -1:].argmax(-1)], 1)
    written = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=PAD, eos_token_id=None)
    assert torch.equal(written, read)
    with model.disable_adapter():
        assert_equal_up_to_rounding(model(ids).logits, seeded(causal(model_type, **sizes))(ids).logits)


@pytest.mark.parametrize("model_type", ["codegen", "phi", "gpt2"])
def test_bitfit_trains_every_bias(model_type: str) -> None:
    backbone = seeded(causal(model_type, n_positions=64, rotary_dim=4))
    biases = {name for name, _ in backbone.named_parameters() if name.endswith(".bias")}
    model = trained(backbone, BitFitConfig())
    assert set(model.trainable_parameters()) == biases
    ids = torch.randint(3, VOCABULARY, (1, 6))
    with model.disable_adapter():
        plain = seeded(causal(model_type, n_positions=64, rotary_dim=4))
        assert_equal_up_to_rounding(model(ids).logits, plain(ids).logits)
    with torch.no_grad():
        for name, parameter in model.trainable_parameters().items():
            plain.get_parameter(name).add_(parameter)
    assert_equal_up_to_rounding(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("method", [PromptTuningConfig, AdeptConfig])
@pytest.mark.parametrize("model_type", ["llama", "gemma", "gemma3_text"])
def test_a_prompt_starts_as_what_the_backbone_reads_for_its_text(
    tokenizer: PreTrainedTokenizerFast, method: type[AdeptConfig], model_type: str
) -> None:
    build = causal(model_type, head_dim=8, num_key_value_heads=4)
    text = torch.tensor([tokenizer("solve", add_special_tokens=False)["input_ids"]])
    config = method(num_virtual_tokens=5, prompt_init="text", prompt_init_text="solve")
    model = get_adept_model(seeded(build), config, tokenizer).eval()
    ids = torch.randint(3, VOCABULARY, (1, 9))
    expected = seeded(build)(torch.cat([text, ids], 1)).logits
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_the_folded_table_is_what_the_embedding_gives_where_the_backbone_scales_it() -> None:
    model = trained(seeded(causal("gemma3_text", head_dim=8)), AdeptConfig(num_virtual_tokens=2, bottleneck=2))
    embedding = model.backbone.get_input_embeddings()
    torch.testing.assert_close(embedding.folded_weight(), embedding(torch.arange(VOCABULARY)[None])[0])


@pytest.mark.parametrize("config", [LoraConfig(dropout=0.5), AdeptConfig(dropout=0.5)], ids=["lora", "adept"])
def test_an_adapter_that_is_loaded_is_in_evaluation_mode(
    make_backbone: Make, tmp_path: Path, config: MethodConfig
) -> None:
    trained(make_backbone("llama"), config).save_pretrained(tmp_path)
    model = AdaptedModel.from_pretrained(make_backbone("llama"), tmp_path)
    ids = torch.randint(3, VOCABULARY, (1, 6))
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert not any(module.training for module in model.modules())


def test_ids_and_embeddings_that_would_be_misread_are_refused(make_backbone: Make) -> None:
    model = get_adept_model(make_backbone("llama"), AdeptConfig())
    with pytest.raises(UserError, match=f"id {VOCABULARY} is none of the {VOCABULARY}"):
        model(torch.tensor([[5, VOCABULARY]]))
    embeddings = torch.zeros(1, 2, WIDTH)
    for call in (model, model.generate):
        with pytest.raises(UserError, match="inputs_embeds would be read without soft prompt"):
            call(torch.tensor([[5, 6]]), inputs_embeds=embeddings)
