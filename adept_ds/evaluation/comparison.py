"""Two scored sets of samples side by side: on which problems they differ, by how much, and how certain that is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from adept_ds.errors import UserError
from adept_ds.evaluation.results import Results
from adept_ds.evaluation.statistics import Estimate, PairedDifference, mean_pass_at_k, paired_difference, problem_scores


@dataclass(frozen=True)
class Comparison:
    """The second results against the first ones, on the same problems."""

    k: int
    first: Estimate
    second: Estimate
    difference: PairedDifference
    verdicts: dict[str, tuple[int, int]]
    """Verdict to the number of samples in the first and in the second."""


def compare(first: Results, second: Results, k: int = 1) -> Comparison:
    """Compare pass@k on the problems that both were scored on.

    Raises:
        UserError: The problems are not the same, or one has fewer than `k` samples.
    """
    hashes = (first.problems_sha256, second.problems_sha256)
    if None not in hashes and hashes[0] != hashes[1]:
        raise UserError(
            f"{first.path} and {second.path} were scored on different problems, or on different prompts or tests "
            f"(problems_sha256 {str(hashes[0])[:12]}... and {str(hashes[1])[:12]}...); score both on the same file"
        )
    for one, other in ((first, second), (second, first)):
        only = sorted(one.tallies.keys() - other.tallies.keys())
        if only:
            raise UserError(
                f"{len(only)} of the {len(one.tallies)} problems of {one.path} are not in {other.path}, "
                f"the first is {only[0]!r}; a paired comparison needs the same problems in both"
            )
    tallies = [results.counted(k) for results in (first, second)]
    labels = sorted(first.verdicts.keys() | second.verdicts.keys(), key=lambda label: (label != "passed", label))
    return Comparison(
        k=k,
        first=mean_pass_at_k(tallies[0], k),
        second=mean_pass_at_k(tallies[1], k),
        difference=paired_difference(problem_scores(tallies[0], k), problem_scores(tallies[1], k)),
        verdicts={label: (first.verdicts.get(label, 0), second.verdicts.get(label, 0)) for label in labels},
    )


def comparison_text(comparison: Comparison, names: tuple[str, str]) -> str:
    """The comparison as a plain-text table."""
    width = max(len(label) for label in (*names, *comparison.verdicts, "difference")) + 2
    lines = [f"{'':{width}}{f'pass@{comparison.k}':>8}   {'95 % interval':^15}   by"]
    for name, estimate in zip(names, (comparison.first, comparison.second), strict=True):
        interval = f"{100 * estimate.low:5.1f} to {100 * estimate.high:5.1f}"
        lines.append(f"{name:{width}}{100 * estimate.mean:>6.1f} %   {interval:^15}   {estimate.method}")
    difference = comparison.difference
    interval = f"{100 * difference.low:+5.1f} to {100 * difference.high:+5.1f}"
    lines.append(f"{'difference':{width}}{100 * difference.mean:>+8.1f}   {interval:^15}   {difference.method}")
    lines.append(
        f"{names[1]} is better on {difference.better} of {difference.n} problems and worse on {difference.worse}; "
        f"sign test p = {difference.p_value:.2g}"
    )
    lines.append(f"\n{'samples':{width}}{names[0]:>12}{names[1]:>12}")
    lines += [f"{label:{width}}{one:>12}{other:>12}" for label, (one, other) in comparison.verdicts.items()]
    return "\n".join(lines)


def comparison_json(comparison: Comparison, paths: tuple[Path, Path]) -> str:
    """The comparison as a JSON object."""
    return json.dumps({"files": [str(path) for path in paths], **asdict(comparison)}, indent=2) + "\n"
