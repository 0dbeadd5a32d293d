"""Decoding with refill: the samples are those of batches that are decoded to their ends, whatever comes and goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TopKLogitsWarper, TopPLogitsWarper

from adept_ds.config.method import AdeptConfig, PromptTuningConfig
from adept_ds.config.run import DataConfig, GenerationConfig
from adept_ds.contexts import attribute_set
from adept_ds.data.problems import load_problems
from adept_ds.distributed import World
from adept_ds.evaluation import generate, refill
from adept_ds.evaluation.generate import generate_samples
from adept_ds.evaluation.sampling import CANDIDATES, Sampling, generator_of
from adept_ds.formats import Problem, Sample
from adept_ds.methods import Untuned
from adept_ds.model.adapted_model import AdaptedModel, get_adept_model
from adept_ds.model.slots import PromptReader, refusal
from tests.models import VOCABULARY, causal, seeded
from tests.test_methods import METHODS, OF_CAUSAL_MODELS, far_from_start, source_prompts  # noqa: F401  (a fixture)
from tests.tolerances import assert_equal_up_to_rounding

Make = Callable[[str], PreTrainedModel]
DATA = DataConfig(format="mbpp-paper", max_prompt_length=90, max_length=200)
LENGTHS = (60, 9, 33, 4, 18, 47, 5, 21, 12)
"""Characters of the prompts, which are as many tokens."""
OF_ONE_TASK = [name for name in OF_CAUSAL_MODELS if not METHODS[name].prompt_tasks]


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    found = load_problems(DataConfig(format="mbpp-paper"), "test")
    return [
        replace(problem, prompt=problem.prompt[:length], stop=())
        for problem, length in zip(found, LENGTHS, strict=False)
    ]


def config(**changes: Any) -> GenerationConfig:
    return GenerationConfig.model_validate({"max_new_tokens": 24, "batch_size": 3, "stop": ()} | changes)


def both(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: list[Problem],
    cfg: GenerationConfig,
    world: World,
) -> tuple[list[Sample], list[Sample]]:
    """Samples with refill, and those of static batches."""
    assert refusal(model) is None
    refilled = generate_samples(model, tokenizer, problems, cfg, DATA, world)
    with attribute_set(generate, "refusal", lambda model: "for comparison"):
        return refilled, generate_samples(model, tokenizer, problems, cfg, DATA, world)


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_samples": 4, "top_k": 9}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("method", OF_ONE_TASK)
def test_samples_are_those_of_static_batches(
    make_backbone: Make, tokenizer, world: World, problems, method: str, options: dict[str, Any]
) -> None:
    model = far_from_start(get_adept_model(make_backbone("llama"), METHODS[method]))
    refilled, static = both(model, tokenizer, problems, config(**options), world)
    assert refilled == static
    assert len({sample.completion for sample in refilled}) > len(LENGTHS) // 2


@pytest.mark.parametrize("name", ["codegen", "gpt2", "opt", "falcon", "gpt_neox", "stablelm", "qwen2", "olmo2"])
def test_other_families_decode_with_refill(make_backbone: Make, tokenizer, world: World, problems, name: str) -> None:
    own = {"opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "falcon": {"alibi": True}}
    changes = own.get(name, {"num_key_value_heads": 2})
    made = make_backbone(name) if name in ("codegen", "gpt2") else seeded(causal(name, **changes))
    model = far_from_start(get_adept_model(made, METHODS["adept"]))
    refilled, static = both(model, tokenizer, problems, config(num_samples=2), world)
    assert refilled == static


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: causal("mistral", sliding_window=8, num_key_value_heads=2), "DynamicSlidingWindowLayer"),
        (lambda: causal("mamba"), "in a way of its own"),
        (lambda: causal("bloom"), "position_ids"),
    ],
    ids=["sliding window", "state space", "no positions"],
)
def test_other_caches_are_decoded_in_static_batches_and_that_is_told(
    tokenizer, world: World, problems, capsys: pytest.CaptureFixture[str], build, reason: str
) -> None:
    model = AdaptedModel(seeded(build()), Untuned()).eval()
    runs = [
        generate_samples(model, tokenizer, problems, config(do_sample=False, batch_size=size), DATA, world)
        for size in (1, 4)
    ]
    assert runs[0] == runs[1]
    assert reason in capsys.readouterr().err


def test_a_prompt_without_a_token_changes_no_other_sample(
    make_backbone: Make, tokenizer, world: World, problems
) -> None:
    model = far_from_start(get_adept_model(make_backbone("llama"), METHODS["adept"]))
    cfg = config(do_sample=False)
    mixed = generate_samples(model, tokenizer, [replace(problems[0], prompt=""), problems[1]], cfg, DATA, world)
    assert mixed[1:] == generate_samples(model, tokenizer, problems[1:2], cfg, DATA, world)


def test_stop_strings_and_ends_hold_across_refills(make_backbone: Make, tokenizer, world: World, problems) -> None:
    model = far_from_start(get_adept_model(make_backbone("llama"), METHODS["adept"]))
    free, _ = both(model, tokenizer, problems, config(num_samples=4), world)
    stop = tuple(sorted({sample.completion[9:11] for sample in free if len(sample.completion) > 10}))[:3]
    refilled, static = both(model, tokenizer, problems, config(num_samples=4, stop=stop), world)
    assert refilled == static != free
    for one, other in zip(refilled, free, strict=True):
        assert one.completion == other.completion[: min([len(other.completion), *_places(other.completion, stop)])]


def _places(text: str, stop: tuple[str, ...]) -> list[int]:
    return [text.find(string) for string in stop if string in text]


def test_rows_that_are_done_make_room(make_backbone: Make, tokenizer, world: World, problems) -> None:
    model = far_from_start(get_adept_model(make_backbone("llama"), METHODS["adept"]))
    free, _ = both(model, tokenizer, problems, config(do_sample=False), world)
    # Some rows end early, so that the others would wait for the longest.
    stop = tuple(sample.completion[:2] for sample in free[::2])
    calls: list[int] = []
    handle = model.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    both(model, tokenizer, problems, config(do_sample=False, stop=stop), world)
    handle.remove()
    first_static = len(calls) - 1 - calls[::-1].index(max(calls[::-1]))
    refilled, static = calls[:first_static], calls[first_static:]
    assert len(refilled) < len(static)


def test_rows_move_to_the_front_when_the_columns_are_full(
    make_backbone: Make, tokenizer, world: World, problems, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adept_ds.model.slots.SPARE_COLUMNS", 2)
    model = far_from_start(get_adept_model(make_backbone("llama"), METHODS["prefix"]))
    refilled, static = both(model, tokenizer, problems, config(num_samples=3, batch_size=2), world)
    assert refilled == static


def test_without_a_size_the_memory_decides(
    make_backbone: Make, tokenizer, world: World, problems, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = far_from_start(get_adept_model(make_backbone("llama"), METHODS["adept"]))
    rows: list[int] = []
    model.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    many = generate_samples(model, tokenizer, problems, config(batch_size=None), DATA, world)
    assert max(rows) == len(problems)
    rows.clear()
    monkeypatch.setattr(refill, "_free_memory", lambda world: 250_000)
    monkeypatch.setattr(refill, "READ_TOKENS", 1)
    few = generate_samples(model, tokenizer, problems, config(batch_size=None), DATA, world)
    assert 1 < max(rows) < len(problems)
    assert few == many


def test_samples_of_one_problem_share_its_reading(make_backbone: Make, tokenizer, world: World, problems) -> None:
    model = far_from_start(get_adept_model(make_backbone("llama"), METHODS["adept"]))
    read: list[int] = []
    model.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(
            kwargs["input_ids"].numel() if kwargs["input_ids"].shape[1] > 1 else 0
        ),
        with_kwargs=True,
    )
    generate_samples(model, tokenizer, problems[:1], config(num_samples=4), DATA, world)
    # One call for soft prompt and all tokens but the last, which are what the one prompt has in common with itself.
    assert read[0] == METHODS["adept"].num_virtual_tokens + LENGTHS[0] - 1
    assert not any(read[1:])


def test_a_network_makes_its_weights_once(make_backbone: Make, tokenizer, world: World, problems) -> None:
    model = far_from_start(get_adept_model(make_backbone("llama"), METHODS["hyperformer"]))
    calls: list[int] = []
    model.method.network.register_forward_hook(lambda *_: calls.append(1))
    generate_samples(model, tokenizer, problems, config(), DATA, world)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "method", ["adept", "attempt", "mpt-tasks", "attempt-tasks", "adapter-tasks", "hyperformer-tasks", "prefix"]
)
def test_prompts_that_are_read_together_score_as_alone(make_backbone: Make, method: str) -> None:
    model = far_from_start(get_adept_model(make_backbone("llama"), METHODS[method]))
    generator = torch.Generator().manual_seed(1)
    common = [7, 8, 9]
    prompts = [[*common, *torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()] for n in (4, 9, 2)]
    tasks = [1, 0, 1] if METHODS[method].prompt_tasks else [None] * 3
    reader = PromptReader(model, prompts, tasks, None, torch.device("cpu"))
    read = reader.read([2, 0, 1])
    for row, number in enumerate([2, 0, 1]):
        task = None if tasks[number] is None else torch.tensor([tasks[number]])
        with torch.no_grad():
            alone = model(torch.tensor([prompts[number]]), task_ids=task).logits[0, -1]
        assert_equal_up_to_rounding(read.scores[row], alone)


def test_several_adapters_decode_with_refill(make_backbone: Make, tokenizer, world: World, problems, tmp_path) -> None:
    folders = {}
    for name, method in {"long": AdeptConfig(num_virtual_tokens=5, bottleneck=2), "short": METHODS["pt"]}.items():
        one = far_from_start(get_adept_model(make_backbone("llama"), method))
        one.save_pretrained(tmp_path / name)
        folders[name] = tmp_path / name
    model = AdaptedModel(make_backbone("llama"), Untuned()).eval()
    model.load_adapters(folders)
    for name, folder in folders.items():
        alone = AdaptedModel.from_pretrained(make_backbone("llama"), folder)
        mixed = generate_samples(model, tokenizer, problems, config(), DATA, world, name)
        assert mixed == generate_samples(alone, tokenizer, problems, config(), DATA, world)


def test_bf16_rows_score_as_their_own_texts_do(make_backbone: Make, tokenizer, world: World, problems) -> None:
    # In bf16 another shape of a batch may choose another token, in static batches too; each choice must be a good one.
    model = far_from_start(get_adept_model(make_backbone("llama").bfloat16(), PromptTuningConfig(num_virtual_tokens=3)))
    cfg = config(do_sample=False, batch_size=4)
    written: list[tuple[list[int], int]] = []
    with attribute_set(
        refill._Row,
        "__post_init__",
        lambda row: written.append((row.ids, len(row.ids))),
    ):
        generate_samples(model, tokenizer, problems, cfg, DATA, world)
    for ids, start in written:
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0, 3:].float()
        chosen = scores[start - 1 : -1].gather(1, torch.tensor(ids[start:])[:, None])[:, 0]
        best = scores[start - 1 : -1].amax(1)
        assert ((best - chosen) <= 0.02 * scores.abs().max()).all()


def drawn(sampling: Sampling, scores: torch.Tensor) -> list[int]:
    return sampling.draw(scores, [generator_of(seed) for seed in range(len(scores))]).tolist()


@pytest.mark.parametrize("top_p", [0.3, 0.95, 0.9999, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 50, CANDIDATES, 3 * CANDIDATES])
def test_truncation_is_the_librarys(top_k: int, top_p: float) -> None:
    scores = 4 * torch.randn(40, 5 * CANDIDATES, generator=torch.Generator().manual_seed(2))
    kept = scores / 0.7
    if top_k:
        kept = TopKLogitsWarper(top_k)(kept, kept)
    if top_p < 1:
        kept = TopPLogitsWarper(top_p)(kept, kept)
    assert drawn(Sampling(0.7, top_k, top_p), scores) == drawn(Sampling(), kept)


@pytest.mark.parametrize("top_p", [0.3, 0.95, 0.9999])
@pytest.mark.parametrize("top_k", [0, 50, 3 * CANDIDATES])
def test_of_equally_likely_tokens_the_same_are_kept_whatever_is_sorted(
    top_k: int, top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = torch.randn(40, 5 * CANDIDATES, generator=torch.Generator().manual_seed(2)).mul(8).round() / 2
    some = drawn(Sampling(0.7, top_k, top_p), scores)
    monkeypatch.setattr("adept_ds.evaluation.sampling.CANDIDATES", scores.shape[1])
    assert some == drawn(Sampling(0.7, top_k, top_p), scores)
