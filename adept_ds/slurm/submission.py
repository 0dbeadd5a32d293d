"""Submissions: a run's chain of jobs, or what is left of it.

    RUN/slurm/submission.json     ids of the jobs by kind     RUN/slurm/config.json    the config as it was submitted
    RUN/slurm/train.sbatch, ..    the scripts                 RUN/slurm/JOB.log        a log for each job

The chain is train, eval (on GPUs), score (runs the programs that MBPP's eval has sampled, on CPUs), report. Each
follows if the one before it has succeeded; a training that is requeued keeps its id, so that they wait for its last
try. A sweep is one job array, with the same files in the sweep's folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adept_ds.config.loader import resolved_json
from adept_ds.config.run import RunConfig
from adept_ds.data.hub import hub_data_sets
from adept_ds.errors import UserError
from adept_ds.evaluation.results import GENERATION_NAME, SUMMARY_NAME
from adept_ds.files import atomic_write
from adept_ds.formats import FORMATS
from adept_ds.slurm import queue
from adept_ds.slurm.evaluations import Request
from adept_ds.slurm.record import SLURM_FOLDER, Submission, write_record
from adept_ds.slurm.script import SCRIPTS, render, site_lines
from adept_ds.slurm.site import SiteConfig
from adept_ds.slurm.tries import STOP_NAME
from adept_ds.storage.run_folder import read_status

Kind = Literal["train", "eval", "score", "report"]
KINDS: tuple[Kind, ...] = ("train", "eval", "score", "report")

Benchmark = Literal["mbpp", "text2text"]
BENCHMARKS: tuple[Benchmark, ...] = ("mbpp", "text2text")
"""What an evaluation is on, by the name of its program in `evals`."""
BACKBONE_ALONE = "base"
"""Name of the evaluation of a backbone without adapter."""


@dataclass(frozen=True)
class Job:
    """One job that is to be submitted."""

    kind: Kind
    script: Path
    text: str


@dataclass(frozen=True)
class Cluster:
    """Where jobs come from and go to."""

    site: SiteConfig
    root: Path | None
    """The repository; None where the package is installed, which ranks then import from their interpreter."""
    cwd: Path
    """Where the user is, from which relative paths in configs are meant; the jobs run there."""

    @classmethod
    def here(cls, site: SiteConfig, root: Path | None) -> Cluster:
        """From this folder, by the name that the shell has for it: what its links lead to may be this node's alone."""
        shown = Path(os.environ.get("PWD", "."))
        return cls(site, root, shown if shown.is_absolute() and shown.samefile(".") else Path.cwd())

    @property
    def python(self) -> str:
        """Interpreter of the ranks."""
        return self.site.python or ("python3" if self.site.container else sys.executable)


def job_name(folder: Path, kind: Kind = "train") -> str:
    """Name of a job, by which SLURM lets one of a run at a time start and by which the run is found in the queue."""
    path = folder.absolute()
    slug = re.sub(r"[^A-Za-z0-9.-]+", "_", path.name)[:60]
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    return f"adept_ds-{slug}-{digest}{'' if kind == 'train' else f'.{kind}'}"


def train_job(run: RunConfig, cluster: Cluster, nodes: int) -> Job:
    """The training of one run."""
    folder = cluster.cwd / run.logging.run_dir
    options = [*_options("train", folder, "%j", cluster, nodes), "--dependency=singleton"]
    return _job("train", "train", folder, run, cluster, options, [str(config_path(folder))])


def array_job(run: RunConfig, cluster: Cluster, nodes: int, count: int, concurrent: int | None) -> Job:
    """The members of a sweep that are left, whose configs are the lines of `members_path`."""
    folder = cluster.cwd / run.logging.run_dir
    options = [
        *_options("train", folder, "%A_%a", cluster, nodes),
        f"--array=0-{count - 1}{f'%{concurrent}' if concurrent else ''}",
    ]
    return _job("train", "train", folder, run, cluster, options, [str(members_path(folder))])


def benchmark(run: RunConfig) -> Benchmark:
    """What a run is evaluated on. UserError if there is nothing for its data."""
    found = FORMATS[run.data.format].benchmark
    if found is None:
        raise UserError(f"data.format {run.data.format} has neither tests nor tasks to be evaluated on")
    return found


def evaluation_jobs(run: RunConfig, cluster: Cluster, nodes: int, request: Request) -> list[Job]:
    """Samples, scores and report of an evaluation on what the run is trained for, the samples made on so many nodes."""
    folder = cluster.cwd / run.logging.run_dir
    # Generated programs are run apart, where no GPU waits for them. Texts are scored at once.
    apart = benchmark(run) == "mbpp"
    evaluation = [str(config_path(folder)), *request.flags, *["--samples_only"] * apart]
    words: list[tuple[Kind, str, list[str]]] = [("eval", f"eval_{benchmark(run)}", evaluation)]
    if apart:
        words.append(("score", "score_mbpp", [request.out]))
    words.append(("report", "report", [run.logging.run_dir]))
    return [
        _job(kind, template, folder, run, cluster, _options(kind, folder, "%j", cluster, nodes), arguments)
        for kind, template, arguments in words
    ]


def left_of_evaluation(jobs: Sequence[Job], run: RunConfig, request: Request) -> tuple[Sequence[Job], list[str]]:
    """Those jobs of an evaluation that are not done, and why what is there does not count.

    Samples of programs that are there are scored only.
    """
    if run.data.tasks:
        foreign = [why for task in run.data.tasks if (why := request.foreign_figures(run, task))]
        is_whole = all((Path(request.out) / task / SUMMARY_NAME).is_file() for task in run.data.tasks)
        return ([] if is_whole and not foreign else jobs), foreign
    why = request.foreign_samples(run)
    if why or not (Path(request.out) / GENERATION_NAME).is_file():
        return jobs, [why] if why else []
    return ([] if request.has_scores() else jobs[1:]), []


def config_path(folder: Path) -> Path:
    """The config as it was submitted: what the user's file says later does not change a job that waits."""
    return folder / SLURM_FOLDER / "config.json"


def members_path(folder: Path) -> Path:
    """Config paths of a job array's tasks."""
    return folder / SLURM_FOLDER / "members.txt"


def evaluation_out(run: RunConfig, adapter: str | None) -> str:
    """Where the evaluation of a run, or of its backbone alone, goes."""
    return str(Path(run.logging.run_dir) / "eval" / (run.method.name if adapter else BACKBONE_ALONE))


def _job(
    kind: Kind,
    template: str,
    folder: Path,
    run: RunConfig,
    cluster: Cluster,
    options: Sequence[str],
    arguments: Sequence[str],
) -> Job:
    site = cluster.site
    home = Path(os.path.expandvars(site.env.get("HF_HOME", "$HOME/.cache/huggingface")))
    more = {}
    if site.offline and hub_data_sets(run.data):
        # Without the hub a data set is read from the cache in which it was prepared.
        more["HF_DATASETS_CACHE"] = str(home / "datasets")
    binds = [path for path in (cluster.root, cluster.cwd, folder, home) if path]
    lines = site_lines(site, cluster.root, cluster.python, binds, more)
    text = render(SCRIPTS / f"{template}.sbatch", options, lines, arguments)
    return Job(kind, folder / SLURM_FOLDER / f"{kind}.sbatch", text)


def _options(kind: Kind, folder: Path, log: str, cluster: Cluster, nodes: int) -> list[str]:
    """Options of sbatch, all but dependencies on other jobs."""
    site = cluster.site
    on_gpus = kind in ("train", "eval")
    values: dict[str, str | int | None] = {"job-name": job_name(folder, kind), **_place(kind, site)}
    if on_gpus:
        values |= {
            "nodes": nodes,
            "ntasks-per-node": site.ranks_per_node,
            **_gpu_request(site),
            "cpus-per-task": site.cpus_per_task,
            "mem": site.mem,
            "time": (site.eval_time if kind == "eval" else None) or site.time,
        }
    else:
        cpus = site.score_cpus if kind == "score" else 2
        values |= {"nodes": 1, "ntasks": 1, "cpus-per-task": cpus, "time": site.cpu_time}
    logs = str(folder / SLURM_FOLDER).replace("%", "%%")
    values |= {"chdir": str(cluster.cwd), "output": f"{logs}/{log}.log", "open-mode": "append"}
    options = [f"--{name}={value}" for name, value in values.items() if value is not None]
    options += ["--exclusive"] * (site.exclusive and on_gpus) + ["--requeue"]
    if kind == "train":
        options.append(f"--signal=B:USR1@{site.warning_seconds}")
    else:
        options.append("--kill-on-invalid-dep=yes")
    return [*options, *site.extra]


def _place(kind: Kind, site: SiteConfig) -> dict[str, str | None]:
    """Partition, account, QOS and constraint of a job: those of its kind, else those of training."""
    if kind == "train":
        own: tuple[str | None, ...] = (None,) * 4
    elif kind == "eval":
        own = (site.eval_partition, site.eval_account, site.eval_qos, site.eval_constraint)
    else:
        own = (site.cpu_partition, site.cpu_account, site.cpu_qos, site.cpu_constraint)
    partition, account, qos, constraint = own
    # What is asked for on a partition may not be there on another.
    is_same = partition in (None, site.partition)
    return {
        "partition": partition or site.partition,
        "account": account or site.account,
        "qos": qos or (site.qos if is_same else None),
        "constraint": constraint or (site.constraint if is_same else None),
    }


def _gpu_request(site: SiteConfig) -> dict[str, str]:
    if not site.gpus_per_node:
        return {}
    kind = f"{site.gpu_type}:" if site.gpu_type else ""
    if site.gpu_request == "gres":
        return {"gres": f"gpu:{kind}{site.gpus_per_node}"}
    return {"gpus-per-node": f"{kind}{site.gpus_per_node}"}


def refuse_queued(folder: Path) -> None:
    """Refuse to submit what is in the queue already.

    Raises:
        UserError: Names the job.
    """
    order = [job_name(folder, kind) for kind in KINDS]
    found = sorted(queue.queued_jobs(names=order), key=lambda job: order.index(job.name))
    if found:
        job, shown = found[0], shlex.quote(str(folder))
        raise UserError(
            f"{folder} is in the queue already: job {job.label} of {job.user} ({job.name}) is {job.state}. See it by "
            f"`adept-ds status {shown}`, end it by `adept-ds submit stop {shown}`"
        )


def is_finished(run_dir: Path) -> bool:
    """Whether a run has taken all its steps."""
    return read_status(run_dir).get("state") == "finished"


def write_scripts(jobs: Sequence[Job], run: RunConfig) -> None:
    """Write the scripts, and the config that they name, into the run folder."""
    for job in jobs:
        with atomic_write(job.script) as file:
            file.write(job.text)
    with atomic_write(config_path(jobs[0].script.parent.parent)) as file:
        file.write(resolved_json(run))


def submit(jobs: Sequence[Job], members: Sequence[str] = ()) -> Submission:
    """Submit scripts that are written, each to start once the one before it has succeeded, and record their ids.

    Raises:
        UserError: SLURM refuses one; those before it are cancelled.
        OSError: Their record cannot be written; all are cancelled.
    """
    folder = jobs[0].script.parent.parent
    for name in members or (".",):
        (folder / name / STOP_NAME).unlink(missing_ok=True)
    ids: dict[str, str] = {}
    last = None
    try:
        for job in jobs:
            last = queue.submit(str(job.script), *((f"--dependency=afterok:{last}",) if last else ()))
            ids[job.kind] = last
        return write_record(folder, ids, members, [job.script for job in jobs])
    except (UserError, OSError):
        if ids:
            queue.cancel(*ids.values())
        raise
