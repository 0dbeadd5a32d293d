"""The throughput benchmark on small models: what is compared is comparable, and what is counted is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config

from adept_ds.backbone.frozen_linear import FrozenLinear
from adept_ds.backbone.load import load_architecture
from adept_ds.benchmark import Options, benchmark, measure, text_report
from adept_ds.benchmark.contenders import (
    AGAINST,
    AGAINST_ON_RANKS,
    DENSE,
    FLOOR,
    OURS,
    PACKED,
    PEFT_LORA,
    PEFT_PADDED,
    PEFT_PROMPT,
    STOCK_FLOOR,
    Contender,
    InputGradient,
    build_contenders,
)
from adept_ds.benchmark.flops import ModelFlops, peak_flops
from adept_ds.benchmark.memory import held_bytes, step_growth
from adept_ds.benchmark.operators import ATTENTION, BACKBONE, GROUPS, LINEAR, OTHER, event_groups
from adept_ds.benchmark.phases import BACKWARD, FORWARD, GATHER, LOSS, PHASES, STEP, PhaseClock, clocked
from adept_ds.benchmark.work import build_work, choose_batches
from adept_ds.cli import throughput
from adept_ds.config.batch import batch_arithmetic
from adept_ds.config.run import RunConfig
from adept_ds.errors import UserError
from tests.tolerances import assert_equal_up_to_rounding

CPU = torch.device("cpu")
EVERYTHING = ("peft", "peft-padded")
MIB = 2**20


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of the bundled problems on a random one-layer Llama with a token for each byte."""
    folder = tmp_path_factory.mktemp("llama")
    alphabet = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    # Rows of whole 4-bit blocks: of others bitsandbytes' own layers read wrong scales on processors with AVX-512.
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(alphabet), pad_token_id=0, **shape)).save_pretrained(folder)
    return {
        "model": {"name_or_path": str(folder), "dtype": "fp32"},
        "train": {"epochs": 100, "global_batch_size": 4},
    }


@pytest.fixture(scope="module")
def run(config: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(config)


def contenders_of(run: RunConfig, steps: int = 1, synthetic: tuple[int, ...] = (12,)) -> dict[str, Contender]:
    """All contenders on random weights, without dropout."""
    architecture = load_architecture(run.model)
    work = build_work(run, architecture, steps, synthetic, batch_arithmetic(run.train, 1))
    contenders = build_contenders(run, architecture, work, EVERYTHING, True, CPU)
    return {contender.name: contender for contender in contenders}


def changed(run: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    values = run.model_dump(by_alias=True)
    return RunConfig.model_validate({**values, **{name: values[name] | new for name, new in sections.items()}})


@pytest.fixture(scope="module")
def t5_run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A T5 of which there is the shape alone: no weights, no tokenizer."""
    folder = tmp_path_factory.mktemp("t5")
    T5Config(
        vocab_size=90,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    ).save_pretrained(folder)
    return RunConfig.model_validate(
        {
            "model": {"name_or_path": str(folder), "dtype": "fp32"},
            "data": {"max_prompt_length": 40, "max_length": 62},
            "train": {"max_steps": 1000, "global_batch_size": 2},
        }
    )


def real_rows(contender: Contender) -> list[list[int]]:
    return sorted(
        ids[mask == 1].tolist()
        for step in contender.steps
        for batch in step
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    )


def test_contenders_train_on_the_same_examples(run: RunConfig):
    contenders = contenders_of(run, 3, synthetic=())
    rows = real_rows(contenders[OURS])
    assert len(rows) == 12
    for name in (PEFT_PROMPT, PEFT_LORA, PEFT_PADDED):
        assert real_rows(contenders[name]) == rows
    for name in (FLOOR, STOCK_FLOOR):
        assert [row[run.method.num_virtual_tokens :] for row in real_rows(contenders[name])] == rows


def test_batches_are_padded_alike_unless_the_name_says_otherwise(run: RunConfig):
    contenders = contenders_of(run, 3, synthetic=())
    padded = {name: contender.padded_tokens for name, contender in contenders.items()}
    assert padded[OURS] == padded[FLOOR] == padded[STOCK_FLOOR] == padded[PEFT_PROMPT]
    assert padded[PEFT_LORA] == padded[OURS] - 12 * run.method.num_virtual_tokens
    assert padded[PEFT_PADDED] == 12 * run.data.max_length


def test_accumulation_splits_a_step_as_training_does(run: RunConfig):
    split = changed(run, train={"gradient_accumulation_steps": 2})
    whole, halves = contenders_of(run)[PEFT_LORA], contenders_of(split)[PEFT_LORA]
    assert [len(batch["input_ids"]) for batch in halves.steps[0]] == [2, 2]
    assert_equal_up_to_rounding(halves.forward_backward(0), whole.forward_backward(0))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_contenders_compute_the_same_loss_from_the_same_prompt(run: RunConfig, t5_run: RunConfig, family: str):
    contenders = contenders_of(t5_run if family == "t5" else run)
    prompt = contenders[OURS].model.trainable_parameters()["soft_prompt"].detach()
    with torch.no_grad():
        contenders[PEFT_PROMPT].model.prompt_encoder.default.embedding.weight.copy_(prompt)
    assert_equal_up_to_rounding(contenders[OURS].forward_backward(0), contenders[PEFT_PROMPT].forward_backward(0))


@pytest.mark.parametrize(("family", "quantization"), [("llama", None), ("llama", "nf4"), ("t5", None)])
def test_both_floors_are_the_same_function(run: RunConfig, t5_run: RunConfig, family: str, quantization: str | None):
    contenders = contenders_of(changed(t5_run if family == "t5" else run, model={"quantization": quantization}))
    gradients = []
    for name in (FLOOR, STOCK_FLOOR):
        backbone = contenders[name].backbone
        reader = backbone.get_encoder() if family == "t5" else backbone
        embedding = reader.get_input_embeddings()
        assert isinstance(embedding, InputGradient)
        embedded: list[Tensor] = []
        embedding.register_forward_hook(lambda _module, _ids, output, kept=embedded: kept.append(output))
        loss = contenders[name].forward_backward(0)
        gradients.append((loss, embedded[0].grad))
    for ours, theirs in zip(*gradients, strict=True):
        assert_equal_up_to_rounding(ours, theirs)


def test_a_stock_backbone_with_fewer_layers_in_4_bits_is_told(run: RunConfig, t5_run: RunConfig):
    def notes(run: RunConfig) -> list[str]:
        options = Options(steps=1, rounds=1, random_init=True, synthetic=(8,))
        return benchmark(changed(run, model={"quantization": "nf4"}), options)["notes"]

    assert any("28 of the 32 linear layers" in note for note in notes(t5_run))
    assert not any("linear layers" in note for note in notes(run))


def test_the_floor_trains_nothing(run: RunConfig):
    contenders = contenders_of(run)
    assert all(contenders[name].optimizer is None for name in (FLOOR, STOCK_FLOOR))


def test_contenders_share_the_frozen_weights(run: RunConfig):
    pointers = {
        next(p for name, p in contender.model.named_parameters() if "mlp.up_proj" in name).data_ptr()
        for contender in contenders_of(run).values()
    }
    assert len(pointers) == 1


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_every_adapter_is_trained(run: RunConfig, quantization: str | None):
    contenders = contenders_of(
        changed(run, model={"quantization": quantization}, train={"activation_checkpointing": True})
    )
    for name in (OURS, PEFT_PROMPT, PEFT_LORA, PEFT_PADDED):
        trained = [p for p in contenders[name].model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]
        contenders[name].forward_backward(0)
        contenders[name].update()
        assert any(not torch.equal(old, new) for old, new in zip(before, trained, strict=True)), name


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_8_bits_are_not_compared_with_peft(run: RunConfig, quantization: str):
    with pytest.raises(UserError, match=rf"--against: model\.quantization is '{quantization}'.*expected nf4"):
        contenders_of(changed(run, model={"quantization": quantization}))


def test_fp8_is_compared_with_dense_weights_and_its_speed_is_called_unmeasured(run: RunConfig):
    options = Options(steps=1, rounds=1, random_init=True, synthetic=(8,))
    result = benchmark(changed(run, model={"quantization": "fp8"}), options)
    assert list(result["contenders"]) == [OURS, FLOOR, DENSE]
    assert result["ratios"][DENSE]["goal"] == pytest.approx(1 / 1.35, abs=1e-3)
    assert any("speed has not been measured" in note for note in result["notes"])
    held = {name: own["memory_bytes"]["held"] for name, own in result["contenders"].items()}
    assert held[OURS] < held[DENSE]


def test_contenders_take_turns_and_every_phase_has_its_share(run: RunConfig):
    contenders = list(contenders_of(run).values())
    measure(contenders, rounds=2, device=CPU, show_progress=False)
    for contender in contenders:
        assert len(contender.rounds) == 2
        for phases in contender.rounds:
            assert list(phases) == list(PHASES)
            assert all(phases[phase] > 0 for phase in (FORWARD, LOSS, BACKWARD))
            assert phases[GATHER] == 0


def test_time_spent_fetching_is_taken_from_the_phase_around_it(monkeypatch: pytest.MonkeyPatch):
    now = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: next(now))

    class Coordinator:
        def fetch_sub_module(self, module: nn.Module, forward: bool) -> None:
            next(now)

    model, coordinator, clock = nn.Sequential(nn.Identity(), nn.Identity()), Coordinator(), PhaseClock(CPU)
    with clocked(clock, model, model[1], [(coordinator, "fetch_sub_module")]):
        clock.switch(FORWARD)  # at 0
        model[0].register_forward_hook(lambda *_: coordinator.fetch_sub_module(model, forward=True))
        model(torch.zeros(1))  # forward at 1, gather from 2 to 4, loss at 5, backward at 6
        clock.switch(STEP)  # at 7
        seconds = clock.stop()  # at 8
    assert seconds == {GATHER: 2, FORWARD: 3, LOSS: 1, BACKWARD: 1, STEP: 1}


def test_growth_is_the_peak_of_live_bytes():
    def step() -> None:
        kept = torch.ones(2 * MIB, dtype=torch.uint8)
        torch.ones(4 * MIB, dtype=torch.uint8)
        kept.add_(torch.ones(1 * MIB, dtype=torch.uint8).repeat(2))  # 2 + 1 + 2 MiB at most

    assert step_growth(step, CPU) == 6 * MIB


def test_shared_memory_is_held_once_and_optimizer_states_are_counted():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    assert held_bytes(model, None) == 8 * 8 * 4
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    assert held_bytes(model, optimizer) >= 3 * 8 * 8 * 4


def test_operations_of_a_decoder_are_the_usual_formula():
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=99, **shape)
    with torch.device("meta"):
        layers = LlamaForCausalLM(config).model.modules()
    weights = sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))
    expected = 4 * weights * 20 + 12 * 2 * 32 * 20**2 + 4 * 32 * 99 * 6
    assert ModelFlops(config).of_example(20, 6) == expected


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_operations_are_those_that_the_floor_does(run: RunConfig, t5_run: RunConfig, family: str):
    run = changed(t5_run if family == "t5" else run, model={"attn_implementation": "eager"})
    floor = contenders_of(run)[FLOOR]
    with FlopCounterMode(display=False) as counter:
        floor.forward_backward(0)
    batch = floor.steps[0][0]
    rows, positions = batch["input_ids"].shape
    labels = int((batch["labels"] != -100).sum()) // rows
    assert counter.get_total_flops() == rows * ModelFlops(floor.backbone.config).of_example(positions, labels)


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA A10G", None),
    ],
)
def test_peak_rate_is_that_of_the_very_device(device: str, tflops: int | None):
    assert peak_flops(device, torch.bfloat16) == (tflops and tflops * 1e12)


def test_there_is_no_peak_rate_in_fp32():
    assert peak_flops("NVIDIA H200", torch.float32) is None


def test_batches_are_spread_over_the_lengths():
    lengths = list(range(100))
    longest = [max(lengths[index] for index in batch) for batch in choose_batches(lengths, 4, 5, seed=0)]
    assert longest == sorted(longest)
    assert longest[0] < 30
    assert longest[-1] > 70


def test_more_steps_than_batches_are_refused():
    with pytest.raises(UserError, match=r"--steps is 26, but the data has 25 batches of 4"):
        choose_batches(list(range(100)), 4, 26, seed=0)


def test_operators_belong_to_the_part_that_they_are_in_forward_and_backward():
    linear, x = FrozenLinear(nn.Linear(8, 8)).requires_grad_(False), torch.randn(1, 2, 5, 8, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        with record_function(BACKBONE):
            with record_function(LINEAR):
                y = linear(x)
            z = F.scaled_dot_product_attention(y, y, y, is_causal=True)
        z.sum().backward()
    events = list(profiler.events())
    of_operator: dict[str, list[str]] = {}
    for event, group in zip(events, event_groups(events), strict=True):
        of_operator.setdefault(event.name, []).append(group)
    assert of_operator["aten::addmm"] == [LINEAR]
    assert of_operator["aten::mm"] == [LINEAR]  # of the gradient
    assert of_operator["_FrozenLinearFunctionBackward"] == [LINEAR]
    assert of_operator["aten::_scaled_dot_product_flash_attention_for_cpu"] == [ATTENTION]
    assert of_operator["aten::_scaled_dot_product_flash_attention_for_cpu_backward"] == [ATTENTION]


def test_every_part_of_a_step_has_its_share(run: RunConfig):
    seconds = benchmark(run, Options(steps=1, rounds=1))["operator_seconds"]
    assert list(seconds) == list(GROUPS)
    assert all(own > 0 for own in seconds.values())
    assert seconds[OTHER] < 0.5 * sum(seconds.values())


def test_a_shape_is_enough_for_random_weights_and_tokens(t5_run: RunConfig):
    result = benchmark(t5_run, Options(steps=1, rounds=1, against=("peft",), random_init=True, synthetic=(20,)))
    assert list(result["contenders"]) == [OURS, FLOOR, STOCK_FLOOR, PEFT_PROMPT, PEFT_LORA]
    assert result["tokens"] == 2 * (20 + 20)
    assert all(own["model_tflops_per_second"] > 0 for own in result["contenders"].values())


def test_checkpointing_lowers_the_memory_of_a_step(run: RunConfig):
    def growth(on: bool) -> int:
        options = Options(steps=1, rounds=1, random_init=True, synthetic=(100,))
        result = benchmark(changed(run, train={"activation_checkpointing": on}), options)
        return result["contenders"][OURS]["memory_bytes"]["step"]

    assert growth(True) < growth(False)


def test_report_and_file_have_the_same_figures(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file, out = tmp_path / "run.json", tmp_path / "throughput.json"
    file.write_text(json.dumps(config))
    arguments = ["--config", str(file), "--against", "peft-lora", "--steps", "1", "--rounds", "2", "--out", str(out)]
    throughput.main(arguments)
    result = json.loads(out.read_text())
    assert list(result["contenders"]) == [OURS, FLOOR, STOCK_FLOOR, PEFT_LORA]
    assert result["ratios"][FLOOR]["goal"] == 1.05
    printed = capsys.readouterr().out
    assert printed == text_report(result) + "\n"
    assert "goal: at most 1.05" in printed
    assert "no MFU" in printed


def test_the_flag_offers_what_there_is():
    assert tuple(AGAINST) == throughput.AGAINST
    assert tuple(AGAINST_ON_RANKS) == throughput.AGAINST_ON_RANKS


def test_steps_must_be_a_count(config: dict[str, Any], tmp_path: Path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"--steps: '0': expected an integer >= 1"):
        throughput.main(["--config", str(file), "--steps", "0"])


def test_packed_rows_are_measured_on_the_same_examples(config: dict[str, Any]) -> None:
    sections = {
        "train": config["train"] | {"packing": 60, "global_batch_size": 6},
        "data": {"max_length": 50, "max_prompt_length": 30},
    }
    run = RunConfig.model_validate(config | sections)
    result = benchmark(run, Options(steps=2, rounds=1, random_init=True, synthetic=(5, 9, 30), cpu_seconds=True))
    padded, packed = (result["contenders"][name] for name in (OURS, PACKED))
    for contender in (padded, packed):
        assert contender["tokens_per_second"] / contender["examples_per_second"] == pytest.approx(44 / 3)
    filled = result["tokens"] + run.method.num_virtual_tokens * result["examples"]
    positions = filled / (1 - packed["padding_share"])
    assert positions / 60 == pytest.approx(round(positions / 60))
    assert padded["padding_share"] == 0  # one example a micro-batch
    assert "packed: 1 x 60 positions a forward pass; others: 1 examples" in text_report(result)
    with pytest.raises(UserError, match="the longest example has"):
        benchmark(run, Options(steps=1, rounds=1, random_init=True, synthetic=(70,)))
