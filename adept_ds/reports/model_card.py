"""What a run says on the model card of its result: figures beside the backbone's, how they were made, data, settings.

Nothing of it names a place on this machine: of files and folders only the last part of the name is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adept_ds.evaluation.comparison import compare_with_baselines
from adept_ds.evaluation.results import Evaluation, ProgramEvaluation
from adept_ds.export.manifest import MANIFEST_NAME, read_manifest
from adept_ds.files import atomic_write
from adept_ds.formats import FORMATS
from adept_ds.reports.run_report import run_facts
from adept_ds.reports.runs import BUNDLED, RunRecord, read_run
from adept_ds.storage.model_card import (
    ADAPTER,
    README_NAME,
    CardResult,
    CardRun,
    CardSubject,
    hub_base,
    make_card,
    read_subject,
)
from adept_ds.storage.run_folder import CONFIG_NAME

HUB_DATA = {"mbpp": "google-research-datasets/mbpp", "humaneval": "openai/openai_humaneval"}
"""Benchmark, by the start of `data.format`, to its data set on the hub."""


def subject_of(folder: Path) -> CardSubject:
    """Read what an adapter, a fully tuned model or an export says about itself.

    Raises:
        UserError: The folder holds none of them, or a file of it is damaged.
    """
    if not (folder / MANIFEST_NAME).is_file():
        return read_subject(folder)
    manifest = read_manifest(folder)
    made_of = manifest.adapter or {}
    return CardSubject(
        folder,
        manifest.form,
        manifest.base,
        made_of.get("method", {}),
        made_of.get("tensors_sha256"),
        manifest.versions,
        manifest=manifest.model_dump(),
    )


def run_of(subject: CardSubject) -> Path | None:
    """The run whose `best` or checkpoint a card's subject is, or was exported from."""
    parents = list(subject.origin.absolute().parents)[:2]
    return next((folder for folder in parents if (folder / CONFIG_NAME).is_file()), None)


def describe(folder: Path) -> None:
    """Write the model card of a folder that has just been made, with what its run says, if that is here."""
    subject = subject_of(folder)
    path = run_of(subject)
    card = make_card(subject, card_run(subject, path)[0] if path else None)
    with atomic_write(folder / README_NAME) as file:
        file.write(str(card))


def card_run(subject: CardSubject, path: Path) -> tuple[CardRun, list[str]]:
    """Return what a run says of a card's subject, and a sentence for each thing that is missing or left out.

    Only evaluations of these very weights count.

    Raises:
        UserError: There is no such run, or a file in it is damaged.
    """
    run = read_run(path)
    own = [one for one in run.evaluations if _is_of(one, subject)]
    notes = [
        f"{one.answers_path.parent} is of other weights and is left out"
        for one in run.evaluations
        if not (one.is_baseline or one in own)
    ]
    if not own:
        notes.append(f"{path / 'eval'} has no evaluation of these weights: the card has no figures")
    comparisons, not_compared = compare_with_baselines([*(one for one in run.evaluations if one.is_baseline), *own])
    baselines = {(each.names[1], each.task, each.metric): each.first.mean for each in comparisons}
    results = [
        CardResult(
            dataset=_dataset(one),
            dataset_id=_dataset_id(one),
            split=one.protocol.get("split"),
            metric=metric,
            value=figure.value,
            low=figure.low,
            high=figure.high,
            examples=one.examples,
            baseline=baselines.get((one.name, one.task_label, metric)),
        )
        for one in own
        for metric, figure in one.figures.items()
    ]
    return (
        CardRun(
            results=results,
            findings=[comparison.text for comparison in comparisons],
            protocol=_protocols(own),
            data=_data(run),
            training=_training(run),
            name=path.resolve().name,
            about=str(run.config.get("_about", "")),
        ),
        notes + not_compared,
    )


def publishing_notes(subject: CardSubject, base: str | None) -> list[str]:
    """What readers elsewhere would stumble over, a sentence each."""
    if base or hub_base(subject) or subject.form not in (ADAPTER, "lora", "peft"):
        return []
    return [
        f"the backbone is on record as {subject.base.get('name_or_path')!r}, a folder of this machine, so the metadata "
        "name no base model; say what it is on the hub by --base"
    ]


def _is_of(evaluation: Evaluation, subject: CardSubject) -> bool:
    if subject.sha256:
        return evaluation.adapter_sha256 == subject.sha256
    # A fully tuned model has no digest.
    return evaluation.adapter is not None and Path(evaluation.adapter).name == subject.folder.name


def _dataset(evaluation: Evaluation) -> str:
    if evaluation.task_label:
        return str(evaluation.protocol["task"])
    if evaluation.protocol.get("path") == "bundled":
        return f"adept_ds's {BUNDLED} ({evaluation.protocol.get('format')})"
    return str(evaluation.protocol.get("format"))


def _dataset_id(evaluation: Evaluation) -> str:
    if evaluation.task_label:
        return str(evaluation.protocol["task"])
    if evaluation.protocol.get("path") == "bundled":
        return "adept_ds-bundled"
    given = str(evaluation.protocol.get("format"))
    return next((name for start, name in HUB_DATA.items() if given.startswith(start)), given)


def _protocols(evaluations: Sequence[Evaluation]) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in evaluations:
        label = f"{one.name}, {one.task_label}" if one.task_label else one.name
        found[label] = "; ".join(_protocol(one))
    return found


def _protocol(evaluation: Evaluation) -> list[str]:
    protocol, extra = evaluation.protocol, evaluation.model_extra or {}
    decoding = protocol.get("generation", {})
    parts = [f"split {protocol['split']}"] if protocol.get("split") else []
    if decoding.get("do_sample"):
        parts.append(
            f"{decoding.get('num_samples')} samples at temperature {decoding.get('temperature')}, top_p "
            f"{decoding.get('top_p')}, seed {decoding.get('seed')}"
        )
    else:
        parts.append("greedy decoding")
    if length := decoding.get("max_new_tokens") or protocol.get("max_new_tokens"):
        parts.append(f"at most {length} new tokens")
    if extra.get("engine"):
        parts.append(f"decoded by {' '.join(extra['engine'].values())}")
    if isinstance(evaluation, ProgramEvaluation):
        parts.append(_isolation(extra.get("isolation") or {}))
        if beside := extra.get("in_process_passed"):
            parts.append(f"the tests of {beside} passes ran in the program's own process")
        parts += [f"problems {evaluation.problems_sha256[:12]} (sha256)"] if evaluation.problems_sha256 else []
    if extra.get("truncated_prompts"):
        parts.append(f"{extra['truncated_prompts']} prompts were cut")
    return parts


def _isolation(isolation: dict[str, Any]) -> str:
    if not isolation:
        return "how programs were isolated is not on record"
    test = f", self-test: {isolation['self_test']}" if isolation.get("self_test") else ""
    return f"programs were run isolated by {isolation.get('tier')}{test}"


def _data(run: RunRecord) -> dict[str, str]:
    given = run.settings
    path, format = given.get("data.path"), FORMATS.get(str(given.get("data.format")))
    problems = format is not None and format.problems is not None
    facts = {
        "data": given.get("data.format"),
        "tasks": ", ".join(Path(name).name for name in given.get("data.tasks") or []),
        "file or data set": Path(path).name if path else "bundled" if problems else "",
    }
    return {label: str(value) for label, value in facts.items() if value}


def _training(run: RunRecord) -> dict[str, str]:
    given = run.settings
    facts = {label: text for label, text in run_facts(run).items() if label not in ("model", "data", "tasks")}
    steps = {"steps": "train.max_steps", "schedule": "train.schedule", "weight decay": "train.weight_decay"}
    facts |= {label: str(given[key]) for label, key in steps.items() if given.get(key) is not None}
    quantization = given.get("model.quantization")
    return facts | ({"quantisation of the backbone": str(quantization)} if quantization else {})
