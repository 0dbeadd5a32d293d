"""The adapted model: equality with PEFT's prompt tuning, padding, decoding, what stays untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, StoppingCriteria

from adept_ds.config.method import AdeptConfig
from adept_ds.errors import UserError
from adept_ds.methods import Untuned
from adept_ds.model.adapted_model import AdaptedModel, get_adept_model
from tests.models import EOS, PAD, VOCABULARY, WIDTH
from tests.tolerances import assert_equal_up_to_rounding

LENGTH = 5
CAUSAL = ("llama", "gpt2", "codegen")
T5 = ("t5-tied", "t5-untied")

Make = Callable[[str], PreTrainedModel]


def adapted(backbone: PreTrainedModel, length: int = LENGTH, std: float = 0.3) -> AdaptedModel:
    """A model whose prompt and offsets are as large as its embeddings."""
    model = get_adept_model(backbone, AdeptConfig(num_virtual_tokens=length, bottleneck=4)).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.trainable_parameters().values():
        nn.init.normal_(parameter, std=std, generator=generator)
    return model


def random_ids(rows: int, columns: int, seed: int = 4) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(seed))


def padded(ids: Tensor, pads: int, side: str) -> dict[str, Tensor]:
    """The ids with their mask behind (`right`) or after (`left`) so many pads."""
    pad, zero = torch.full((ids.shape[0], pads), PAD), torch.zeros(ids.shape[0], pads, dtype=torch.long)
    columns, mask = (
        ([pad, ids], [zero, torch.ones_like(ids)]) if side == "left" else ([ids, pad], [torch.ones_like(ids), zero])
    )
    return {"input_ids": torch.cat(columns, 1), "attention_mask": torch.cat(mask, 1)}


def prompt_of(model: AdaptedModel) -> Tensor:
    return model.trainable_parameters()["soft_prompt"].detach()


# Counts and the frozen rest


@pytest.mark.parametrize("name", CAUSAL + T5)
def test_trained_count(make_backbone: Make, name):
    backbone = make_backbone(name)
    before = sum(parameter.numel() for parameter in backbone.parameters())
    model = get_adept_model(backbone, AdeptConfig(num_virtual_tokens=7, bottleneck=2))
    count = 7 * WIDTH + 2 * 2 * WIDTH + 2 + WIDTH
    assert model.count_parameters() == (count, before + count)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == count


def test_print_trainable_parameters(make_backbone: Make, capsys):
    get_adept_model(
        make_backbone("llama"), AdeptConfig(num_virtual_tokens=7, bottleneck=1)
    ).print_trainable_parameters()
    assert capsys.readouterr().out == "trainable params: 321 || all params: 22,177 || trainable%: 1.4474\n"


def test_a_training_step_changes_the_trained_tensors_alone(make_backbone: Make):
    backbone = make_backbone("t5-tied")
    model = adapted(backbone)
    trained = {id(parameter) for parameter in model.trainable_parameters().values()}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(random_ids(2, 6), labels=random_ids(2, 4)).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) not in trained), name


def test_a_backbone_takes_one_method(make_backbone: Make):
    backbone = make_backbone("llama")
    get_adept_model(backbone, AdeptConfig())
    with pytest.raises(UserError, match="has a method in it already"):
        get_adept_model(backbone, AdeptConfig())


# Without offset it is prompt tuning


def peft_prompt_tuning(backbone: PreTrainedModel, prompt: Tensor) -> nn.Module:
    seq2seq = backbone.config.is_encoder_decoder
    config = PromptTuningConfig(
        task_type=TaskType.SEQ_2_SEQ_LM if seq2seq else TaskType.CAUSAL_LM,
        num_virtual_tokens=len(prompt),
        num_transformer_submodules=1,
        token_dim=WIDTH,
    )
    model = get_peft_model(backbone, config)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(prompt)
    return model.eval()


@pytest.mark.parametrize("name", ["llama", "codegen"])
def test_a_new_causal_model_equals_peft_prompt_tuning(make_backbone: Make, name):
    model = get_adept_model(make_backbone(name), AdeptConfig(num_virtual_tokens=LENGTH)).eval()
    peft_model = peft_prompt_tuning(make_backbone(name), prompt_of(model))
    batch = padded(random_ids(3, 9), 2, "right")
    expected = peft_model(**batch).logits
    assert_equal_up_to_rounding(model(**batch).logits[:, :-2], expected[:, :-2])


@pytest.mark.parametrize("name", T5)
def test_a_new_t5_equals_peft_prompt_tuning(make_backbone: Make, name):
    model = get_adept_model(make_backbone(name), AdeptConfig(num_virtual_tokens=LENGTH)).eval()
    peft_model = peft_prompt_tuning(make_backbone(name), prompt_of(model))
    batch = padded(random_ids(3, 9), 2, "right") | {"decoder_input_ids": random_ids(3, 4, seed=5)}
    assert_equal_up_to_rounding(model(**batch).logits, peft_model(**batch).logits)


def test_the_loss_of_a_new_model_equals_pefts(make_backbone: Make):
    model = get_adept_model(make_backbone("llama"), AdeptConfig(num_virtual_tokens=LENGTH)).eval()
    peft_model = peft_prompt_tuning(make_backbone("llama"), prompt_of(model))
    batch = padded(random_ids(3, 9), 2, "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert_equal_up_to_rounding(model(**batch, labels=labels).loss, peft_model(**batch, labels=labels).loss)


# The prompt's place


def test_the_prompt_stands_directly_before_the_tokens(make_backbone: Make):
    model = get_adept_model(make_backbone("llama"), AdeptConfig(num_virtual_tokens=2))
    v = VOCABULARY
    ids = torch.tensor([[PAD, PAD, 5, 6], [7, 8, PAD, PAD], [5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    ids, mask = model.add_prompt(ids, mask)
    assert ids.tolist() == [[PAD, PAD, v, v + 1, 5, 6], [v, v + 1, 7, 8, PAD, PAD], [v, v + 1, 5, 6, 7, 8]]
    assert mask.tolist() == [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1] * 6]


def test_a_pad_id_that_is_also_a_token_is_no_padding(make_backbone: Make):
    model = get_adept_model(make_backbone("llama"), AdeptConfig(num_virtual_tokens=1))
    ids, mask = model.add_prompt(torch.tensor([[PAD, 5]]), None)
    assert ids.tolist() == [[VOCABULARY, PAD, 5]]
    assert mask.tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("name", CAUSAL + T5)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_output(make_backbone: Make, name, side):
    model, ids = adapted(make_backbone(name)), random_ids(2, 6)
    extra = {"decoder_input_ids": random_ids(2, 4, seed=5)} if model.is_encoder_decoder else {}
    batch = padded(ids, 5, side)
    actual, expected = model(**batch, **extra).logits, model(ids, **extra).logits
    if not model.is_encoder_decoder:
        actual = actual[:, -expected.shape[1] :] if side == "left" else actual[:, : expected.shape[1]]
    assert_equal_up_to_rounding(actual, expected)


# Decoding


def greedy_by_full_recompute(model: AdaptedModel, ids: Tensor, new_tokens: int) -> Tensor:
    """Decode with nothing of the library but the backbone's `inputs_embeds`: the formula, a concatenation, argmax."""
    embedding = model.method.embedding
    network, table = embedding.network, embedding.table.weight
    for _ in range(new_tokens):
        e = table[ids]
        offset = torch.relu(e @ network.w_down + network.b1) @ network.w_up + network.b2
        inputs = torch.cat([embedding.soft_prompt.weight.expand(len(ids), -1, -1), e + offset], dim=1)
        logits = model.backbone(inputs_embeds=inputs).logits[:, -1]
        logits[:, EOS] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


NEW = 12
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_generated_tokens_get_the_offset(make_backbone: Make, name, use_cache):
    model, ids = adapted(make_backbone(name)), random_ids(4, 6)
    expected = greedy_by_full_recompute(model, ids, NEW)
    assert torch.equal(model.generate(ids, use_cache=use_cache, **GREEDY), expected)
    with model.disable_adapter():
        assert not torch.equal(model.generate(ids, **GREEDY), expected)


@torch.no_grad()
def test_an_offset_on_the_read_tokens_alone_would_decode_differently(make_backbone: Make):
    # Otherwise the test above would prove nothing.
    model, ids = adapted(make_backbone("llama")), random_ids(4, 6)
    embedding, read = model.method.embedding, []

    def offset_first_forward_only(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        read.append(args[0])
        return output if len(read) == 1 else embedding.table(args[0])

    handle = embedding.register_forward_hook(offset_first_forward_only)
    wrong = model.generate(ids, **GREEDY)
    handle.remove()
    assert not torch.equal(wrong, model.generate(ids, **GREEDY))


@pytest.mark.parametrize("name", T5)
@torch.no_grad()
def test_t5_generation_is_greedy_decoding_of_its_forward(make_backbone: Make, name):
    model, ids = adapted(make_backbone(name)), random_ids(4, 6)
    decoded = torch.full((4, 1), PAD)
    for _ in range(NEW):
        logits = model(ids, decoder_input_ids=decoded).logits[:, -1]
        logits[:, EOS] = -torch.inf
        decoded = torch.cat([decoded, logits.argmax(-1, keepdim=True)], dim=1)
    for use_cache in (True, False):
        assert torch.equal(model.generate(ids, use_cache=use_cache, **GREEDY), decoded)


@pytest.mark.parametrize("pads", [1, 3, 8, 24])
@pytest.mark.parametrize("name", CAUSAL + T5)
def test_left_padding_does_not_change_generation(make_backbone: Make, name, pads):
    model, ids = adapted(make_backbone(name)), random_ids(3, 6)
    start = 1 if model.is_encoder_decoder else 6
    padded_start = start if model.is_encoder_decoder else start + pads
    actual = model.generate(**padded(ids, pads, "left"), **GREEDY)[:, padded_start:]
    assert torch.equal(actual, model.generate(ids, **GREEDY)[:, start:])


@pytest.mark.parametrize("name", CAUSAL + T5)
def test_rows_do_not_depend_on_their_batch(make_backbone: Make, name):
    model = adapted(make_backbone(name))
    rows = [random_ids(1, length, seed=length) for length in (3, 7, 12)]
    mixed = [padded(row, 12 - row.shape[1], "left") for row in rows]
    batch = {key: torch.cat([row[key] for row in mixed]) for key in mixed[0]}
    together = model.generate(**batch, **GREEDY)
    for row, sequence in zip(rows, together, strict=True):
        assert torch.equal(model.generate(row, **GREEDY)[0, -NEW:], sequence[-NEW:])


@pytest.mark.parametrize("name", CAUSAL + T5)
def test_beams_do_not_depend_on_padding(make_backbone: Make, name):
    model, ids = adapted(make_backbone(name)), random_ids(2, 6)
    beams = GREEDY | {"num_beams": 4, "num_return_sequences": 3}
    alone, moved = model.generate(ids, **beams), model.generate(**padded(ids, 11, "left"), **beams)
    assert alone.shape[0] == 6
    assert torch.equal(alone[:, -NEW:], moved[:, -NEW:])


@torch.no_grad()
def test_beam_search_finds_at_least_the_greedy_score(make_backbone: Make):
    model, ids = adapted(make_backbone("llama")), random_ids(3, 6)

    def score(sequences: Tensor) -> Tensor:
        logits = model(sequences).logits[:, LENGTH:].log_softmax(-1)
        return logits[:, 5:-1].gather(-1, sequences[:, 6:, None]).sum((1, 2))

    options = {"max_new_tokens": 3, "min_new_tokens": 3}
    greedy, beams = model.generate(ids, **options), model.generate(ids, num_beams=64, **options)
    assert (score(beams) >= score(greedy) - 1e-4).all()


# Generation options mean what they mean for the backbone

OPTIONS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.8},
    "no_repeat_ngram_size 1": {"no_repeat_ngram_size": 1},
    "no_repeat_ngram_size 2": {"no_repeat_ngram_size": 2},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.8},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "max_length": {"max_length": 11, "max_new_tokens": None, "min_new_tokens": None},
    "min_length": {"min_length": 14, "min_new_tokens": None},
    "forced_eos_token_id": {"forced_eos_token_id": EOS},
    "bad_words_ids": {"bad_words_ids": [[5], [6, 7], [8, 9, 10]]},
    "exponential_decay": {"exponential_decay_length_penalty": (4, 3.0), "min_new_tokens": None},
    "beams": {"num_beams": 3, "repetition_penalty": 1.8},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5-tied"])
def test_options_run_with_a_prompt_and_padding(make_backbone: Make, name, option):
    model, ids = adapted(make_backbone(name)), random_ids(3, 6)
    options = GREEDY | OPTIONS[option]
    sequences = model.generate(**padded(ids, 4, "left"), **options)
    assert sequences.max() < VOCABULARY
    if not model.is_encoder_decoder:
        assert torch.equal(sequences[:, 4:10], ids)
    if not option.startswith("encoder_") and ("length" not in option or model.is_encoder_decoder):
        # A limit in columns and penalties on what the encoder reads count the pads; all else is the same without them.
        columns = min(sequences.shape[1] - (0 if model.is_encoder_decoder else 10), NEW)
        assert torch.equal(sequences[:, -columns:], model.generate(ids, **options)[:, -columns:])


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5-tied"])
def test_options_with_the_adapter_disabled_are_the_backbones(make_backbone: Make, name, option):
    batch = padded(random_ids(3, 6), 2, "left")
    model = adapted(make_backbone(name))
    expected = make_backbone(name).generate(**batch, **(GREEDY | OPTIONS[option]))
    with model.disable_adapter():
        assert torch.equal(model.generate(**batch, **(GREEDY | OPTIONS[option])), expected)


def test_max_length_does_not_count_the_prompt(make_backbone: Make):
    model, ids = adapted(make_backbone("llama")), random_ids(2, 6)
    assert model.generate(ids, max_length=10, min_length=10).shape == (2, 10)
    model.backbone.generation_config.max_length = 9
    assert model.generate(ids, min_length=9).shape == (2, 9)


def test_min_length_does_not_count_the_prompt(make_backbone: Make):
    model, ids = adapted(make_backbone("llama")), random_ids(2, 6)
    favour_eos = {"sequence_bias": {(EOS,): 1e4}}
    assert model.generate(ids, min_length=9, max_length=20, **favour_eos).shape == (2, 10)
    assert model.generate(ids, min_new_tokens=4, max_new_tokens=20, **favour_eos).shape == (2, 11)
    assert model.generate(ids, min_length=9, **favour_eos).shape == (2, 10)


def test_repetition_penalty_leaves_padding_and_prompt_out(make_backbone: Make):
    model, ids = adapted(make_backbone("llama")), random_ids(1, 6)
    # With pads as the likeliest token, a penalty on them would show.
    options = GREEDY | {"repetition_penalty": 50.0, "max_new_tokens": 1, "min_new_tokens": 1}
    alone = model.generate(ids, output_logits=True, output_scores=True, return_dict_in_generate=True, **options)
    moved = model.generate(**padded(ids, 4, "left"), output_scores=True, return_dict_in_generate=True, **options)
    torch.testing.assert_close(moved.scores[0], alone.scores[0], rtol=1e-4, atol=1e-3)
    changed = (alone.scores[0] != alone.logits[0])[0].nonzero().flatten().tolist()
    assert sorted({*changed} - {EOS}) == sorted({*ids[0].tolist()})


def test_no_repeat_ngram_bans_what_was_read_and_no_more(make_backbone: Make):
    model = adapted(make_backbone("llama"))
    ids = torch.tensor([[5, 5, 9, 7, 5]])
    options = {"max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True, "no_repeat_ngram_size": 2}
    (scores,) = model.generate(ids, **options).scores
    assert scores[0].isinf().nonzero().flatten().tolist() == [5, 9]
    (scores,) = model.generate(ids[:, 1:], **options).scores
    assert scores[0].isinf().nonzero().flatten().tolist() == [9]


def test_stop_strings_of_transformers(make_backbone: Make, tokenizer):
    model, ids = adapted(make_backbone("llama")), random_ids(1, 6)
    free = model.generate(ids, **GREEDY)
    stop = tokenizer.decode(free[0, 8:10])
    stopped = model.generate(ids, stop_strings=[stop], tokenizer=tokenizer, **GREEDY)
    assert torch.equal(stopped, free[:, : stopped.shape[1]])
    assert tokenizer.decode(stopped[0]).endswith(stop)
    assert stopped.shape[1] <= 10


def test_stopping_criteria_see_the_sequence_without_the_prompt(make_backbone: Make):
    model, ids, seen = adapted(make_backbone("llama")), random_ids(2, 6), []

    class Record(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            seen.append(input_ids)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    sequences = model.generate(ids, stopping_criteria=[Record()], **GREEDY)
    assert torch.equal(seen[0], sequences[:, :7])
    assert torch.equal(seen[-1], sequences)


def test_generate_leaves_the_backbone_as_it_was(make_backbone: Make):
    model = adapted(make_backbone("llama"))
    before = dict(vars(model.backbone))
    model.generate(random_ids(2, 6), **GREEDY)
    assert vars(model.backbone) == before


def test_sampling_is_that_of_transformers(make_backbone: Make):
    model, ids = adapted(make_backbone("llama")), random_ids(2, 6)
    draws = []
    for pads in (0, 4):
        torch.manual_seed(0)
        draws.append(model.generate(**padded(ids, pads, "left"), **(GREEDY | {"do_sample": True}))[:, -NEW:])
    assert torch.equal(*draws)


# What ADePT does not touch


@pytest.mark.parametrize("name", T5)
@torch.no_grad()
def test_t5_decoder_and_head_are_the_backbones(make_backbone: Make, name):
    plain, model = make_backbone(name), adapted(make_backbone(name))
    encoded = torch.randn(2, 7, WIDTH)
    arguments = {"encoder_outputs": (encoded,), "decoder_input_ids": random_ids(2, 4)}
    assert torch.equal(model.backbone(**arguments).logits, plain(**arguments).logits)
    assert torch.equal(model.backbone.lm_head.weight, plain.lm_head.weight)
    assert torch.equal(model.backbone.decoder.embed_tokens.weight, plain.decoder.embed_tokens.weight)
    assert torch.equal(model.backbone.shared.weight, plain.shared.weight)


@torch.no_grad()
def test_t5_encoder_reads_the_offset(make_backbone: Make):
    model, ids = adapted(make_backbone("t5-tied")), random_ids(2, 6)
    embedding = model.method.embedding
    expected = make_backbone("t5-tied").encoder(
        inputs_embeds=torch.cat([prompt_of(model).expand(2, -1, -1), embedding.folded_weight()[ids]], dim=1)
    )
    actual = model.backbone.encoder(model.add_prompt(ids, None)[0])
    assert_equal_up_to_rounding(actual.last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("name", CAUSAL + T5)
@torch.no_grad()
def test_disabled_adapter_is_the_backbone(make_backbone: Make, name):
    plain, model = make_backbone(name), adapted(make_backbone(name))
    batch = padded(random_ids(3, 6), 3, "right")
    if model.is_encoder_decoder:
        batch["decoder_input_ids"] = random_ids(3, 4, seed=5)
    adapted_logits = model(**batch).logits
    with model.disable_adapter():
        disabled = model(**batch).logits
    # A bias is added in a step of its own, which may round differently.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if name == "codegen" else {"rtol": 0, "atol": 0}
    # Behind the tokens of a decoder-only model is padding, at other positions.
    torch.testing.assert_close(disabled[:, :6], plain(**batch).logits[:, :6], **tolerance)
    assert torch.equal(model(**batch).logits, adapted_logits)


def test_an_exception_in_disable_adapter_enables_it_again(make_backbone: Make):
    model = adapted(make_backbone("llama"))
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert model.num_virtual_tokens == LENGTH
    assert model.method.embedding.enabled


def test_untuned_is_the_backbone(make_backbone: Make):
    plain, ids = make_backbone("llama"), random_ids(2, 6)
    model = AdaptedModel(make_backbone("llama"), Untuned()).eval()
    assert model.count_parameters()[0] == 0
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert torch.equal(model.generate(ids, **GREEDY), plain.generate(ids, **GREEDY))


def test_without_a_prompt_the_offset_is_all(make_backbone: Make):
    model, ids = adapted(make_backbone("llama"), length=0), random_ids(2, 6)
    plain = make_backbone("llama")
    plain.get_input_embeddings().weight.data.copy_(model.method.embedding.folded_weight())
    assert_equal_up_to_rounding(model(ids).logits, plain(ids).logits)
    assert torch.equal(model.generate(ids, **GREEDY), plain.generate(ids, **GREEDY))


@pytest.mark.parametrize("name", ["llama", "t5-tied"])
def test_activation_checkpointing_does_not_change_gradients(make_backbone: Make, name):
    gradients = []
    for checkpointing in (False, True):
        model = adapted(make_backbone(name)).train()
        if checkpointing:
            model.checkpoint_activations()
        model(random_ids(2, 6), labels=random_ids(2, 6 if name == "llama" else 4)).loss.backward()
        gradients.append([parameter.grad for parameter in model.trainable_parameters().values()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert_equal_up_to_rounding(checkpointed, plain)
