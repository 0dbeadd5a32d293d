"""The method itself: counts, initialisation, the offset, the folded table."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from adept_ds.config.method import AdeptConfig
from adept_ds.errors import UserError
from adept_ds.methods.adept import AdeptEmbedding, TokenSharedNetwork, down_projection_bound
from adept_ds.methods.soft_prompt import SoftPrompt
from adept_ds.model.adapted_model import get_adept_model
from tests.models import VOCABULARY, WIDTH


def embedding(
    dtype: torch.dtype = torch.float32, length: int = 3, bottleneck: int = 4, vocabulary: int = 50, width: int = 16
) -> AdeptEmbedding:
    """An embedding whose prompt and offsets are far from zero."""
    torch.manual_seed(0)
    table = nn.Embedding(vocabulary, width).requires_grad_(False).to(dtype)
    network = TokenSharedNetwork(width, bottleneck, 0.5, 0.0, None)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    return AdeptEmbedding(table, SoftPrompt(torch.randn(length, width)) if length else None, network)


def trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("width", "length", "bottleneck", "count"),
    [(768, 60, 19, 76_051), (1024, 60, 19, 101_395), (1024, 7, 1, 10_241), (4096, 7, 1, 40_961), (768, 0, 19, 29_971)],
)
def test_trained_count_is_l_d_plus_2_r_d_plus_r_plus_d(width, length, bottleneck, count):
    assert trained(embedding(length=length, bottleneck=bottleneck, vocabulary=5, width=width)) == count


def test_formula():
    module, ids = embedding(), torch.tensor([[50, 51, 52, 7, 49]])
    e, n = module.table.weight[ids[:, 3:]], module.network
    expected = e + torch.relu(e @ n.w_down + n.b1) @ n.w_up + n.b2
    torch.testing.assert_close(module(ids), torch.cat([module.soft_prompt.weight[None], expected], dim=1))


def test_a_new_network_has_no_offset():
    module = embedding()
    module.network = TokenSharedNetwork(16, 4, 0.5, 0.0, None)
    ids = torch.arange(50)[None]
    assert torch.equal(module(ids), module.table(ids))


def test_gradients_reach_every_trained_tensor_and_not_the_table():
    module = embedding()
    module(torch.tensor([[50, 1, 2]])).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters() if parameter.requires_grad)
    assert module.table.weight.grad is None


def test_only_prompt_positions_train_the_prompt():
    module = embedding()
    module(torch.tensor([[51, 1, 2]])).sum().backward()
    assert module.soft_prompt.weight.grad.abs().sum(1).tolist() == [0.0, 16.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_rows_are_bit_equal_to_live_ones(dtype):
    module = embedding(dtype)
    folded = module.folded_weight()
    assert folded.dtype == dtype
    assert torch.equal(folded, module(torch.arange(50)[None])[0])
    assert torch.equal(folded, module(torch.arange(50).view(5, 10)).view(50, -1))


def test_a_row_embedded_alone_is_the_folded_one_to_rounding():
    # The matrix product of one row may add up in another order than that of many.
    module = embedding(torch.bfloat16, bottleneck=8, vocabulary=2_000, width=64)
    folded, alone = module.folded_weight(), torch.cat([module(torch.tensor([[i]]))[0] for i in range(2_000)])
    # The next number in bf16 at most; where terms cancel, what rounding in fp32 leaves of the largest.
    fp32 = 64 * torch.finfo(torch.float32).eps * float(folded.abs().max())
    torch.testing.assert_close(alone, folded, rtol=torch.finfo(torch.bfloat16).eps, atol=fp32)
    assert (alone != folded).float().mean() < 1e-3


def test_folding_in_parts_gives_the_same_table():
    module = embedding()
    torch.testing.assert_close(module.folded_weight(rows=7), module.folded_weight())


def test_the_sum_is_rounded_once():
    module = embedding(torch.bfloat16)
    e, n = module.table.weight.double(), module.network
    exact = e + torch.relu(e @ n.w_down.double() + n.b1.double()) @ n.w_up.double() + n.b2.double()
    # Half a unit in the last place of bf16 is at most 2^-8 of the value.
    assert ((module.folded_weight() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()


def test_disabled_embedding_is_the_table():
    module, ids = embedding(), torch.arange(50)[None]
    module.enabled = False
    assert torch.equal(module(ids), module.table(ids))


def test_dropout_acts_on_the_bottleneck_in_training_only():
    module, ids = embedding(), torch.arange(50)[None]
    plain = module(ids)
    module.network.dropout.p = 0.5
    assert not torch.equal(module.train()(ids), plain)
    assert torch.equal(module.eval()(ids), plain)


@pytest.mark.parametrize(
    ("rule", "bound"), [("published", 1 / math.sqrt(19)), ("linear", 1 / math.sqrt(768))], ids=["published", "linear"]
)
def test_bound_of_w_down_by_rule(rule, bound):
    w_down = TokenSharedNetwork(768, 19, down_projection_bound(rule, 768, 19), 0.0, None).w_down.detach()
    assert w_down.abs().max() <= bound
    assert w_down.abs().max() > 0.99 * bound
    assert float(w_down.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_prompt_from_tokens_is_rows_of_the_table(make_backbone):
    backbone = make_backbone("llama")
    table = backbone.get_input_embeddings().weight
    prompt = get_adept_model(backbone, AdeptConfig(num_virtual_tokens=9)).trainable_parameters()["soft_prompt"]
    assert all(any(torch.equal(row, other) for other in table) for row in prompt)


def test_prompt_from_tokens_draws_among_the_first_5000(make_backbone):
    backbone = make_backbone("llama")
    backbone.resize_token_embeddings(20_000, mean_resizing=False)
    table = backbone.get_input_embeddings()
    with torch.no_grad():
        table.weight.copy_(torch.arange(20_000.0)[:, None].expand(-1, WIDTH))
    prompt = get_adept_model(backbone, AdeptConfig(num_virtual_tokens=2_000)).trainable_parameters()["soft_prompt"]
    assert 4_900 < prompt.max() < 5_000


@pytest.mark.parametrize(("length", "expected"), [(2, "ab"), (3, "abc"), (7, "abcabca")])
def test_prompt_from_text_is_repeated_or_cut(make_backbone, tokenizer, length, expected):
    backbone = make_backbone("llama")
    table = backbone.get_input_embeddings().weight
    config = AdeptConfig(num_virtual_tokens=length, prompt_init="text", prompt_init_text="abc")
    prompt = get_adept_model(backbone, config, tokenizer).trainable_parameters()["soft_prompt"]
    assert torch.equal(prompt, table[tokenizer.convert_tokens_to_ids(list(expected))])


def test_prompt_from_text_without_a_token_is_refused(make_backbone, tokenizer):
    config = AdeptConfig(prompt_init="text", prompt_init_text="")
    with pytest.raises(UserError, match=r"method\.prompt_init_text is '', which has no token"):
        get_adept_model(make_backbone("llama"), config, tokenizer)


def test_prompt_from_text_needs_a_tokenizer(make_backbone):
    with pytest.raises(UserError, match="needs the backbone's tokenizer"):
        get_adept_model(make_backbone("llama"), AdeptConfig(prompt_init="text", prompt_init_text="abc"))


@pytest.mark.parametrize(("std", "expected"), [(None, 0.3), (2.0, 2.0)])
def test_normal_prompt_has_the_tables_or_the_given_deviation(make_backbone, std, expected):
    backbone = make_backbone("llama")
    config = AdeptConfig(num_virtual_tokens=200, prompt_init="normal", prompt_init_std=std)
    prompt = get_adept_model(backbone, config).trainable_parameters()["soft_prompt"].detach()
    assert float(prompt.std()) == pytest.approx(expected, rel=0.05)
    assert abs(float(prompt.mean())) < 0.05 * expected


def test_initialisation_is_a_function_of_the_seed(make_backbone):
    def values(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(torch.seed())
        config = AdeptConfig(prompt_init="normal", bottleneck=3)
        return list(get_adept_model(make_backbone("llama"), config, seed=seed).trainable_parameters().values())

    assert all(torch.equal(a, b) for a, b in zip(values(1), values(1), strict=True))
    assert not torch.equal(values(1)[0], values(2)[0])


def test_trained_parameters_are_fp32_on_a_bf16_backbone(make_backbone):
    model = get_adept_model(make_backbone("llama").bfloat16(), AdeptConfig())
    assert {parameter.dtype for parameter in model.trainable_parameters().values()} == {torch.float32}


def test_a_backbone_on_the_meta_device_gets_its_parameters_there(make_backbone):
    model = get_adept_model(make_backbone("llama").to("meta"), AdeptConfig(num_virtual_tokens=7, bottleneck=2))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.count_parameters()[0] == 7 * WIDTH + 2 * 2 * WIDTH + 2 + WIDTH


def test_ids_of_the_prompt_start_at_the_vocabulary_size(make_backbone):
    model = get_adept_model(make_backbone("llama"), AdeptConfig(num_virtual_tokens=2))
    ids, _ = model.add_prompt(torch.tensor([[5]]), None)
    assert ids.tolist() == [[VOCABULARY, VOCABULARY + 1, 5]]
