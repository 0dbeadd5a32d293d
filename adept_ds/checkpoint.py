"""Exact resume: one small folder a checkpoint, whole or not there.

    checkpoints/step-00000120/
        adapter_model.safetensors  adapter_config.json   the trained values in fp32, usable as an adapter
        optimizer.safetensors                            AdamW's two moments of each trained parameter, fp32
        rng.safetensors                                  every rank's random-number states
        state.json                                       step, epoch, best figure so far, world size
        manifest.json                                    sha256 of each file above

The backbone is never written. A folder is filled under a temporary name and renamed when all of it is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from adept_ds import adapter_io
from adept_ds.distributed import World, gather_objects
from adept_ds.errors import UserError
from adept_ds.files import atomic_write

MANIFEST = "manifest.json"
PREFIX = "step-"


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands. All else follows from it, the config and the tensors."""

    step: int
    """Optimizer steps taken; also the position in the data and in the schedule."""
    best_step: int | None = None
    """Step of the best adapter so far."""
    best_value: float | None = None
    """Its figure (loss or pass@1)."""
    world_size: int = 1
    """Number of ranks that wrote the checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, read back."""

    folder: Path
    state: TrainerState
    values: dict[str, Tensor]
    optimizer_states: dict[str, Tensor]
    rng: dict[str, Tensor]


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make `folder` with what `fill` writes, under a temporary name first; a folder that is there is replaced."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    # A process that was killed may have left it.
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    for path in [*temporary.iterdir(), temporary]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def save_checkpoint(
    root: Path,
    state: TrainerState,
    save_adapter: Callable[[Path], None],
    optimizer_states: Mapping[str, Tensor],
    rng: Mapping[str, Tensor],
    keep: int,
) -> Path:
    """Write a checkpoint below `root` and remove all but the newest `keep`. For rank 0 alone.

    Checkpoints of later steps go too: the run went back to before them, and they belong to steps that it takes anew.
    """

    def fill(folder: Path) -> None:
        save_adapter(folder)
        (folder / "optimizer.safetensors").write_bytes(save(dict(optimizer_states)))
        (folder / "rng.safetensors").write_bytes(save(dict(rng)))
        (folder / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
        digests = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
        (folder / MANIFEST).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")

    folder = root / f"{PREFIX}{state.step:08d}"
    replace_folder(folder, fill)
    checkpoints = list_checkpoints(root)
    at = checkpoints.index(folder) + 1
    for other in checkpoints[: max(0, at - keep)] + checkpoints[at:]:
        shutil.rmtree(other)
    return folder


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders below `root`, oldest first, whether whole or damaged."""
    return sorted(root.glob(f"{PREFIX}*")) if root.is_dir() else []


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint after comparing every file with the manifest.

    Raises:
        UserError: A file is missing or is not the one that was written.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise UserError(f"{folder} is not a whole checkpoint: it has no {MANIFEST}")
    try:
        digests: dict[str, str] = json.loads(manifest.read_text(encoding="utf-8"))
        damaged = [name for name, digest in digests.items() if not _is_intact(folder / name, digest)]
    except (ValueError, AttributeError) as error:
        raise UserError(f"{manifest} is damaged: {error}") from error
    if damaged:
        raise UserError(f"{folder} is damaged: {', '.join(damaged)} missing or changed since it was written")
    return Checkpoint(
        folder=folder,
        state=TrainerState(**json.loads((folder / "state.json").read_text(encoding="utf-8"))),
        values=adapter_io.load_adapter(folder).tensors,
        optimizer_states=load_file(folder / "optimizer.safetensors"),
        rng=load_file(folder / "rng.safetensors"),
    )


def newest_checkpoint(root: Path, warn: Callable[[str], Any]) -> Checkpoint | None:
    """Return the newest whole checkpoint below `root`; damaged ones are skipped with a message to `warn`."""
    for folder in reversed(list_checkpoints(root)):
        try:
            return load_checkpoint(folder)
        except UserError as error:
            warn(f"skipping a checkpoint: {error}")
    return None


def publish_adapter(link: Path, name: str, save_adapter: Callable[[Path], None]) -> None:
    """Write an adapter folder `name` beside `link` and point `link` at it in one atomic step; the old one goes."""
    old = link.resolve() if link.is_symlink() else None
    folder = link.with_name(name)
    replace_folder(folder, save_adapter)
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name)
    temporary.replace(link)
    if old is not None and old != folder.resolve():
        shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def collect_rng(world: World) -> dict[str, Tensor]:
    """Every rank's generator states as `{rank}.{device}` byte tensors. Collective."""
    own = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(world.device)
    states = gather_objects({name: state.numpy().tobytes() for name, state in own.items()}, world)
    return {
        f"{rank}.{name}": torch.frombuffer(bytearray(state), dtype=torch.uint8)
        for rank, of_rank in enumerate(states)
        for name, state in of_rank.items()
    }


def restore_rng(checkpoint: Checkpoint, world: World, seed: int) -> None:
    """Set this rank's generators; on another number of ranks they start anew from seed, step and rank."""
    if checkpoint.state.world_size != world.world_size:
        torch.manual_seed(hash((seed, checkpoint.state.step, world.rank)) % 2**63)
        return
    torch.set_rng_state(checkpoint.rng[f"{world.rank}.cpu"])
    if world.device.type == "cuda" and f"{world.rank}.cuda" in checkpoint.rng:
        torch.cuda.set_rng_state(checkpoint.rng[f"{world.rank}.cuda"], world.device)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_intact(path: Path, digest: str) -> bool:
    return path.is_file() and _sha256(path) == digest
