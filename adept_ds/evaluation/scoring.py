"""From samples to verdicts to pass@k: every sample runs in the sandbox, and every verdict is kept."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from adept_ds.config.run import SandboxConfig
from adept_ds.errors import UserError
from adept_ds.evaluation.expected import judging_of
from adept_ds.evaluation.results import RESULTS_NAME, SUMMARY_NAME, verdict_label
from adept_ds.evaluation.statistics import Estimate, mean_pass_at_k
from adept_ds.files import atomic_write, write_json
from adept_ds.formats import Problem, Sample
from adept_ds.formats.mbpp import task_in_words
from adept_ds.sandbox import Limits, Program, Sandbox, Verdict


@dataclass(frozen=True)
class Score:
    """All verdicts of a set of samples, and what follows from them."""

    results: list[dict[str, Any]]
    """One entry a sample, in the samples' order: task id, task in words, completion, program, how it was found in the
    completion, verdict."""
    pass_at_k: dict[int, Estimate]
    """k to the mean over problems; 1 is always there, as every comparison and report starts from it."""
    pass_at_k_apart: dict[int, Estimate]
    """The same with those passes as failed whose tests ran in the program's process, where it can reach them."""
    base_pass_at_k: dict[int, Estimate]
    """The same by the original benchmark's tests alone; empty where the problems have no further ones."""
    verdicts: dict[str, int]
    """Verdict, with its kind where it has one, to the number of samples."""
    found: dict[str, int]
    """How a program stood in its completion to the number of samples."""
    missing: list[str]
    """Problems without a sample. They count as failed."""
    unique_samples: int
    """Programs that are not the same as another one for their problem. All samples count, the same ones too."""
    isolation: dict[str, Any]
    """The isolation that the programs ran in."""
    problems: int
    samples: int

    @property
    def in_process_passed(self) -> int:
        """Passes whose tests ran in the program's process."""
        return sum(result["in_process"] and result["status"] == "passed" for result in self.results)


def score_samples(
    problems: Sequence[Problem],
    samples: Sequence[Sample],
    config: SandboxConfig,
    ks: Sequence[int] = (1,),
    postprocess: Callable[[Problem, Sample], Sample] = lambda problem, sample: sample,
) -> Score:
    """Run every sample against its problem's tests.

    Args:
        problems: What counts; each is in the mean, with or without samples.
        samples: Completions, any number for a problem, identical ones included.
        config: The sandbox's settings.
        ks: The k of pass@k, beside 1.
        postprocess: Changes each sample before its program is made.

    Raises:
        UserError: A sample belongs to no problem, or a problem has fewer samples than the largest k.
        SandboxUnavailable: No isolation that `config` allows works here.
    """
    by_id = {problem.task_id: problem for problem in problems}
    unknown = sorted({sample.task_id for sample in samples} - by_id.keys())
    if unknown:
        raise UserError(
            f"{len(unknown)} task ids of the samples are none of the {len(problems)} problems, the first is "
            f"{unknown[0]!r}; the problems are {problems[0].task_id!r} .. {problems[-1].task_id!r}"
        )
    answers = []
    for sample in samples:
        problem = by_id[sample.task_id]
        processed = postprocess(problem, sample)
        answers.append(problem.answer(processed.completion, processed.is_program))
    limits = Limits(wall_seconds=config.wall_seconds, cpu_seconds=config.cpu_seconds, memory_mb=config.memory_mb)
    with Sandbox(config.isolation, limits, config.workers, config.cache, config.packages) as sandbox:
        asked = {sample.task_id for sample in samples}
        judging = judging_of((one for one in problems if one.task_id in asked), sandbox, config.cache)
        programs = [
            Program(str(number), answer.program, how.tests, how.cpu_seconds)
            for number, (sample, answer) in enumerate(zip(samples, answers, strict=True))
            for how in [judging[sample.task_id]]
        ]
        verdicts = _verdicts(sandbox, programs, "score")
        # What passes all tests passes the original ones among them, which are the first.
        base = {
            program.id: replace(program, tests=base_tests)
            for program, sample in zip(programs, samples, strict=True)
            if (base_tests := judging[sample.task_id].base_tests) is not None
        }
        failed = [program for program in base.values() if verdicts[program.id].status != "passed"]
        base_verdicts = verdicts | _verdicts(sandbox, failed, "score by the base tests")
        isolation = sandbox.isolation

    results, counts = [], {problem.task_id: [0, 0, 0, 0] for problem in problems}
    for sample, program, answer in zip(samples, programs, answers, strict=True):
        verdict = verdicts[program.id]
        has_passed = verdict.status == "passed"
        counts[sample.task_id][0] += 1
        counts[sample.task_id][1] += has_passed
        counts[sample.task_id][2] += has_passed and not verdict.in_process
        facts = {name: value for name, value in asdict(verdict).items() if name != "id"}
        if program.id in base:
            on_base = base_verdicts[program.id]
            counts[sample.task_id][3] += on_base.status == "passed"
            facts |= {f"base_{name}": getattr(on_base, name) for name in ("status", "kind", "detail")}
        task = task_in_words(by_id[sample.task_id].prompt)
        about = {"task_id": sample.task_id, "task": task, "completion": sample.completion, "program": program.source}
        results.append({**about, "found": answer.found, **facts})
    missing = [task_id for task_id, (n, *_) in counts.items() if n == 0]
    largest = max(ks)

    def pass_at_k(which: int) -> dict[int, Estimate]:
        tallies = {task_id: (tally[0], tally[which]) if tally[0] else (largest, 0) for task_id, tally in counts.items()}
        return {k: mean_pass_at_k(tallies, k) for k in dict.fromkeys((1, *ks))}

    return Score(
        results=results,
        pass_at_k=pass_at_k(1),
        pass_at_k_apart=pass_at_k(2),
        base_pass_at_k=pass_at_k(3) if any(problem.cases for problem in problems) else {},
        found=dict(Counter(answer.found for answer in answers).most_common()),
        verdicts=dict(Counter(verdict_label(one["status"], one["kind"]) for one in results).most_common()),
        missing=missing,
        unique_samples=len({(result["task_id"], result["program"]) for result in results}),
        isolation=isolation,
        problems=len(problems),
        samples=len(samples),
    )


def _verdicts(sandbox: Sandbox, programs: Sequence[Program], what: str) -> dict[str, Verdict]:
    bar = tqdm(sandbox.run(programs), total=len(programs), desc=what, unit="program", disable=not programs)
    return {verdict.id: verdict for verdict in bar}


def write_score(folder: Path, score: Score, facts: dict[str, Any]) -> None:
    """Write `results.jsonl` (one line a sample) and `summary.json` (`facts` and the figures)."""
    with atomic_write(folder / RESULTS_NAME) as file:
        file.writelines(json.dumps(result) + "\n" for result in score.results)
    write_json(folder / SUMMARY_NAME, {**facts, **figures_of(score), "isolation": score.isolation})


def figures_of(score: Score) -> dict[str, Any]:
    """What a summary says of a score: all that follows from its verdicts."""
    return {
        **{f"pass@{k}": asdict(estimate) for k, estimate in score.pass_at_k.items()},
        **{f"base_pass@{k}": asdict(estimate) for k, estimate in score.base_pass_at_k.items()},
        **{f"apart_pass@{k}": asdict(estimate) for k, estimate in score.pass_at_k_apart.items()},
        "problems": score.problems,
        "samples": score.samples,
        "unique_samples": {
            "total": score.unique_samples,
            "mean_per_problem": score.unique_samples / score.problems,
        },
        "missing": score.missing,
        "verdicts": score.verdicts,
        "programs_found": score.found,
        "in_process": sum(result["in_process"] for result in score.results),
        "in_process_passed": score.in_process_passed,
        "in_process_reasons": dict(Counter(one["reason"] for one in score.results if one["in_process"]).most_common()),
    }
