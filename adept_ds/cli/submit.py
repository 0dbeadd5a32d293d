"""Submit runs to SLURM.

    adept-ds submit train --config llama3_8b --gpus-per-node 4 --then-eval mbpp
    adept-ds submit eval --config llama3_8b --adapter runs/llama3_8b/best
    adept-ds submit train --config t5_base --then-eval text2text
    adept-ds submit sweep --config t5_base --grid 'train.seed=[1, 2, 3]' --concurrent 2
    adept-ds submit prefetch --config llama3_8b
    adept-ds submit stop runs/llama3_8b

Everything is checked before it is submitted, and --dry-run prints the scripts that would be. A run that is finished is
left alone, one that is in the queue is refused, and any other goes on from its newest checkpoint. Each command has
--help. What belongs to the cluster is in the site file, see launchers/slurm/README.md.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from adept_ds.config.command_line import parse_command_line, parse_count, parse_flags
from adept_ds.config.loader import LoadedConfig
from adept_ds.config.run import RunConfig
from adept_ds.errors import UserError, did_you_mean
from adept_ds.files import atomic_write, repository
from adept_ds.rank_environment import forget_ranks
from adept_ds.slurm import record, submission
from adept_ds.slurm.checks import path_problems, run_problems, site_problems, slurm_problems, unreadable_adapter
from adept_ds.slurm.evaluations import Request
from adept_ds.slurm.site import SITE_SECTION, add_site_flags, load_site, site_help
from adept_ds.slurm.submission import Cluster, Job

PROGRAM = "adept-ds submit"
ROOT = Path(os.environ["ADEPT_DS_ROOT"]) if os.environ.get("ADEPT_DS_ROOT") else repository()
"""The checkout that ranks import the package from; None where it is installed."""


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of all commands that submit."""
    parser.add_argument("--nodes", type=parse_count, default=1, metavar="N", help="nodes (default: 1)")
    parser.add_argument("--dry_run", action="store_true", help="print what would be submitted, and end")
    add_site_flags(parser)


def add_train_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `train`."""
    parser.add_argument(
        "--then_eval",
        choices=submission.BENCHMARKS,
        help="evaluate the best checkpoint after the last try, on one node's GPUs: text2text if the data are tasks, "
        "else mbpp, whose programs then run on cpu_partition",
    )
    add_common_flags(parser)


def add_eval_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `eval`."""
    parser.add_argument(
        "--adapter", metavar="FOLDER", help="adapter (hub id too) or model to evaluate (default: the backbone alone)"
    )
    parser.add_argument("--out", metavar="FOLDER", help="where it goes (default: eval/METHOD or eval/base of the run)")
    parser.add_argument("--split", metavar="SPLIT", help="problems or examples that count (default: test)")
    parser.add_argument("--k", type=parse_count, nargs="+", metavar="K", help="the k of MBPP's pass@k (default: 1)")
    parser.add_argument("--paper_scoring", action="store_true", help="MBPP: as in `adept-ds eval`")
    add_common_flags(parser)


def add_sweep_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `sweep`."""
    parser.add_argument("--grid", nargs="+", metavar="GRID", help="as in `adept-ds sweep`")
    parser.add_argument("--concurrent", type=parse_count, metavar="N", help="so many runs at a time (default: all)")
    add_common_flags(parser)


def add_stop_flags(parser: argparse.ArgumentParser) -> None:
    """Arguments of `stop`."""
    parser.add_argument("run_dir", nargs="+", type=Path, metavar="RUN", help="run folder, or a sweep's")


def parse(
    arguments: Sequence[str], command: str, add_flags: Callable[[argparse.ArgumentParser], object]
) -> tuple[argparse.Namespace, LoadedConfig, Cluster]:
    """Parse a command's arguments, its config and its site. UserError with the problems of all three."""
    clusters = []

    def check(flags: argparse.Namespace) -> None:
        clusters.append(Cluster.here(load_site(flags, ROOT), ROOT))

    description = COMMANDS[command].__doc__ or ""
    flags, loaded = parse_command_line(
        arguments, f"{PROGRAM} {command}", description, add_flags, check, {SITE_SECTION: site_help}
    )
    # The site's caches are looked into here too. The hub's library reads where they are when it is imported.
    for name, value in clusters[0].site.expanded_env().items():
        if name.startswith("HF_"):
            os.environ[name] = value
    return flags, loaded, clusters[0]


def train(arguments: Sequence[str]) -> int:
    """Submit the training of a run, or go on with it."""
    flags, loaded, cluster = parse(arguments, "train", add_train_flags)
    run, folder = loaded.run, Path(loaded.run.logging.run_dir)
    jobs, problems = [], []
    if not submission.is_finished(folder):
        jobs.append(submission.train_job(run, cluster, flags.nodes))
        problems = run_problems(run, cluster.site, flags.nodes)
    if flags.then_eval:
        if flags.then_eval != submission.benchmark(run):
            raise UserError(
                f"--then-eval {flags.then_eval}: data.format is {run.data.format!r}, expected --then-eval "
                f"{submission.benchmark(run)}"
            )
        adapter = str(folder / "best")
        request = Request(adapter, submission.evaluation_out(run, adapter))
        evaluation = submission.evaluation_jobs(run, cluster, 1, request)
        jobs += evaluation if jobs else left_of_evaluation(evaluation, run, request)
    return submit(jobs, problems, loaded, cluster, flags)


def evaluate(arguments: Sequence[str]) -> int:
    """Submit an evaluation, on the tasks if the data are tasks, else on MBPP, and a report."""
    flags, loaded, cluster = parse(arguments, "eval", add_eval_flags)
    run = loaded.run
    problems = [*path_problems(run, cluster.site.offline)]
    if flags.adapter is not None:
        problems += unreadable_adapter(f"--adapter {flags.adapter}", flags.adapter, cluster.site.offline)
    if submission.benchmark(run) != "mbpp" and (flags.k or flags.paper_scoring):
        raise UserError(f"--k and --paper-scoring are MBPP's; data.format is {run.data.format!r}")
    request = Request(
        flags.adapter,
        flags.out or submission.evaluation_out(run, flags.adapter),
        flags.split or "test",
        tuple(flags.k or (1,)),
        flags.paper_scoring,
    )
    jobs = submission.evaluation_jobs(run, cluster, flags.nodes, request)
    return submit(left_of_evaluation(jobs, run, request), problems, loaded, cluster, flags)


def left_of_evaluation(jobs: Sequence[Job], run: RunConfig, request: Request) -> Sequence[Job]:
    """Those jobs of an evaluation that are not done; says why what is there does not count."""
    left, reasons = submission.left_of_evaluation(jobs, run, request)
    for reason in reasons:
        print(f"evaluated anew: {reason}", file=sys.stderr)
    return left


def sweep(arguments: Sequence[str]) -> int:
    """Submit the runs of a grid that are left as one job array."""
    flags, loaded, cluster = parse(arguments, "sweep", add_sweep_flags)
    if not flags.grid:
        raise UserError("--grid is needed: a JSON file, or key=[values] items such as 'train.seed=[1, 2, 3]'")
    from adept_ds.training.sweep import members, read_grid, write_config, write_tables

    found = members(loaded, read_grid(flags.grid))
    left = [member for member in found if not submission.is_finished(member.run_dir)]
    # The planner takes seconds; the members of a grid differ little in memory.
    without_memory = cluster.site.model_copy(update={"gpu_memory": None})
    sites = [cluster.site, *[without_memory] * (len(left) - 1)]
    problems = [
        problem
        for member, site in zip(left, sites, strict=False)
        for problem in run_problems(member.run, site, flags.nodes)
    ]
    folder = Path(loaded.run.logging.run_dir)

    def prepare() -> None:
        configs = [write_config(member, folder) for member in left]
        with atomic_write(submission.members_path(folder)) as file:
            file.writelines(f"{cluster.cwd / path}\n" for path in configs)

    jobs = [submission.array_job(loaded.run, cluster, flags.nodes, len(left), flags.concurrent)] if left else []
    status = submit(jobs, [*dict.fromkeys(problems)], loaded, cluster, flags, [member.name for member in left], prepare)
    if not flags.dry_run:
        print(write_tables(found, folder), end="")
    return status


def prefetch(arguments: Sequence[str]) -> int:
    """Fetch what a run reads from the hub, on a machine that can reach it."""
    _, loaded, _ = parse(arguments, "prefetch", add_site_flags)
    os.environ.pop("HF_HUB_OFFLINE", None)
    from adept_ds.slurm.prefetch import prefetch as fetch

    for line in fetch(loaded.run):
        print(line, flush=True)
    return 0


def stop(arguments: Sequence[str]) -> int:
    """Make runs save and end, and not come back before they are submitted again."""
    flags = parse_flags(arguments, f"{PROGRAM} stop", stop.__doc__ or "", add_stop_flags)
    for run_dir in flags.run_dir:
        print(record.stop(run_dir))
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "eval": evaluate,
    "sweep": sweep,
    "prefetch": prefetch,
    "stop": stop,
}


def submit(
    jobs: Sequence[Job],
    problems: Sequence[str],
    loaded: LoadedConfig,
    cluster: Cluster,
    flags: argparse.Namespace,
    members: Sequence[str] = (),
    prepare: Callable[[], None] = lambda: None,
) -> int:
    """Check and submit a chain of jobs, or print it.

    Args:
        jobs: The chain; nothing to do if it is empty.
        problems: What speaks against it already.
        loaded: The config.
        cluster: Where it goes.
        flags: The command's flags.
        members: Names of the runs of a sweep.
        prepare: Writes what the jobs need beside their scripts.
    """
    folder = Path(loaded.run.logging.run_dir)
    if not jobs:
        print(f"{folder} is finished; nothing to do")
        return 0
    problems = [*problems, *site_problems(cluster.site)]
    if flags.dry_run:
        print(scripts_text(jobs), end="")
        for problem in problems:
            print(f"it would be refused here: {problem}", file=sys.stderr)
        return min(len(problems), 1)
    problems = [*problems, *slurm_problems(cluster.site, jobs)]
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{loaded.path} is not submitted: {count}\n{listed}")
    submission.refuse_queued(folder)
    try:
        prepare()
        submission.write_scripts(jobs, loaded.run)
        done = submission.submit(jobs, members)
    except OSError as error:
        raise UserError(
            f"logging.run_dir is {str(folder)!r}, where {error.filename} cannot be written: {error.strerror}; nothing "
            "is submitted"
        ) from None
    print(submitted_text(done, jobs, folder))
    return 0


def scripts_text(jobs: Sequence[Job]) -> str:
    """All scripts, each behind the command that submits it."""
    texts: list[str] = []
    before: str | None = None
    for job in jobs:
        dependency = [f"--dependency=afterok:JOB_ID_OF_{before.upper()}"] if before else []
        texts.append(f"==> {shlex.join(['sbatch', '--parsable', *dependency, str(job.script)])} <==\n{job.text}")
        before = job.kind
    return "\n".join(texts)


def submitted_text(done: record.Submission, jobs: Sequence[Job], folder: Path) -> str:
    """Ids, files, and how to go on."""
    logs = done.folder / record.SLURM_FOLDER
    first = done.jobs[jobs[0].kind]
    log = logs / (f"{first}_*.log" if done.members else f"{first}.log")
    shown = shlex.quote(str(folder))
    return "\n".join(
        [
            f"submitted  {', '.join(f'{job.kind} {done.jobs[job.kind]}' for job in jobs)}",
            f"scripts    {', '.join(str(job.script) for job in jobs)}",
            f"log        {log}",
            f"follow     tail -F {log if done.members else shlex.quote(str(log))}",
            f"state      adept-ds status {shown} --watch",
            f"last words adept-ds logs {shown}",
            f"stop       {PROGRAM} stop {shown}",
        ]
    )


def main(arguments: Sequence[str]) -> int:
    """Hand over to the command that the first word names."""
    forget_ranks(os.environ)  # what a shell has of other launchers' makes no rank of this program
    name, *rest = arguments or ["--help"]
    if name in ("--help", "-h"):
        print(__doc__)
        return 0
    if name not in COMMANDS:
        raise UserError(f"{name}: expected one of {', '.join(COMMANDS)}{did_you_mean(name, COMMANDS)}")
    return COMMANDS[name](rest)
