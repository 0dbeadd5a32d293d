"""Copies of the backbone on the nodes' own disks: read once over the network, reused when the job is requeued.

    srun --ntasks-per-node=1 python -m adept_ds.slurm.staging --config FILE [--section.key VALUE ..]
    python -m adept_ds.slurm.staging --where --config FILE      print the copy's folder

A copy is $ADEPT_DS_SCRATCH/models/DIGEST/NAME. The digest follows from the files' names, sizes and times, so a changed
model is another copy; the name is the model's own. It is filled under a temporary name and renamed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from adept_ds.config.command_line import parse_command_line
from adept_ds.config.run import ModelConfig
from adept_ds.entry_point import run_entry_point
from adept_ds.errors import NodeError, UserError

NEEDED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
"""Weights, configs and tokenizers; the hub has the same weights in other forms too."""


def source_folder(model: ModelConfig) -> Path:
    """The folder to copy: the config's own, or that of the hub's cache, which is filled if the hub can be reached.

    Raises:
        UserError: The model is neither a folder nor in the cache.
    """
    if Path(model.name_or_path).is_dir():
        return Path(model.name_or_path)
    try:
        return Path(snapshot_download(model.name_or_path, revision=model.revision, allow_patterns=list(NEEDED)))
    except (LocalEntryNotFoundError, ValueError) as error:
        raise UserError(f"model.name_or_path {model.name_or_path!r} cannot be staged: {error}") from None


def needed_files(source: Path) -> list[Path]:
    """Files of a model folder that are copied, in order."""
    return sorted({path for pattern in NEEDED for path in source.glob(pattern) if path.is_file()})


def staged_folder(model: ModelConfig, scratch: Path) -> Path:
    """Where the copy of a model is on every node."""
    source = source_folder(model)
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in needed_files(source)]
    digest = hashlib.sha256(repr((str(source.resolve()), facts)).encode()).hexdigest()[:12]
    return scratch / "models" / digest / Path(model.name_or_path).name


def stage(model: ModelConfig, scratch: Path, node: str) -> str:
    """Copy the model to this node unless it is there; return a line on what was done.

    Raises:
        NodeError: The disk is too small.
    """
    source, target = source_folder(model), staged_folder(model, scratch)
    if target.is_dir():
        return f"{node}: {target} is there already"
    files = needed_files(source)
    size = sum(path.stat().st_size for path in files)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        free = shutil.disk_usage(temporary).free
        if free < size:
            raise NodeError(
                f"{node}: {source} has {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on ADEPT_DS_SCRATCH "
                f"{scratch}; leave the node out (sbatch --exclude={node}), or go without ADEPT_DS_STAGE"
            )
        for path in files:
            shutil.copy(path, temporary)
        if not target.is_dir():  # another job on this node may have been faster
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return f"{node}: copied {size / 1e9:.2f} GB from {source} to {target}"


def main(arguments: Sequence[str]) -> None:
    """Stage, or say where."""

    def add_flags(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--where", action="store_true", help="print the copy's folder, and end")

    flags, loaded = parse_command_line(arguments, "python -m adept_ds.slurm.staging", __doc__ or "", add_flags)
    scratch = Path(os.environ["ADEPT_DS_SCRATCH"])
    if flags.where:
        print(staged_folder(loaded.run.model, scratch))
    else:
        print(stage(loaded.run.model, scratch, os.environ.get("SLURMD_NODENAME", "this node")), flush=True)


if __name__ == "__main__":
    run_entry_point(main)
