"""What is checked before a job is submitted: mistakes that a queue would otherwise tell hours later."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from adept_ds.backbone.hub import (
    TOKENIZER_CONFIG_NAME,
    cached_adapter,
    hub_adapter,
    is_local,
    is_tokenizer_here,
    missing_model_files,
)
from adept_ds.config.base import parse_bytes
from adept_ds.config.batch import batch_arithmetic
from adept_ds.config.run import RunConfig
from adept_ds.data.hub import hub_data_sets, is_dataset_cached, is_hub_data
from adept_ds.errors import UserError, did_you_mean, did_you_mean_path
from adept_ds.slurm import queue
from adept_ds.slurm.site import SiteConfig, parse_time
from adept_ds.slurm.submission import Job
from adept_ds.storage.run_folder import CONFIG_NAME, check_same_run

PREFETCH = "fetch it where the hub can be reached, by python launchers/submit.py prefetch --config FILE"


def run_problems(run: RunConfig, site: SiteConfig, nodes: int) -> list[str]:
    """What speaks against training `run` on so many nodes, as far as it can be told without SLURM."""
    checks: list[Callable[[], object]] = [
        lambda: batch_arithmetic(run.train, nodes * site.ranks_per_node),
        lambda: _check_warning(site),
        lambda: _check_run_folder(run),
    ]
    problems = [message for check in checks if (message := _message(check)) is not None]
    unseen = [*path_problems(run, site.offline), *adapter_problems(run, site.offline)]
    if not (problems or unseen) and (message := _message(lambda: _check_memory(run, site, nodes))):
        problems.append(message)
    return problems + unseen


def site_problems(site: SiteConfig) -> Iterator[str]:
    """Files that the site names and that are not there."""
    image = site.container
    if image and _is_image_path(site, image) and not Path(image).exists():
        yield f"container is {image!r}: no such file or folder{did_you_mean_path(image)}"
    if site.python and not image and "/" in site.python and not Path(site.python).exists():
        yield f"python is {site.python!r}: no such file{did_you_mean_path(site.python)}"


def _is_image_path(site: SiteConfig, image: str) -> bool:
    """Whether a container's image is a file or a folder, and not a name in a registry."""
    if "://" in image:
        return False
    reads_files = site.container_runtime == "command" and Path(site.container_command.split()[0]).name in (
        "apptainer",
        "singularity",
    )
    return reads_files or image.startswith(("/", "./", "../")) or image.endswith((".sif", ".simg", ".sqsh"))


def path_problems(run: RunConfig, offline: bool) -> Iterator[str]:
    """Models and data of a run that a job could not read. `offline`: the hub's cache is all that it can reach."""
    model, data = run.model, run.data
    if is_local(model.name_or_path) or offline:
        missing = missing_model_files(model.name_or_path, model.revision)
        if missing:
            yield _not_there("model.name_or_path", model.name_or_path, missing)
    tokenizer = model.tokenizer
    if tokenizer and (is_local(tokenizer) or offline) and not is_tokenizer_here(tokenizer):
        yield _not_there("model.tokenizer", tokenizer, [TOKENIZER_CONFIG_NAME])
    for key, path in (("data.path", data.path), ("data.validation_path", data.validation_path)):
        if path is not None and not Path(path).exists() and not is_hub_data(data, path):
            yield f"{key} is {path!r}: no such file or folder{did_you_mean_path(path)}"
    if offline:
        for name in hub_data_sets(data):
            if not is_dataset_cached(name):
                yield f"the data set {name!r} is not in this machine's cache, and the nodes are offline; {PREFETCH}"


def adapter_problems(run: RunConfig, offline: bool) -> Iterator[str]:
    """Adapters that the training of a run starts from and a job could not read. `offline` as in `path_problems`."""
    for key, source in run.method.adapter_folders.items():
        yield from unreadable_adapter(f"{key} is {source!r}", source, offline)


def unreadable_adapter(named: str, source: str, offline: bool) -> Iterator[str]:
    """What speaks against an adapter; `named` is how a message begins that is about it."""
    if hub := hub_adapter(source):
        if offline and cached_adapter(source) is None:
            get = f"hf download {hub[0]}" + (f" --revision {hub[1]}" if hub[1] else "")
            yield f"{named}: not in this machine's cache, and the nodes are offline; fetch it by `{get}`"
    elif not Path(source).is_dir():
        yield f"{named}: no such folder{did_you_mean_path(source)}"


def slurm_problems(site: SiteConfig, jobs: Sequence[Job]) -> list[str]:
    """What SLURM has against the jobs."""
    if not queue.is_available():
        return ["SLURM is not installed here (no sbatch): submit on the cluster's login node, or look with --dry-run"]
    try:
        known = queue.partitions()
    except UserError as error:
        return [str(error)]
    problems = [
        f"{key} is {name!r}, and the partitions are {', '.join(known)}{did_you_mean(name, known)}"
        for key in ("partition", "eval_partition", "cpu_partition")
        for names in (getattr(site, key),)
        for name in (names or "").split(",")
        if name and name not in known
    ]
    if not problems:
        found = ((job.script.name, queue.check_script(job.text)) for job in jobs)
        problems = [f"SLURM refuses {name}: {message}" for name, message in found if message]
    return problems


def _message(check: Callable[[], object]) -> str | None:
    try:
        check()
    except UserError as error:
        return str(error)
    return None


def _check_warning(site: SiteConfig) -> None:
    if site.warning_seconds >= parse_time(site.time):
        raise UserError(
            f"warning_seconds is {site.warning_seconds}, and time is {site.time!r}, which is no longer; expected less"
        )


def _check_run_folder(run: RunConfig) -> None:
    folder = Path(run.logging.run_dir)
    if any(ord(letter) < 32 or letter == "\\" for letter in str(folder.absolute())):
        raise UserError(f"logging.run_dir is {str(folder)!r}: SLURM takes no log path with such characters in it")
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise UserError(f"logging.run_dir is {str(folder)!r}, and {place} is no folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(
            f"logging.run_dir is {str(folder)!r}, and you may not write to {place}, which is {_owner(place)}'s"
        )
    if (folder / CONFIG_NAME).is_file():
        check_same_run(folder, run.model_dump(mode="json", by_alias=True))


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except KeyError:  # a user whom this machine does not know
        return f"user {path.stat().st_uid}"


def _check_memory(run: RunConfig, site: SiteConfig, nodes: int) -> None:
    """Ask the planner, where it is known how much memory a GPU has."""
    if site.gpu_memory is None or not site.gpus_per_node:
        return
    from adept_ds.backbone.load import resolve_architecture
    from adept_ds.planner.memory import Cluster
    from adept_ds.planner.memory_plan import plan_memory
    from adept_ds.planner.memory_report import memory_text

    architecture, _ = resolve_architecture(run.model)
    plan = plan_memory(run, architecture, Cluster(nodes, site.ranks_per_node, parse_bytes(site.gpu_memory)))
    if not plan.configured.fits:
        raise UserError(f"the run does not fit into gpu_memory {site.gpu_memory}:\n{memory_text(plan)}")


def _not_there(key: str, source: str, missing: Sequence[str]) -> str:
    if not is_local(source):
        where = f"{missing[0]} is not in this machine's cache, and the nodes are offline"
        return f"{key} is {source!r}, of which {where}; {PREFETCH}"
    if not Path(source).is_dir():
        return f"{key} is {source!r}: no such folder{did_you_mean_path(source)}"
    return f"{key} is {source!r}, where {', '.join(missing)} is missing; expected a safetensors checkpoint"
