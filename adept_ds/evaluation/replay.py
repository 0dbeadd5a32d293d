"""Results made again from their receipts: do verdicts, figures and texts come to the same?

Nothing of a folder is changed. What its results were made of is compared with the receipts first; what has changed is
named, and what depends on it is not replayed.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from adept_ds.backbone.hub import missing_model_files
from adept_ds.backbone.load import weight_files
from adept_ds.backbone.weight_files import fingerprint
from adept_ds.config.base import validation_problems
from adept_ds.config.loader import config_hash
from adept_ds.config.run import DataConfig, GenerationConfig, RunConfig, SandboxConfig
from adept_ds.data.problems import load_problems
from adept_ds.data.tasks import Task, TaskExamples, cut_references, find_task
from adept_ds.distributed import init_world
from adept_ds.errors import UserError
from adept_ds.evaluation.decoders import open_decoder
from adept_ds.evaluation.mbpp import paper_figures, problems_of_file
from adept_ds.evaluation.receipts import (
    cpu_name,
    examples_digest,
    file_digest,
    problems_digest,
    processor,
    versions,
)
from adept_ds.evaluation.results import (
    GENERATION_NAME,
    PREDICTIONS_NAME,
    RESULTS_NAME,
    SAMPLES_NAME,
    SUMMARY_NAME,
    program_protocol,
    task_protocol,
)
from adept_ds.evaluation.scoring import figures_of, score_samples
from adept_ds.evaluation.text2text import examples_of, greedy
from adept_ds.evaluation.tuned import open_tuned, place_of_weights
from adept_ds.files import atomic_write, read_json, write_json
from adept_ds.formats import Example, Problem, read_samples
from adept_ds.storage.adapter_folder import load_adapter
from adept_ds.storage.model_folder import is_model_folder

DECODING_RECEIPTS = ("settings", "config_sha256", "weights_fingerprint", "engine", "versions", "processor")
_VERDICT = ("task_id", "program", "found", "status", "kind", "in_process", "base_status", "base_kind")
"""What must be the same of a line of results; times and texts of exceptions may differ."""
_OLDER = "it is of a version that wrote no such receipts"
_AROUND = 30
"""Characters that are shown in front of and behind the first difference of two texts."""


@dataclass
class Findings:
    """What a replay of one folder found."""

    folder: str
    same: list[str] = field(default_factory=list)
    """What was done again and came to the same."""
    changed: list[str] = field(default_factory=list)
    """What is no longer what the results were made of, or is not there."""
    differing: list[str] = field(default_factory=list)
    """What came out otherwise."""
    notes: list[str] = field(default_factory=list)
    """What was not replayed, and what is different about this machine."""

    @property
    def is_same(self) -> bool:
        """Whether something was done again, and all of it came to the same."""
        return bool(self.same) and not (self.changed or self.differing)

    @contextmanager
    def told(self, what: str) -> Iterator[None]:
        """Take a mistake that is raised inside for a change of `what`."""
        try:
            yield
        except UserError as error:
            self.change(f"{what}: {error}")

    def compare(self, what: str, recorded: Any, now: Any) -> None:
        """Name `what` if it has changed."""
        if recorded != now:
            self.change(f"{what}: was {_short(recorded)}, is {_short(now)}")

    def change(self, what: str) -> None:
        """Note a change, once."""
        if what not in self.changed:
            self.changed.append(what)

    def blocks(self, what: str) -> bool:
        """Whether something has changed, so that `what` is not done; that is noted."""
        if self.changed:
            self.notes.append(f"not {what}, since not all is what it was")
        return bool(self.changed)

    def note_machine(self, recorded: Mapping[str, Any], what: str, here: str) -> None:
        """Note versions and a processor that are not those of the receipts."""
        now = versions()
        for name, version in (recorded.get("versions") or {}).items():
            if now.get(name) != version:
                self.notes.append(f"{what} with {name} {version}, here it is {now.get(name)}")
        if recorded.get("processor") not in (None, here):
            self.notes.append(f"{what} on {recorded['processor']}, here it is {here}")


def _named(engine: Mapping[str, str]) -> str:
    return f"{engine['name']} {engine['version']}"


class Text(NamedTuple):
    """A text that a model wrote, and for what."""

    task_id: str
    text: str


def replay(
    folder: Path,
    rescore: bool = True,
    redecode: bool | None = None,
    adapter: Path | None = None,
    model: str | None = None,
    out: Path | None = None,
) -> list[Findings]:
    """Make the results in a folder, and in those below it, again.

    Args:
        folder: What `adept-ds eval`, `adept-ds score` or `adept-ds text2text` wrote.
        rescore: Run stored samples in the sandbox again, or measure stored predictions again.
        redecode: Decode again; if None, where the backbone is on this machine.
        adapter: Where the adapter is now, if not where it was.
        model: Where the backbone is now, a folder or hub id, if not where it was.
        out: Folder for the findings and for what came out, none of which is written otherwise.

    Raises:
        UserError: There are no results.
    """
    places = sorted(path.parent for path in folder.glob(f"**/{SUMMARY_NAME}"))
    if not places:
        unscored = "; its samples are not scored yet" if (folder / GENERATION_NAME).is_file() else ""
        raise UserError(f"{folder}: holds no {SUMMARY_NAME} of an evaluation{unscored}")
    if out is not None and out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--out {out} lies in the folder that is replayed, which stays as it is; expected another one")
    all_findings = []
    for place in places:
        summary = read_json(place / SUMMARY_NAME)
        kind = _Answers if "metrics" in summary else _Programs
        one = kind(place, summary, out and out / place.relative_to(folder))
        if rescore:
            one.rescore()
        if redecode or redecode is None:
            one.redecode(adapter, model, is_asked=bool(redecode))
        if one.out is not None:
            write_json(one.out / "replay.json", asdict(one.findings) | {"is_same": one.findings.is_same})
        all_findings.append(one.findings)
    return all_findings


class _Results(ABC):
    """The results in one folder."""

    def __init__(self, folder: Path, summary: dict[str, Any], out: Path | None) -> None:
        self.folder, self.summary, self.out = folder, summary, out
        self.findings = Findings(str(folder))

    @abstractmethod
    def rescore(self) -> None:
        """Score the stored texts again."""

    @abstractmethod
    def stored_texts(self) -> list[Text]:
        """The texts in the folder; changes of their file are found."""

    @abstractmethod
    def examples(self, run: RunConfig) -> Sequence[Example]:
        """What the texts were written for."""

    @abstractmethod
    def decoding(self, run: RunConfig, examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
        """How they were decoded."""

    @abstractmethod
    def check_examples(self, examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> None:
        """Find changes of the examples."""

    @abstractmethod
    def protocol(self, run: RunConfig) -> dict[str, Any]:
        """What the summary says of the protocol, by the settings."""

    def redecode(self, adapter: Path | None, model: str | None, is_asked: bool) -> None:
        """Decode again and compare; what is missing for it is a change only if this `is_asked` for."""
        found = self.findings
        why_not = self._cannot_decode(adapter, model)
        if why_not is not None:
            why_not = f"not decoded: {why_not}"
            found.change(why_not) if is_asked else found.notes.append(why_not)
            return
        adapter = self._adapter(adapter)
        run = self._checked_run(model)
        with found.told("samples"):
            texts = self.stored_texts()
        if run is not None:
            with found.told("adapter"):
                self._check_adapter(adapter)
            with found.told("weights"):
                weights = fingerprint(weight_files(place_of_weights(run.model, adapter)))
                found.compare("weights of the backbone", self.summary["weights_fingerprint"], weights)
            with found.told("examples"):
                examples = self.examples(run)
                tuned = open_tuned(run.model, adapter)
                self.check_examples(examples, tuned.tokenizer)
        if found.blocks("decoded") or run is None:
            return
        world = init_world()
        with found.told("backbone"):
            decoder = open_decoder(run, tuned, world)
            table, engine = "embedding_fingerprint", self.summary["engine"]
            found.compare("embedding table", self.summary["backbone"][table], decoder.backbone[table])
            if engine != decoder.engine:
                found.notes.append(f"was decoded by {_named(engine)}, here it is {_named(decoder.engine)}")
        if found.blocks("decoded"):
            return
        found.note_machine(self.summary, "was decoded", processor())
        config = self.decoding(run, examples, tuned.tokenizer)
        decoded = decoder.samples(examples, config, run.data)
        self._compare_texts(texts, [Text(sample.task_id, sample.completion) for sample in decoded])

    def _cannot_decode(self, adapter: Path | None, model: str | None) -> str | None:
        """Why it cannot be decoded here; None if it can."""
        missing = [name for name in DECODING_RECEIPTS if name not in self.summary]
        if self.summary.get("backbone") is None:
            return "the samples are of another origin"
        if missing:
            return f"{self.folder / SUMMARY_NAME} lacks {', '.join(missing)}; {_OLDER}"
        source = self.summary["settings"].get("model", {})
        name, revision = model or str(source.get("name_or_path")), None if model else source.get("revision")
        place = self._adapter(adapter)
        if place is not None and not place.is_dir():
            return f"there is no adapter {place} (--adapter says where it is)"
        if place is not None and is_model_folder(place):
            name, revision = str(place), None
        if absent := missing_model_files(name, revision):
            return f"the backbone {name} is not on this machine, {absent[0]} is missing (--model says where it is)"
        return None

    def _adapter(self, given: Path | None) -> Path | None:
        recorded = self.summary.get("adapter")
        if given is not None and recorded is None:
            raise UserError(f"--adapter {given}: {self.folder} was made without an adapter")
        return given or (Path(recorded) if recorded else None)

    def _checked_run(self, model: str | None) -> RunConfig | None:
        """The settings, if they are those of the receipts; with the backbone where it is now."""
        try:
            run = RunConfig.model_validate(self.summary["settings"])
        except ValidationError as error:
            self.findings.change(f"settings: {validation_problems(error)}")
            return None
        self.findings.compare("settings", self.summary["config_sha256"], config_hash(run))
        recorded = self.summary["protocol"]
        for name, value in self.protocol(run).items():
            self.findings.compare(f"settings (protocol.{name})", recorded.get(name), value)
        place = {"name_or_path": model, "revision": None}
        return run.model_copy(update={"model": run.model.model_copy(update=place)}) if model else run

    def _check_adapter(self, adapter: Path | None) -> None:
        if adapter is None:
            return
        loaded = None if is_model_folder(adapter) else load_adapter(adapter)  # a whole model is told by its weights
        digest = loaded.facts["tensors_sha256"] if loaded else None
        self.findings.compare(f"adapter {adapter}", self.summary["adapter_sha256"], digest)
        if loaded:
            self.findings.compare(f"method of {adapter}", self.summary["method"], loaded.method.model_dump(mode="json"))

    def _compare_texts(self, before: Sequence[Text], now: Sequence[Text]) -> None:
        if self.out is not None:
            with atomic_write(self.out / "decoded.jsonl") as file:
                file.writelines(json.dumps({"task_id": one.task_id, "completion": one.text}) + "\n" for one in now)
        if [one.task_id for one in before] != [one.task_id for one in now]:
            self.findings.differing.append(f"decoded: {len(now)} texts, and there were {len(before)} of other tasks")
            return
        other = [at for at, pair in enumerate(zip(before, now, strict=True)) if pair[0] != pair[1]]
        if not other:
            self.findings.same.append(f"decoded {len(now)} texts: all the same")
            return
        first = other[0]
        self.findings.differing.append(
            f"decoded {len(now)} texts: {len(other)} differ, the first is number {first + 1}, of {now[first].task_id}, "
            + _first_difference(before[first].text, now[first].text)
        )

    def _compare_figures(self, now: Mapping[str, Any], what: str) -> None:
        """Compare figures with the summary's, and say what was done."""
        recorded = {name: self.summary.get(name) for name in now}
        other = list(_differences(recorded, json.loads(json.dumps(now))))
        if other:
            name, before, after = other[0]
            self.findings.differing.append(
                f"{len(other)} figures differ, the first is {name}: was {before}, is {after}"
            )
        elif not (self.findings.differing or self.findings.changed):
            self.findings.same.append(what)


class _Programs(_Results):
    """Programs with their verdicts."""

    def __init__(self, folder: Path, summary: dict[str, Any], out: Path | None) -> None:
        super().__init__(folder, summary, out)
        path = folder / GENERATION_NAME
        self.stored = read_json(path) if path.is_file() else None
        for name, value in (self.stored or {}).get("facts", {}).items():
            self.findings.compare(f"{GENERATION_NAME} ({name}; {SUMMARY_NAME} has another)", value, summary.get(name))

    def rescore(self) -> None:
        found = self.findings
        scoring = self.summary.get("scoring") or self._older_scoring()
        if scoring is None:
            found.change(f"not rescored: {self.folder / SUMMARY_NAME} lacks scoring; {_OLDER}")
            return
        with found.told("problems"):
            problems = self._problems()
            found.compare("problems", self.summary.get("problems_sha256"), problems_digest(problems))
        with found.told("samples"):
            self._check_samples()
        if found.blocks("rescored"):
            return
        found.note_machine(scoring, "was scored", cpu_name())
        samples = read_samples(self._samples_path, [problem.task_id for problem in problems]).samples
        # Without the verdicts of before; and a folder may not say that its programs are to run unprotected.
        sandbox = SandboxConfig.model_validate({**scoring["sandbox"], "cache": None, "isolation": "auto"})
        score = score_samples(problems, samples, sandbox, scoring["k"])
        figures = figures_of(score)
        if scoring["paper_scoring"]:
            figures["paper"] = paper_figures(problems, samples, sandbox, scoring["k"], score)
        if score.isolation != self.summary.get("isolation"):
            was, has = (about.get("tier") for about in (self.summary.get("isolation") or {}, score.isolation))
            found.notes.append(f"was scored in another isolation ({was}), here it is {has}")
        with found.told("results"):
            self._compare_verdicts(score.results)
        self._compare_figures(figures, f"scored {len(samples)} samples: every verdict and figure is the same")

    def _older_scoring(self) -> dict[str, Any] | None:
        """What is known of the scoring where the summary says nothing of it: what was asked for with the samples."""
        if self.stored is None or not {"sandbox", "k", "paper_scoring"} <= self.stored.keys():
            return None
        self.findings.notes.append(
            f"{SUMMARY_NAME} lacks scoring; {_OLDER}; its settings are taken from {GENERATION_NAME}"
        )
        return {name: self.stored[name] for name in ("sandbox", "k", "paper_scoring")}

    @property
    def _samples_path(self) -> Path:
        return self.folder / SAMPLES_NAME if self.stored else Path(self.summary.get("samples_path", SAMPLES_NAME))

    def _check_samples(self) -> None:
        if not self._samples_path.is_file():
            raise UserError(f"{self._samples_path} is not there")
        self.findings.compare(
            f"samples {self._samples_path}", self.summary.get("samples_sha256"), file_digest(self._samples_path)
        )

    def _problems(self) -> list[Problem]:
        protocol = self.summary.get("protocol", {})
        if self.stored is None:
            path = protocol.get("path")
            return problems_of_file(None if path == "bundled" else path, protocol.get("format"), protocol.get("split"))
        data = DataConfig.model_validate(self.stored["data"])
        return load_problems(data, protocol["split"])[: self.stored["max_examples"]]

    def _compare_verdicts(self, now: Sequence[Mapping[str, Any]]) -> None:
        if self.out is not None:
            with atomic_write(self.out / RESULTS_NAME) as file:
                file.writelines(json.dumps(line) + "\n" for line in now)
        lines = _json_lines(self.folder / RESULTS_NAME)
        if len(lines) != len(now):
            self.findings.differing.append(f"{RESULTS_NAME} has {len(lines)} lines, and there are {len(now)} samples")
            return
        before = [[line.get(name) for name in _VERDICT] for line in lines]
        after = [[line.get(name) for name in _VERDICT] for line in json.loads(json.dumps(now))]
        other = [at for at in range(len(lines)) if before[at] != after[at]]
        if other:
            at = other[0]
            names = [name for name, one, two in zip(_VERDICT, before[at], after[at], strict=True) if one != two]
            was, has = (", ".join(str(line.get(name)) for name in names) for line in (lines[at], now[at]))
            self.findings.differing.append(
                f"scored {len(now)} samples: {len(other)} verdicts differ, the first is number {at + 1}, of "
                f"{lines[at].get('task_id')}, in {', '.join(names)}: was {_short(was)}, is {_short(has)}"
            )

    def stored_texts(self) -> list[Text]:
        self._check_samples()
        return [Text(line["task_id"], line["completion"]) for line in _json_lines(self._samples_path)]

    def examples(self, run: RunConfig) -> list[Problem]:
        return load_problems(run.data, self.summary["protocol"]["split"])[: run.eval.max_examples]

    def check_examples(self, examples: Sequence[Problem], tokenizer: PreTrainedTokenizerBase) -> None:
        self.findings.compare("problems", self.summary["problems_sha256"], problems_digest(examples))

    def decoding(self, run: RunConfig, examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
        return run.eval.generation

    def protocol(self, run: RunConfig) -> dict[str, Any]:
        return program_protocol(run, self.summary["protocol"]["split"])


class _Answers(_Results):
    """Answers to a text-to-text task with their metrics."""

    def _task(self) -> Task:
        protocol = self.summary["protocol"]
        names = self.summary.get("settings", {}).get("data", {}).get("tasks") or [protocol["task"]]
        tasks = [find_task(name).variant(protocol["variant"]) for name in names]
        task = next((task for task in tasks if task.name == protocol["task"]), None)
        if task is None:
            raise UserError(f"{self.folder / SUMMARY_NAME} is of the task {protocol['task']}, which its settings lack")
        return task

    def _lines(self) -> list[dict[str, Any]]:
        path = self.folder / PREDICTIONS_NAME
        if not path.is_file():
            raise UserError(f"{path} is not there")
        self.findings.compare(f"predictions {path}", self.summary.get("predictions_sha256"), file_digest(path))
        return _json_lines(path)

    def rescore(self) -> None:
        # scikit-learn takes a second to load.
        from adept_ds.evaluation.text_metrics import count_invalid, evaluate_with_intervals

        found = self.findings
        with found.told("task"):
            task = self._task()
        with found.told("predictions"):
            lines = self._lines()
        if found.blocks("rescored"):
            return
        generated = [line["generated"] for line in lines]
        other = [line for line, text in zip(lines, generated, strict=True) if task.answer(text) != line["answer"]]
        if other:
            found.differing.append(
                f"{len(other)} answers are taken otherwise from what was written, the first of {other[0]['task_id']}"
            )
        metrics = evaluate_with_intervals(task, generated, [line["references"] for line in lines])
        figures = {
            "examples": len(lines),
            "invalid": count_invalid(task, generated),
            "metrics": {name: asdict(interval) for name, interval in metrics.items()},
        }
        self._compare_figures(figures, f"measured {len(lines)} predictions: every answer and figure is the same")

    def stored_texts(self) -> list[Text]:
        return [Text(line["task_id"], line["generated"]) for line in self._lines()]

    def examples(self, run: RunConfig) -> TaskExamples:
        protocol = self.summary["protocol"]
        name = next(name for name in run.data.tasks if find_task(name).name == protocol["task"])
        return examples_of(run, name, protocol["split"])

    def check_examples(self, examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> None:
        references = [cut_references(one.task, one.references, tokenizer) for one in examples]
        sources = [(one.task_id, one.prompt) for one in examples]
        self.findings.compare("examples", self.summary.get("examples_sha256"), examples_digest(sources, references))

    def decoding(self, run: RunConfig, examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
        return greedy(examples[0].task, tokenizer, run)

    def protocol(self, run: RunConfig) -> dict[str, Any]:
        recorded = self.summary["protocol"]
        return task_protocol(run, recorded["task"], recorded["split"])


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path} is not there")
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise UserError(f"{path}: not JSON lines ({error})") from None


def _differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield what differs between two JSON values, by dotted name; floats may differ in their last bits."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif isinstance(before, float) and isinstance(now, float):
        if not math.isclose(before, now, rel_tol=1e-9, abs_tol=1e-12):
            yield name, before, now
    elif before != now:
        yield name, before, now


def _first_difference(before: str, now: str) -> str:
    pairs = zip(before, now, strict=False)
    at = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(before), len(now)))
    around = slice(max(0, at - _AROUND), at + _AROUND)
    return f"at character {at + 1}: was {before[around]!r}, is {now[around]!r}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:60]}..."
