"""The evaluation of text-to-text tasks: adapter to predictions to scores, each a file that is usable alone.

OUT/TASK/predictions.jsonl   every example with what was generated, the answer in it, and what it is compared with
OUT/TASK/summary.json        the task's metrics with intervals, and what they were made with
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedTokenizerBase

from adept_ds.config.run import DataConfig, GenerationConfig, RunConfig
from adept_ds.data.tasks import Part, Task, TaskExamples, cut_references, load_task_examples
from adept_ds.distributed import World, init_world, on_main_rank
from adept_ds.errors import UserError, did_you_mean
from adept_ds.evaluation.decoders import check_engine, open_decoder, open_decoders
from adept_ds.evaluation.generate import generate_samples
from adept_ds.evaluation.receipts import examples_digest, file_digest
from adept_ds.evaluation.results import PREDICTIONS_NAME, SUMMARY_NAME, task_protocol
from adept_ds.evaluation.tuned import open_tuned, tuned_facts
from adept_ds.files import atomic_write, write_json
from adept_ds.model.adapted_model import AdaptedModel
from adept_ds.storage.model_folder import is_model_folder


def evaluate_tasks(
    run: RunConfig, adapter: Path | None, out: Path, part: Part, adapters: Mapping[str, Path] = MappingProxyType({})
) -> None:
    """Generate answers to the examples of a part of each of `data.tasks`, and score them. Collective.

    Every rank decodes a share, greedily, whatever `eval.generation` says of sampling: at most as many tokens as the
    task allows.

    Args:
        run: Model, data and batch size.
        adapter: Adapter folder, or the folder of a fully tuned model, which takes the backbone's place; None evaluates
            the backbone alone.
        out: Where the files go, in a folder a task.
        part: Which examples; the first `eval.max_examples` of each task, if that is set.
        adapters: An adapter folder for each task, all of which one backbone has, in place of `adapter`.

    Raises:
        UserError: The adapter does not belong to the backbone, or a task or its data is not there.
    """
    examples = {name: examples_of(run, name, part) for name in run.data.tasks}
    results: Mapping[str, Path | None] = dict.fromkeys(examples, adapter)
    if adapters:
        results = _adapter_of_each(examples, adapters)
    opened = {result: open_tuned(run.model, result) for result in dict.fromkeys(results.values())}
    decodings, truncated = {}, {}
    for name, of_task in examples.items():
        tuned = opened[results[name]]
        check_engine(run.eval, tuned)
        decodings[name] = greedy(of_task[0].task, tuned.tokenizer, run)
        truncated[name] = tuned.check_prompts(of_task, run.data, decodings[name].max_new_tokens)
    world = init_world()
    if adapters:
        decoders = open_decoders(run, {name: opened[results[name]] for name in examples}, world)
    else:
        decoders = dict.fromkeys(examples, open_decoder(run, opened[adapter], world))
    for name, of_task in examples.items():
        task, tuned, decoder, decoding = of_task[0].task, opened[results[name]], decoders[name], decodings[name]
        generated = [sample.completion for sample in decoder.samples(of_task, decoding, run.data)]
        about = {
            "name": out.name,
            **tuned_facts(run, tuned, results[name], decoder.backbone, decoder.engine),
            "protocol": {**task_protocol(run, task.name, part), "max_new_tokens": decoding.max_new_tokens},
            "max_examples": run.eval.max_examples,
            "truncated_prompts": truncated[name],
        }
        on_main_rank(partial(score_to_folder, of_task, generated, tuned.tokenizer, out / task.name, about), world)


def _adapter_of_each(examples: Iterable[str], adapters: Mapping[str, Path]) -> dict[str, Path]:
    """The adapter of each task.

    Raises:
        UserError: One has none, or one is a whole model, of which a backbone cannot have several.
    """
    for name in adapters:
        if name not in examples:
            raise UserError(f"--adapters has {name!r}, which is not evaluated{did_you_mean(name, examples)}")
    for name in examples:
        if name not in adapters:
            raise UserError(f"--adapters has no adapter for the task {name!r}; expected {name}=FOLDER")
        if is_model_folder(adapters[name]):
            raise UserError(f"--adapters {name}={adapters[name]}: a whole model, and no adapter; expected --adapter")
    return dict(adapters)


def validation_metrics(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: TaskExamples,
    run: RunConfig,
    world: World,
) -> dict[str, float]:
    """Generate answers to validation examples of one or several tasks and measure them. Collective.

    Returns:
        `TASK/METRIC` to its value, and `task`: the mean over tasks of what each task's checkpoints are chosen by.
    """
    values: dict[str, float] = {}
    chosen_by = []
    for of_task in examples.by_task():
        task = of_task[0].task
        samples = generate_samples(model, tokenizer, of_task, greedy(task, tokenizer, run), run.data, world)
        measure = partial(_measure, of_task, [sample.completion for sample in samples], tokenizer)
        # One rank computes: a last bit that differs between machines would make ranks disagree about the best.
        metrics = on_main_rank(measure, world)
        values |= {f"{task.name}/{name}": value for name, value in metrics.items()}
        chosen_by.append(metrics[task.chosen_by])
    return values | {"task": math.fsum(chosen_by) / len(chosen_by)}


def _measure(examples: TaskExamples, generated: list[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    # As in `score_to_folder`.
    from adept_ds.evaluation.text_metrics import evaluate

    task = examples[0].task
    references = [cut_references(task, example.references, tokenizer) for example in examples]
    return evaluate(task, generated, references, tuple(dict.fromkeys((*task.metrics, task.chosen_by))))


def greedy(task: Task, tokenizer: PreTrainedTokenizerBase, run: RunConfig) -> GenerationConfig:
    """Return the decoding of a task's answers: greedy, one sample, as many tokens as a target may have in training."""
    longest = task.max_answer_tokens(tokenizer, run.data.max_target_length)
    changes = {"do_sample": False, "num_samples": 1, "max_new_tokens": longest}
    return GenerationConfig.model_validate({**run.eval.generation.model_dump(), **changes})


def score_to_folder(
    examples: TaskExamples,
    generated: list[str],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    facts: dict[str, Any],
) -> None:
    """Score one task's generated texts, write predictions and summary, and print the figures."""
    # scikit-learn and SciPy take a second to load, which training without such an evaluation need not wait for.
    from adept_ds.evaluation.text_metrics import count_invalid, evaluate_with_intervals

    task = examples[0].task
    references = [cut_references(task, example.references, tokenizer) for example in examples]
    predictions_path = folder / PREDICTIONS_NAME
    with atomic_write(predictions_path) as file:
        for example, text, right in zip(examples, generated, references, strict=True):
            line = {
                "task_id": example.task_id,
                "source": example.prompt,
                "generated": text,
                "answer": task.answer(text),
                "references": right,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    metrics = evaluate_with_intervals(task, generated, references)
    summary = {
        **facts,
        "predictions_sha256": file_digest(predictions_path),
        "examples_sha256": examples_digest([(one.task_id, one.prompt) for one in examples], references),
        "examples": len(examples),
        "invalid": count_invalid(task, generated),
        "reported": task.metrics[0],
        "metrics": {name: asdict(interval) for name, interval in metrics.items()},
    }
    write_json(folder / SUMMARY_NAME, summary)
    for name, interval in metrics.items():
        print(
            f"{task.name}: {name} {100 * interval.value:.2f} (95 % interval {100 * interval.low:.2f} to "
            f"{100 * interval.high:.2f}; {interval.n} examples, {summary['invalid']} invalid)"
        )


def examples_of(run: RunConfig, name: str, part: Part) -> TaskExamples:
    """The examples of a task that an evaluation is of. UserError if there are none."""
    data = DataConfig.model_validate({**run.data.model_dump(), "tasks": (name,)})
    examples = load_task_examples(data, part)[: run.eval.max_examples]
    if not examples:
        raise UserError(f"task {name} has no examples in the split {part!r}")
    return examples
