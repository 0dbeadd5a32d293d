"""Completions: sampling from a row's own stream, stop strings, order, independence of the batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from adept_ds.config.method import AdeptConfig
from adept_ds.config.run import DataConfig, GenerationConfig
from adept_ds.contexts import attribute_set
from adept_ds.data.continuation import ContinuationDecoder
from adept_ds.data.problems import load_problems
from adept_ds.distributed import World
from adept_ds.evaluation.answers import StopStrings, StopWhenComplete
from adept_ds.evaluation.generate import generate_samples
from adept_ds.evaluation.sampling import Sampling, SeededSampling, sample_seed
from adept_ds.formats import Problem, Sample, find_program
from adept_ds.model.adapted_model import AdaptedModel, get_adept_model

Make = Callable[[str], PreTrainedModel]

NO_IDS = torch.zeros(1, 1, dtype=torch.long)


def draw(sampling: SeededSampling, scores: torch.Tensor) -> list[int]:
    processed = sampling(NO_IDS, scores)
    assert (processed.isfinite().sum(-1) == 1).all()
    return processed.argmax(-1).tolist()


def test_a_rows_draws_do_not_depend_on_its_batch():
    scores = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    seeds = [11, 12, 13, 14]
    together = SeededSampling(seeds, Sampling())
    drawn = [draw(together, scores) for _ in range(30)]
    for row, seed in enumerate(seeds):
        alone = SeededSampling([seed], Sampling())
        assert [draw(alone, scores[row : row + 1])[0] for _ in range(30)] == [step[row] for step in drawn]


def test_rows_with_other_seeds_draw_other_tokens():
    scores = torch.zeros(2, 50)
    sampling = SeededSampling([1, 2], Sampling())
    drawn = [draw(sampling, scores) for _ in range(20)]
    assert [a for a, _ in drawn] != [b for _, b in drawn]


def test_draws_follow_the_softmax_of_the_scores():
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0])
    rows = 4_000
    counts = Counter(draw(SeededSampling(range(rows), Sampling()), probabilities.log().expand(rows, 5)))
    assert counts[4] == 0
    # Chi-square with 3 degrees of freedom exceeds 16.3 once in a thousand.
    expected = (probabilities[:4] * rows).tolist()
    assert sum((counts[token] - count) ** 2 / count for token, count in enumerate(expected)) < 16.3


def test_a_stream_of_one_row_follows_the_softmax_too():
    scores, sampling = torch.tensor([[0.2, 0.8]]).log(), SeededSampling([5], Sampling())
    ones = sum(draw(sampling, scores)[0] for _ in range(2_000))
    assert abs(ones - 1_600) < 4 * (2_000 * 0.2 * 0.8) ** 0.5


def test_sample_seeds_differ_by_seed_task_and_index():
    seeds = {sample_seed(seed, task, index) for seed in (0, 1) for task in ("MBPP/1", "MBPP/11") for index in (0, 1)}
    assert len(seeds) == 8


def test_sample_seeds_are_fixed_for_good():
    # Another value would change every published sample.
    assert sample_seed(0, "MBPP/1", 0) == 23_160_436_894_501_247


@pytest.mark.parametrize(
    ("text", "done"), [("abcSTOP", True), ("abcSTO", False), ("STOPabcdefgh", False), ("xy#", True), ("", False)]
)
def test_stop_strings_are_looked_for_at_the_end(tokenizer: PreTrainedTokenizerFast, text, done):
    ids = torch.tensor([tokenizer("def" + text)["input_ids"]])
    assert StopStrings(ContinuationDecoder(tokenizer), ["STOP", "#"], start=3)(ids, ids).tolist() == [done]


def test_stop_strings_in_what_was_read_do_not_count(tokenizer: PreTrainedTokenizerFast):
    ids = torch.tensor([tokenizer("a#b")["input_ids"]])
    assert StopStrings(ContinuationDecoder(tokenizer), ["#"], start=2)(ids, ids).tolist() == [False]
    assert StopStrings(ContinuationDecoder(tokenizer), ["#b"], start=2)(ids, ids).tolist() == [False]


def test_stop_strings_are_found_as_soon_as_they_are_written(tokenizer: PreTrainedTokenizerFast):
    rows = torch.tensor([tokenizer(text)["input_ids"] for text in ("ab##", "a#b#", "####")])
    criteria = StopStrings(ContinuationDecoder(tokenizer), ["##"], start=1)
    assert criteria(rows[:, :3], rows).tolist() == [False, False, True]
    assert criteria(rows, rows).tolist() == [True, False, True]


DATA = DataConfig(format="mbpp-paper", max_prompt_length=60, max_length=100)


def adapted(make_backbone: Make, name: str = "gpt2") -> AdaptedModel:
    model = get_adept_model(make_backbone(name), AdeptConfig(num_virtual_tokens=3, bottleneck=2)).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.trainable_parameters().values():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return load_problems(DataConfig(format="mbpp-paper"), "test")[:5]


def config(**changes: object) -> GenerationConfig:
    return GenerationConfig.model_validate({"max_new_tokens": 12, "batch_size": 4, "stop": ()} | changes)


@pytest.mark.parametrize("name", ["gpt2", "t5-tied"])
@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_samples": 2}, {"num_samples": 2, "top_k": 9}], ids=str)
def test_samples_do_not_depend_on_the_batches(make_backbone: Make, tokenizer, world: World, problems, name, options):
    model = adapted(make_backbone, name)
    runs = [
        generate_samples(model, tokenizer, problems, config(batch_size=size, **options), DATA, world)
        for size in (1, 3, 100)
    ]
    assert runs[0] == runs[1] == runs[2]
    assert len({sample.completion for sample in runs[0]}) > 1


def test_samples_come_in_the_problems_order(make_backbone: Make, tokenizer, world: World, problems):
    samples = generate_samples(adapted(make_backbone), tokenizer, problems, config(num_samples=3), DATA, world)
    assert [sample.task_id for sample in samples] == [problem.task_id for problem in problems for _ in range(3)]


def test_samples_of_one_problem_differ(make_backbone: Make, tokenizer, world: World, problems):
    samples = generate_samples(adapted(make_backbone), tokenizer, problems[:1], config(num_samples=4), DATA, world)
    assert len({sample.completion for sample in samples}) == 4


def test_a_sample_does_not_depend_on_how_many_there_are(make_backbone: Make, tokenizer, world: World, problems):
    def of(count: int) -> list[Sample]:
        return generate_samples(adapted(make_backbone), tokenizer, problems[:2], config(num_samples=count), DATA, world)

    assert of(3)[::3] == of(1)


def test_another_seed_gives_other_samples(make_backbone: Make, tokenizer, world: World, problems):
    def of(seed: int) -> list[Sample]:
        return generate_samples(adapted(make_backbone), tokenizer, problems, config(seed=seed), DATA, world)

    assert of(0) == of(0)
    assert of(0) != of(1)


def test_completions_end_before_the_stop_string(make_backbone: Make, tokenizer, world: World, problems):
    model = adapted(make_backbone)
    free = generate_samples(model, tokenizer, problems, config(do_sample=False), DATA, world)
    stop = free[0].completion[5]
    stopped = generate_samples(model, tokenizer, problems, config(do_sample=False, stop=(stop,)), DATA, world)
    assert [sample.completion for sample in stopped] == [sample.completion.split(stop)[0] for sample in free]


def test_generation_leaves_the_mode_as_it_was(make_backbone: Make, tokenizer, world: World, problems):
    model = adapted(make_backbone).train()
    generate_samples(model, tokenizer, problems[:1], config(), DATA, world)
    assert model.training


FENCED = "```python\ndef f(x):\n    return x\n```"


@pytest.mark.parametrize(
    ("text", "done"),
    [
        (FENCED, True),
        (FENCED + "\nUse it now", False),  # It was asked when the fence was written.
        (FENCED[:-1], False),
        ("```bash\nls\n```", False),
        ("```\nls\n```\n" + FENCED, True),
        (FENCED.replace("x):", 'x):\n    """\n    ```'), False),
        ("", False),
    ],
)
def test_a_row_ends_with_the_fence_that_closes_its_program(tiny_tokenizer: PreTrainedTokenizerFast, text, done):
    read = tiny_tokenizer("def")["input_ids"]
    ids = torch.tensor([read + tiny_tokenizer(text, add_special_tokens=False)["input_ids"]])
    assert tiny_tokenizer.decode(ids[0]).endswith(text)
    is_complete = [lambda text: find_program(text, ["f"]).is_complete]
    assert StopWhenComplete(ContinuationDecoder(tiny_tokenizer), is_complete, len(read))(ids, ids).tolist() == [done]
    assert StopWhenComplete(ContinuationDecoder(tiny_tokenizer), [None], len(read))(ids, ids).tolist() == [False]


def test_thinking_that_the_template_begins_is_in_the_completion(make_backbone: Make, tokenizer, world: World):
    chats = load_problems(DataConfig(format="mbpp-instruct"), "test")[:2]
    data = DataConfig(format="mbpp-instruct", max_prompt_length=60, max_length=100)
    with attribute_set(tokenizer, "chat_template", "{{ messages[0]['content'] }}<think>"):
        samples = generate_samples(adapted(make_backbone), tokenizer, chats, config(), data, world)
    assert all(sample.completion.startswith("<think>") for sample in samples)
