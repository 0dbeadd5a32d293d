"""HyperFormer++ and HyperDecoder: the published formulas by an independent reference, and when weights are made."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LongT5Config,
    LongT5ForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from adept_ds.config.method import HyperDecoderConfig, HyperFormerConfig
from adept_ds.errors import UserError
from adept_ds.model.adapted_model import AdaptedModel, get_adept_model
from tests.models import EOS, PAD, WIDTH, seeded, t5_config
from tests.test_methods import far_from_start, logits, random_ids
from tests.test_multitask import MAIN, Make, assert_recomputed_alike, read, through_adapters, tuned
from tests.tolerances import assert_equal_up_to_rounding

TASKS = ("a", "b", "c")


def hyperformer(**changes: object) -> HyperFormerConfig:
    return HyperFormerConfig.model_validate({"bottleneck": 3, "embedding_size": 5, "hidden_size": 6} | changes)


def hyperdecoder(**changes: object) -> HyperDecoderConfig:
    return HyperDecoderConfig.model_validate({"bottleneck": 3, "hidden_size": 6, "layer_embedding_size": 4} | changes)


def linear(values: dict[str, Tensor], name: str) -> nn.Linear:
    layer = nn.Linear(*reversed(values[f"{name}.weight"].shape))
    layer.load_state_dict({end: values[f"{name}.{end}"] for end in ("weight", "bias")})
    return layer


# HyperFormer++


def published_adapter(values: dict[str, Tensor], stack: str, task: int, layer: int, place: int) -> Callable:
    """The function of one adapter, made from one task, one layer and one place alone."""
    prefix = f"hyper_network.{stack}"
    network = nn.Sequential(linear(values, f"{prefix}.first"), nn.ReLU(), linear(values, f"{prefix}.second"))
    norm = nn.LayerNorm(5, eps=1e-6)
    norm.load_state_dict({end: values[f"{prefix}.norm_{end}"] for end in ("weight", "bias")})
    of_task = values["hyper_network.tasks"][task]
    z = norm(network(torch.cat([of_task, values[f"{prefix}.layers"][layer], values[f"{prefix}.places"][place]])))
    made = {name: linear(values, f"{prefix}.heads.{name}")(z) for name in ("w_down", "b_down", "w_up", "b_up")}
    weight, bias = (linear(values, f"{prefix}.heads.norm_{name}")(z) for name in ("weight", "bias"))

    def apply(y: Tensor) -> Tensor:
        hidden = nn.GELU(approximate="tanh")(F.linear(y, made["w_down"].view(3, WIDTH), made["b_down"]))
        out = F.linear(hidden, made["w_up"].view(WIDTH, 3), made["b_up"])
        centred = out - out.mean(-1, keepdim=True)
        return y + weight * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() + bias

    return apply


@pytest.mark.parametrize("name", MAIN)
def test_a_row_goes_through_the_adapters_that_are_made_for_its_task(make_backbone: Make, name: str) -> None:
    model, values = tuned(make_backbone(name), hyperformer(tasks=TASKS))
    tasks = [2, 0, 2]
    seen = through_adapters(model, tasks)
    assert len(seen) == (8 if name == "t5-tied" else 4)
    for key, y, out in seen:
        stack = "encoder" if key.startswith("encoder") else "decoder"
        layer = int(next(part for part in key.split(".") if part.isdigit()))
        place = 1 if "attn" in key or "Attention" in key else 0
        assert "EncDec" not in key
        for row, task in enumerate(tasks):
            with torch.no_grad():
                expected = published_adapter(values, stack, task, layer, place)(y[row])
            assert_equal_up_to_rounding(out[row], expected)


@pytest.mark.parametrize("name", MAIN)
def test_hyperformer_starts_near_the_backbone(make_backbone: Make, name: str) -> None:
    """Weight and bias of the norms behind its adapters are draws of standard deviation 0.01 |z|."""
    model = get_adept_model(make_backbone(name), HyperFormerConfig()).eval()
    with torch.no_grad():
        made = model.method.network()
    for w_down, _, _, _, norm_weight, _ in made.values():
        assert w_down.shape == (1, 4, 24, WIDTH)
        # |z| = sqrt(64), so the deviation is 0.08.
        assert w_down[0].flatten(1).std(1).tolist() == pytest.approx(4 * [0.08], rel=0.2)
        assert norm_weight[0].std(1).tolist() == pytest.approx(4 * [0.08], rel=0.4)
    expected = logits(make_backbone(name))
    assert 0 < float((logits(model) - expected).norm()) < 0.2 * float(expected.norm())


def test_all_tasks_weights_are_made_once_whatever_the_batch_is_of(make_backbone: Make) -> None:
    """Under ZeRO-3 each call gathers weights from all ranks, whose batches are of other tasks."""
    model, _ = tuned(make_backbone("t5-tied"), hyperformer(tasks=TASKS))
    calls: list[str] = []
    for name, module in model.method.network.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    made = []
    for tasks in ([0], [1, 1], [2, 0, 1]):
        calls.clear()
        read(model, tasks)
        made.append(list(calls))
    assert made[0] == made[1] == made[2]
    assert len(made[0]) == len(set(made[0]))


def test_what_is_made_is_kept_while_nothing_changes(make_backbone: Make) -> None:
    model, _ = tuned(make_backbone("llama"), hyperformer(tasks=TASKS))
    calls: list[int] = []
    model.method.network.register_forward_hook(lambda *_: calls.append(1))
    with model.method.unchanging():
        first = [read(model, tasks) for tasks in ([0, 1], [2, 2])]
    assert len(calls) == 1
    assert all(torch.equal(kept, read(model, tasks)) for kept, tasks in zip(first, ([0, 1], [2, 2]), strict=True))
    with torch.no_grad():
        model.trainable_parameters()["hyper_network.tasks"].mul_(-2)
    with model.method.unchanging():
        assert not torch.allclose(read(model, [0, 1]), first[0], atol=1e-2)


@pytest.mark.parametrize(
    ("name", "config"), [*((name, hyperformer(tasks=TASKS)) for name in MAIN), ("t5-tied", hyperdecoder())]
)
def test_recomputed_layers_read_the_weights_of_their_own_batch(make_backbone: Make, name: str, config) -> None:
    assert_recomputed_alike(make_backbone, name, config)


@pytest.mark.parametrize(
    ("name", "config"),
    [(name, hyperformer(train_norms=False)) for name in MAIN] + [("t5-tied", hyperdecoder())],
    ids=["hyperformer-llama", "hyperformer-t5", "hyperdecoder-t5"],
)
def test_made_weights_are_fp32_where_values_are_kept_in_bf16(make_backbone: Make, name: str, config) -> None:
    """As DeepSpeed keeps them beside fp32 masters. Trained norms compute in the precision they are kept in."""
    model, values = tuned(make_backbone(name).bfloat16(), config)
    for parameter in model.trainable_parameters().values():
        parameter.data = parameter.data.bfloat16()
    actual = logits(model)
    exact, _ = tuned(make_backbone(name).bfloat16(), config)
    exact.load_trained({key: value.bfloat16().float() for key, value in values.items()})
    assert torch.equal(actual, logits(exact))


def test_a_few_examples_start_from_a_related_task(make_backbone: Make, tmp_path: Path) -> None:
    source, values = tuned(make_backbone("t5-tied"), hyperformer(tasks=TASKS))
    source.save_pretrained(tmp_path / "source")
    started = {"init_from": str(tmp_path / "source")}
    one = get_adept_model(make_backbone("t5-tied"), hyperformer(task_from="b", **started)).eval()
    assert torch.equal(one.trainable_parameters()["hyper_network.tasks"], values["hyper_network.tasks"][1:2])
    assert_equal_up_to_rounding(read(one, [0, 0]), read(source, [1, 1]))
    two = get_adept_model(make_backbone("t5-tied"), hyperformer(tasks=("c", "a"), **started)).eval()
    assert_equal_up_to_rounding(read(two, [0, 1]), read(source, [2, 0]))
    with pytest.raises(UserError, match=r"has parameters of a, b, c; set method\.task_from"):
        get_adept_model(make_backbone("t5-tied"), hyperformer(**started))
    with pytest.raises(ValidationError, match="task_from names a task of the adapter that init_from gives"):
        hyperformer(task_from="b")


# HyperDecoder


def inputs(rows: int = 3, pads: tuple[int, ...] = (0, 2, 4)) -> tuple[Tensor, Tensor]:
    """Ids [B, 8] with padding on the right, and their mask."""
    ids = random_ids(rows, 8)
    mask = torch.stack([(torch.arange(8) < 8 - count).long() for count in pads[:rows]])
    return ids.masked_fill(mask == 0, PAD), mask


@pytest.mark.parametrize("process", [False, True], ids=["", "mlp"])
def test_a_rows_decoder_adapters_are_made_from_its_encoding(make_backbone: Make, process: bool) -> None:
    model, values = tuned(make_backbone("t5-tied"), hyperdecoder(process_encoder=process))
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def look(key: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
            seen[key] = (args[0], out)

        return hook

    for stack in ("encoder", "decoder"):
        for number, block in enumerate(getattr(model.backbone, stack).block):
            block.layer[-1].register_forward_hook(look(f"{stack}.{number}"))
    ids, mask = inputs()
    with torch.no_grad():
        output = model(ids, mask, decoder_input_ids=random_ids(3, 4))
    assert seen.keys() == {"encoder.0", "encoder.1", "decoder.0", "decoder.1"}
    plain = make_backbone("t5-tied")
    for key, (h, out) in seen.items():
        stack, number = key.split(".")
        part = getattr(plain, stack).block[int(number)].layer[-1]
        for row in range(3):
            own = f"{stack}.block.{number}.layer.{1 if stack == 'encoder' else 2}.adapter"
            if stack == "encoder":
                weights = {end: values[f"{own}.{end}"] for end in ("w_down", "b_down", "w_up", "b_up")}
            else:
                c = output.encoder_last_hidden_state[row, : int(mask[row].sum())].mean(0)
                if process:
                    first, second = (linear(values, f"hyper_network.process.{place}") for place in (0, 2))
                    c = second(first(c).relu())
                of_layer = values["hyper_network.layers"][int(number)]
                x = linear(values, "hyper_network.first")(torch.cat([c, of_layer])).relu()
                weights = {
                    end: linear(values, f"hyper_network.{end}")(x) for end in ("w_down", "b_down", "w_up", "b_up")
                }
            n = part.layer_norm(h[row])
            hidden = F.linear(n, weights["w_down"].view(3, WIDTH), weights["b_down"]).relu()
            added = F.linear(hidden, weights["w_up"].view(WIDTH, 3), weights["b_up"])
            with torch.no_grad():
                assert_equal_up_to_rounding(out[row], part(h[row]) + added)


def test_hyperdecoder_starts_within_the_published_bounds(make_backbone: Make) -> None:
    values = get_adept_model(make_backbone("t5-tied"), HyperDecoderConfig()).trainable_parameters()
    bounds = {"w_up": 64, "w_down": WIDTH, "b_up": 1, "b_down": 1}
    for name, inputs_ in bounds.items():
        weight = values[f"hyper_network.{name}.weight"].detach()
        assert float(weight.abs().max()) == pytest.approx(1e-3 * math.sqrt(3 / (128 * inputs_)), rel=0.02)
        assert not values[f"hyper_network.{name}.bias"].any()
    assert float(values["hyper_network.layers"].detach().std()) == pytest.approx(1, rel=0.4)
    of_encoder = values["encoder.block.0.layer.1.adapter.w_down"].detach()
    assert float(of_encoder.abs().max()) == pytest.approx(1e-4 * math.sqrt(6 / (64 + WIDTH)), rel=0.02)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
def test_a_batch_is_decoded_with_weights_that_are_made_once(make_backbone: Make, options: dict) -> None:
    model, _ = tuned(make_backbone("t5-tied"), hyperdecoder())
    calls: list[int] = []
    model.method.network.register_forward_hook(lambda _, args, out: calls.append(len(args[0])))
    options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [EOS, PAD], "pad_token_id": PAD} | options
    ids, mask = inputs()
    together = model.generate(ids, attention_mask=mask, **options)
    assert calls == [3]
    assert len({tuple(row) for row in together.tolist()}) == 3
    for row in range(3):
        length = int(mask[row].sum())
        alone = model.generate(ids[row : row + 1, :length], **options)
        assert torch.equal(together[row : row + 1], alone)


def test_samples_of_a_row_are_decoded_with_its_weights(make_backbone: Make) -> None:
    model, _ = tuned(make_backbone("t5-tied"), hyperdecoder())
    ids, mask = inputs()
    options = {"max_new_tokens": 4, "do_sample": True, "top_k": 1, "num_return_sequences": 2, "pad_token_id": PAD}
    options |= {"suppress_tokens": [EOS, PAD]}
    both = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(both[::2], both[1::2])
    greedy = options | {"do_sample": False, "top_k": None, "num_return_sequences": 1}
    assert torch.equal(both[::2], model.generate(ids, attention_mask=mask, **greedy))


SHAPE = {key: value for key, value in t5_config().to_dict().items() if key not in ("model_type", "architectures")}
BUILT_LIKE_T5 = {
    "mt5": lambda: MT5ForConditionalGeneration(MT5Config(**SHAPE)),
    "umt5": lambda: UMT5ForConditionalGeneration(UMT5Config(**SHAPE)),
    "longt5": lambda: LongT5ForConditionalGeneration(LongT5Config(**SHAPE)),
}


@pytest.mark.parametrize(
    ("kind", "config"),
    [*((kind, hyperdecoder()) for kind in BUILT_LIKE_T5), ("mt5", hyperformer()), ("umt5", hyperformer())],
)
def test_models_built_like_t5_have_gradients_for_all_that_is_trained(kind: str, config) -> None:
    model = far_from_start(get_adept_model(seeded(BUILT_LIKE_T5[kind]), config)).train()
    ids = random_ids(2, 7)
    model(ids, labels=random_ids(2, 4)).loss.backward()
    assert not [name for name, value in model.trainable_parameters().items() if value.grad is None]


def test_hyperdecoder_needs_t5s_feed_forward_parts(make_backbone: Make) -> None:
    with pytest.raises(UserError, match=r"method\.name is 'hyperdecoder'.*\(model type 'llama'\) has no such parts"):
        get_adept_model(make_backbone("llama"), hyperdecoder())
    bart = BartForConditionalGeneration(BartConfig(vocab_size=99, d_model=WIDTH, encoder_layers=1, decoder_layers=1))
    with pytest.raises(UserError, match=r"\(model type 'bart'\) has no such parts as T5's"):
        get_adept_model(bart, hyperdecoder())
    assert isinstance(get_adept_model(bart, hyperformer()), AdaptedModel)
