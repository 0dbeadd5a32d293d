"""Ladder side tuning: the published formula, no gradient through the backbone, its caches, its start, its refusals."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    RwkvConfig,
    RwkvForCausalLM,
)

from adept_ds.backbone.quantization import QuantizedLinear, Scheme, quantize_linears
from adept_ds.config.method import LoraConfig, LstConfig, MethodConfig
from adept_ds.config.run import DataConfig, ModelConfig, RunConfig, TrainConfig
from adept_ds.errors import UserError
from adept_ds.model.adapted_model import AdaptedModel, get_adept_model
from adept_ds.planner.meta_step import StepShape, meta_model, trace_step
from adept_ds.tools import families
from tests.models import EOS, PAD, VOCABULARY, WIDTH, causal, llama_config, seeded, t5_config, talkative_t5
from tests.tolerances import assert_equal_up_to_rounding

LAYERS = (0, 2)
"""Of three."""


def t5(**changes: object) -> PreTrainedModel:
    return seeded(lambda: talkative_t5(t5_config(num_layers=3, initializer_factor=2.0, **changes)))


def llama(**changes: object) -> PreTrainedModel:
    return seeded(lambda: LlamaForCausalLM(llama_config(num_hidden_layers=3, initializer_range=0.3, **changes)))


BUILDS = {"t5": t5, "llama": llama}


def adapted(backbone: PreTrainedModel, **settings: object) -> AdaptedModel:
    """With LST in it whose values are far from where they start."""
    model = get_adept_model(backbone, LstConfig(**{"reduction": 2, "layers": LAYERS} | settings)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def random_ids(rows: int, columns: int, seed: int = 4) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(seed))


# The formula, written out


def outputs_of(layers: nn.ModuleList) -> tuple[list[Tensor], list[Tensor]]:
    """Lists that fill with what the first of the layers reads and with what each gives."""
    read: list[Tensor] = []
    gave: list[Tensor] = []
    layers[0].register_forward_pre_hook(lambda module, args: read.append(args[0]))
    for layer in layers:
        layer.register_forward_hook(lambda module, args, out: gave.append(out if isinstance(out, Tensor) else out[0]))
    return read, gave


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def heads(x: Tensor, weight: Tensor, count: int) -> Tensor:
    """[B, S, in] to [B, count, S, width]."""
    return (x @ weight.T).unflatten(-1, (count, -1)).transpose(1, 2)


def bucket(distance: int, both_sides: bool) -> int:
    """T5's bucket of how far a key stands behind the query: 32 of them, up to 128."""
    count, offset = (16, 16 * (distance > 0)) if both_sides else (32, 0)
    far = abs(distance) if both_sides else max(-distance, 0)
    half = count // 2
    if far < half:
        return offset + far
    return offset + min(half + int(math.log(far / half) / math.log(128 / half) * (count - half)), count - 1)


def relative_bias(table: Tensor, length: int, both_sides: bool) -> Tensor:
    rows = [[bucket(key - query, both_sides) for key in range(length)] for query in range(length)]
    return table[torch.tensor(rows)].permute(2, 0, 1)


def t5_attention(values: dict[str, Tensor], x: Tensor, memory: Tensor, bias: Tensor) -> Tensor:
    q, k, v = (heads(of, values[f"{name}.weight"], 4) for of, name in ((x, "q"), (memory, "k"), (memory, "v")))
    mixed = (q @ k.transpose(2, 3) + bias).softmax(-1) @ v
    return mixed.transpose(1, 2).flatten(2) @ values["o.weight"].T


def under(values: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): value for name, value in values.items() if name.startswith(f"{prefix}.")}


def linear(values: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ values[f"{name}.weight"].T + values[f"{name}.bias"]


def ladder(
    values: dict[str, Tensor], read: Tensor, gave: list[Tensor], block: Callable[[dict, Tensor], Tensor]
) -> Tensor:
    state = linear(values, "first", read)
    for number, layer in enumerate(LAYERS):
        gate = 1 / (1 + torch.exp(-values["gates.weight"][layer] / 0.1))
        state = gate * state + (1 - gate) * linear(values, f"down.{number}", gave[layer])
        state = block(under(values, f"blocks.{number}"), state)
    return rms(state, values["norm.weight"])


def test_t5s_logits_are_those_of_the_published_formula() -> None:
    model, plain = adapted(t5()), t5()
    values = under({name: value.detach() for name, value in model.trainable_parameters().items()}, "side_network")
    ids, targets = random_ids(2, 7), random_ids(2, 5, seed=5)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    read, gave = outputs_of(plain.encoder.block)
    decoder_read, decoder_gave = outputs_of(plain.decoder.block)
    with torch.no_grad():
        logits = model(ids, mask, decoder_input_ids=targets).logits
        plain(ids, mask, decoder_input_ids=targets)
    padding = (1 - mask[:, None, None]) * -1e30

    def feed_forward(part: dict[str, Tensor], state: Tensor) -> Tensor:
        hidden = (rms(state, part["layer_norm.weight"]) @ part["DenseReluDense.wi.weight"].T).clamp(min=0)
        return state + hidden @ part["DenseReluDense.wo.weight"].T

    def attend(part: dict[str, Tensor], name: str, state: Tensor, memory: Tensor | None, bias: Tensor) -> Tensor:
        normed = rms(state, part["layer_norm.weight"])
        return state + t5_attention(under(part, name), normed, normed if memory is None else memory, bias)

    table = values["encoder.blocks.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    bias = relative_bias(table, 7, both_sides=True) + padding

    def encoder_block(part: dict[str, Tensor], state: Tensor) -> Tensor:
        state = attend(under(part, "layer.0"), "SelfAttention", state, None, bias)
        return feed_forward(under(part, "layer.1"), state)

    encoded = ladder(under(values, "encoder"), read[0], gave, encoder_block)
    table = values["decoder.blocks.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    causal_bias = relative_bias(table, 5, both_sides=False) + torch.full((5, 5), -1e30).triu(1)

    def decoder_block(part: dict[str, Tensor], state: Tensor) -> Tensor:
        state = attend(under(part, "layer.0"), "SelfAttention", state, None, causal_bias)
        state = attend(under(part, "layer.1"), "EncDecAttention", state, encoded, padding)
        return feed_forward(under(part, "layer.2"), state)

    top = linear(values, "up", ladder(under(values, "decoder"), decoder_read[0], decoder_gave, decoder_block))
    assert_equal_up_to_rounding(logits, WIDTH**-0.5 * top @ plain.shared.weight.T)


def test_llamas_logits_are_its_own_state_and_the_side_networks() -> None:
    model, plain = adapted(llama()), llama()
    values = under({name: value.detach() for name, value in model.trainable_parameters().items()}, "side_network")
    ids = random_ids(2, 6)
    read, gave = outputs_of(plain.model.layers)
    with torch.no_grad():
        logits = model(ids).logits
        top = plain.model(ids).last_hidden_state
    width = 4  # of a head: 32 features, 4 heads, divided by 2
    angles = torch.arange(6)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)

    def turned(x: Tensor) -> Tensor:
        one, other = x.chunk(2, -1)
        return torch.cat([one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin()], -1)

    def block(part: dict[str, Tensor], state: Tensor) -> Tensor:
        x = rms(state, part["input_layernorm.weight"])
        q, k = (turned(heads(x, part[f"self_attn.{n}_proj.weight"], c)) for n, c in (("q", 4), ("k", 2)))
        v = heads(x, part["self_attn.v_proj.weight"], 2)
        scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) / width**0.5 + torch.full((6, 6), -1e30).triu(1)
        mixed = (scores.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2).flatten(2)
        state = state + mixed @ part["self_attn.o_proj.weight"].T
        x = rms(state, part["post_attention_layernorm.weight"])
        gate = x @ part["mlp.gate_proj.weight"].T
        hidden = gate * torch.sigmoid(gate) * (x @ part["mlp.up_proj.weight"].T)
        return state + hidden @ part["mlp.down_proj.weight"].T

    top = top + linear(values, "up", ladder(under(values, "decoder"), read[0], gave, block))
    assert_equal_up_to_rounding(logits, top @ plain.lm_head.weight.T)


# No gradient through the backbone


def batch(model: AdaptedModel) -> dict[str, Tensor]:
    ids = random_ids(2, 9)
    return {"input_ids": ids, "labels": random_ids(2, 4, seed=5) if model.is_encoder_decoder else ids}


def gradients(model: AdaptedModel) -> dict[str, Tensor]:
    named = model.trainable_parameters()
    loss = model.train()(**batch(model)).loss
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("name", BUILDS)
def test_nothing_in_the_backbone_requires_a_gradient(name: str, checkpointing: bool) -> None:
    model = adapted(BUILDS[name]()).train()
    if checkpointing:
        model.checkpoint_activations()
    seen: list[str] = []

    def note(key: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, kwargs: object, output: object) -> None:
            seen.append(key)
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves((args, output)) if isinstance(leaf, Tensor)]
            # T5 sets the flag on a bias of zeros where it recomputes; that is a leaf, and no graph starts there.
            assert not any(tensor.grad_fn is not None for tensor in tensors), key
            assert not torch.is_grad_enabled(), key

        return hook

    stacks = {"decoder": model.backbone.get_decoder()}
    if model.is_encoder_decoder:
        stacks["encoder"] = model.backbone.get_encoder()
    for stack in stacks.values():
        for key, module in stack.named_modules():
            if key:
                module.register_forward_hook(note(key), with_kwargs=True)
    assert all(bool(gradient.any()) for gradient in gradients(model).values())
    assert seen


@pytest.mark.parametrize("name", BUILDS)
def test_gradients_are_the_same_where_layers_are_recomputed(name: str) -> None:
    dropout = {"dropout_rate": 0.1} if name == "t5" else {}

    def with_dropout(checkpointing: bool) -> dict[str, Tensor]:
        model = adapted(BUILDS[name](**dropout))
        if checkpointing:
            model.checkpoint_activations()
        torch.manual_seed(0)
        return gradients(model)

    plain, recomputed = with_dropout(False), with_dropout(True)
    for key, gradient in plain.items():
        assert torch.equal(recomputed[key], gradient), key


def saved_bytes(model: AdaptedModel) -> int:
    """Bytes that one pass of the small model keeps for the backward pass, parameters aside."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    data = {"input_ids": random_ids(4, 24), "labels": random_ids(4, 24, seed=5)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.train()(**data).loss
    loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("name", BUILDS)
def test_it_keeps_less_than_half_of_what_lora_keeps(name: str) -> None:
    wide = (
        {"d_model": 256, "d_kv": 64, "d_ff": 1024} if name == "t5" else {"hidden_size": 256, "intermediate_size": 704}
    )
    lst = get_adept_model(BUILDS[name](**wide), LstConfig(reduction=8, layers=LAYERS))
    lora = get_adept_model(BUILDS[name](**wide), LoraConfig(rank=4))
    assert saved_bytes(lst) < saved_bytes(lora) / 2


def test_the_planner_sees_that_no_gradient_goes_through_the_backbone() -> None:
    def held(method: MethodConfig) -> int:
        train = TrainConfig(max_steps=1, warmup_steps=0)
        data = DataConfig(format="tasks", tasks=("rte",))
        run = RunConfig(model=ModelConfig(name_or_path="x"), method=method, data=data, train=train)
        config = t5_config(num_layers=4, d_model=256, d_kv=64, d_ff=1024, dropout_rate=0.1)
        return trace_step(meta_model(run, config), StepShape(4, 64, 16)).held_bytes

    assert held(LstConfig(layers=(1, 2, 3))) < held(LoraConfig(rank=8)) / 2


# Caches


@pytest.mark.parametrize("name", BUILDS)
def test_beams_with_a_cache_are_those_without(name: str) -> None:
    model, ids = adapted(BUILDS[name]()), random_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[0, slice(4, None) if name == "t5" else slice(0, 2)] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "pad_token_id": PAD, "suppress_tokens": [EOS]}
    cached, plain = (model.generate(ids, mask, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, plain)
    greedy = model.generate(ids, mask, **options | {"num_beams": 1})
    assert not torch.equal(cached, greedy)


@pytest.mark.parametrize("name", BUILDS)
def test_a_cache_of_fixed_size_serves_too(name: str) -> None:
    model, ids = adapted(BUILDS[name]()), random_ids(2, 6)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD, "suppress_tokens": [EOS]}
    fixed = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(fixed, model.generate(ids, **options))


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "cohere2", "gpt_neo", "bloom", "falcon", "umt5", "longt5"])
def test_other_builds_write_the_same_with_a_cache(name: str) -> None:
    """With sliding windows, kinds of layers, biases of positions, and other names for the cache."""
    model, ids = adapted(families.build(name), layers=(1,)), random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, slice(9, None) if model.is_encoder_decoder else slice(0, 3)] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD, "suppress_tokens": [EOS]}
    cached, plain = (model.generate(ids, mask, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, plain)
    with torch.no_grad(), model.disable_adapter():
        inputs = {"decoder_input_ids": ids} if model.is_encoder_decoder else {}
        assert_equal_up_to_rounding(model(ids, **inputs).logits, families.build(name)(ids, **inputs).logits)


def test_a_cache_that_was_filled_without_the_side_network_is_refused() -> None:
    model, ids = adapted(llama()), random_ids(1, 5)
    cache = DynamicCache(config=model.backbone.config)
    with torch.no_grad(), model.disable_adapter():
        model(ids, past_key_values=cache)
    with pytest.raises(UserError, match="filled without the side network"):
        model(ids, past_key_values=cache)
    assert torch.is_grad_enabled()


# Where it starts


@pytest.mark.parametrize("form", ["plain", "nf4", "gated"])
def test_magnitude_keeps_the_largest_rows_in_the_order_of_the_forward_pass(form: str) -> None:
    gated = form == "gated"
    backbone, reduction = t5(**{"feed_forward_proj": "gated-gelu"} if gated else {}), 4
    plain = {name: value.detach().clone() for name, value in backbone.state_dict().items()}
    if form == "nf4":
        scheme = Scheme("nf4")
        for name, layer in quantize_linears(backbone.requires_grad_(False), scheme).items():
            assert isinstance(layer, QuantizedLinear)
            layer.weight.copy_(scheme.quantize(plain[name], torch.device("cpu"), torch.float32))
            plain[name] = layer.dense_weight().clone()
    model = get_adept_model(backbone, LstConfig(reduction=reduction, layers=LAYERS, init="magnitude"))
    values = under({name: value.detach() for name, value in model.trainable_parameters().items()}, "side_network")

    def largest(sums: list[float]) -> list[int]:
        order = sorted(range(len(sums)), key=lambda index: -sums[index])
        return sorted(order[: len(sums) // reduction])

    kept = largest([float(plain["shared.weight"][:, column].abs().sum()) for column in range(WIDTH)])
    encoder: list[int] = []
    checked = set()
    for stack in ("encoder", "decoder"):
        for layer in range(3):
            parts = ["SelfAttention", *(["EncDecAttention"] if stack == "decoder" else []), "DenseReluDense"]
            for number, part in enumerate(parts):
                at = f"{stack}.block.{layer}.layer.{number}"
                expected = {"layer_norm.weight": plain[f"{at}.layer_norm.weight"][kept]}
                read = ("wi_0", "wi_1") if gated else ("wi",)
                names, last = (read, "wo") if part == "DenseReluDense" else (("q", "k", "v"), "o")
                across = part == "EncDecAttention"
                cut = [
                    plain[f"{at}.{part}.{name}.weight"][:, encoder if across and name != "q" else kept]
                    for name in names
                ]
                product = torch.ones_like(cut[0])
                for matrix in cut:
                    product = product * matrix
                rows = largest([float(row.abs().sum()) for row in product])
                expected |= {f"{part}.{name}.weight": matrix[rows] for name, matrix in zip(names, cut, strict=True)}
                out = plain[f"{at}.{part}.{last}.weight"][:, rows]
                kept = largest([float(row.abs().sum()) for row in out])
                expected[f"{part}.{last}.weight"] = out[kept]
                if layer in LAYERS:
                    for name, value in expected.items():
                        key = f"{stack}.blocks.{LAYERS.index(layer)}.layer.{number}.{name}"
                        assert torch.equal(values[key], value), key
                        checked.add(key)
        assert torch.equal(values[f"{stack}.norm.weight"], plain[f"{stack}.final_layer_norm.weight"][kept])
        bias = "layer.0.SelfAttention.relative_attention_bias.weight"
        assert torch.equal(values[f"{stack}.blocks.0.{bias}"], plain[f"{stack}.block.0.{bias}"])
        checked.add(f"{stack}.blocks.0.{bias}")
        encoder = kept
    assert checked == {key for key in values if ".blocks." in key}


def test_magnitude_keeps_of_heads_that_turn_pairs_one_of_every_few_neighbours() -> None:
    backbone, reduction = seeded(causal("qwen2", num_hidden_layers=3, num_key_value_heads=2)), 2
    with torch.no_grad():
        for name, value in backbone.named_parameters():
            if name.endswith("bias"):
                value.normal_()
    plain = {name: value.detach().clone() for name, value in backbone.model.state_dict().items()}
    model = get_adept_model(backbone, LstConfig(reduction=reduction, layers=LAYERS, init="magnitude"))
    values = under({name: value.detach() for name, value in model.trainable_parameters().items()}, "side_network")

    def largest(sums: list[float]) -> list[int]:
        order = sorted(range(len(sums)), key=lambda index: -sums[index])
        return sorted(order[: len(sums) // reduction])

    kept = largest([float(plain["embed_tokens.weight"][:, column].abs().sum()) for column in range(WIDTH)])
    for layer in range(3):
        part = under(plain, f"layers.{layer}")
        expected = {"input_layernorm.weight": part["input_layernorm.weight"][kept]}
        cut = {name: part[f"self_attn.{name}_proj.weight"][:, kept] for name in "qkv"}
        rows: dict[str, list[int]] = {"q": [], "k": [], "v": []}
        read: list[int] = []
        for head in range(2):  # of keys; two of queries go with each, and a head has 8 features, 4 pairs
            queries = [2 * head, 2 * head + 1]

            def worth(pair: int, head: int = head, queries: list[int] = queries, cut: dict = cut) -> float:
                both = (pair, pair + 4)
                return sum(
                    float((cut["q"][8 * query + i] * cut["k"][8 * head + i]).abs().sum())
                    for query in queries
                    for i in both
                )

            pairs = [max((first, first + 1), key=worth) for first in (0, 2)]
            turned = [*pairs, *(pair + 4 for pair in pairs)]
            features = largest([float(row.abs().sum()) for row in cut["v"][8 * head : 8 * head + 8]])
            rows["q"] += [8 * query + i for query in queries for i in turned]
            rows["k"] += [8 * head + i for i in turned]
            rows["v"] += [8 * head + i for i in features]
            read += [8 * query + i for query in queries for i in features]
        for name in "qkv":
            expected[f"self_attn.{name}_proj.weight"] = cut[name][rows[name]]
            expected[f"self_attn.{name}_proj.bias"] = part[f"self_attn.{name}_proj.bias"][rows[name]]
        out = part["self_attn.o_proj.weight"][:, read]
        kept = largest([float(row.abs().sum()) for row in out])
        expected["self_attn.o_proj.weight"] = out[kept]
        expected["post_attention_layernorm.weight"] = part["post_attention_layernorm.weight"][kept]
        gate, up = (part[f"mlp.{name}_proj.weight"][:, kept] for name in ("gate", "up"))
        wide = largest([float(row.abs().sum()) for row in gate * up])
        expected |= {"mlp.gate_proj.weight": gate[wide], "mlp.up_proj.weight": up[wide]}
        out = part["mlp.down_proj.weight"][:, wide]
        kept = largest([float(row.abs().sum()) for row in out])
        expected["mlp.down_proj.weight"] = out[kept]
        if layer in LAYERS:
            side = under(values, f"decoder.blocks.{LAYERS.index(layer)}")
            assert side.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(side[name], value), (layer, name)
    assert torch.equal(values["decoder.norm.weight"], plain["norm.weight"][kept])


@pytest.mark.parametrize("name", BUILDS)
def test_a_side_network_starts_as_published(name: str) -> None:
    model = get_adept_model(BUILDS[name](), LstConfig(reduction=2, layers=LAYERS))
    values = under(model.trainable_parameters(), "side_network")
    assert not values["decoder.gates.weight"].any()
    assert len(values["decoder.gates.weight"]) == 3
    assert 0.008 < float(values["decoder.first.weight"].detach().std()) < 0.012
    assert not values["decoder.first.bias"].any()
    assert bool(values["up.weight"].any()) == (name == "t5")
    assert model.learning_rate_groups().keys() == {"side"}


# What it cannot be put into


def with_flex_attention(backbone: PreTrainedModel) -> PreTrainedModel:
    backbone.set_attn_implementation("flex_attention")
    return backbone


REFUSED = {
    "bart": (
        lambda: BartForConditionalGeneration(
            BartConfig(
                vocab_size=50, d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8, decoder_ffn_dim=8
            )
        ),
        {},
        "'bart'.* not built like T5",
    ),
    "mixtral": (
        lambda: MixtralForCausalLM(llama_config(MixtralConfig, num_local_experts=2, num_experts_per_tok=1)),
        {},
        "'mixtral'.* mixture of experts",
    ),
    "mamba": (causal("mamba"), {}, "'mamba'.* state-space layers"),
    "rwkv": (
        lambda: RwkvForCausalLM(RwkvConfig(vocab_size=50, hidden_size=WIDTH, num_hidden_layers=2)),
        {},
        "'rwkv'.* no attention heads",
    ),
    "width": (t5, {"reduction": 5}, r"method\.reduction is 5, and d_\w+ of .* expected one of 2, 4"),
    "pairs": (llama, {"reduction": 8}, r"method\.reduction is 8, .* in pairs: 8 features leave 1"),
    "flex": (
        lambda: with_flex_attention(llama()),
        {},
        r"'flex_attention', which needs heads of 16 features.* leaves 4",
    ),
    "layer": (t5, {"layers": (1, 3)}, r"method\.layers has 3; the layers of .* are 0 to 2 of encoder and decoder each"),
    "magnitude": (causal("gpt2"), {"init": "magnitude", "layers": (1,)}, r"method\.init is 'magnitude', .*'gpt2'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_side_network_is_refused_by_name(case: str) -> None:
    build, settings, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        get_adept_model(seeded(build), LstConfig(**{"reduction": 2} | settings))


@pytest.mark.parametrize("layers", [(2, 1), (1, 1), ()])
def test_layers_are_ascending_numbers(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="layers"):
        LstConfig(layers=layers)
