"""Exact resume: one folder a checkpoint, whole or not there.

    checkpoints/step-00000120/
        state.json                                       step, best figure so far, number of ranks
        origin.json                                      the run's settings, the backbone's fingerprint
        rng.safetensors                                  every rank's random-number states
        manifest.json                                    sha256 of each file, of DeepSpeed's the size

and, where the result is an adapter, small files with whole tensors, which any number of ranks goes on with:

        adapter_model.safetensors  adapter_config.json   the trained values in fp32, usable as an adapter
        optimizer.safetensors                            AdamW's two moments of each trained parameter, fp32

or, where the backbone is trained, each rank's own part of it all, for the same number of ranks:

        deepspeed/                                       DeepSpeed's own checkpoint

A frozen backbone is never written. A folder is filled under a temporary name and renamed when all of it is on the disk.
Where every rank writes, all of them must see the folder.
"""

from __future__ import annotations

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

from adept_ds.distributed import World, gather_objects, on_main_rank
from adept_ds.errors import UserError, did_you_mean, did_you_mean_path
from adept_ds.files import json_text, read_json
from adept_ds.storage import adapter_folder
from adept_ds.storage.run_folder import (
    CHECKPOINT_PREFIX,
    MANIFEST,
    RNG_NAME,
    SHARDED,
    STATE_NAME,
    check_named,
    checked_manifest,
    differing_settings,
    file_proof,
    list_checkpoints,
)

ORIGIN_NAME = "origin.json"
OPTIMIZER_NAME = "optimizer.safetensors"


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands. All else follows from it, the config and the tensors."""

    step: int
    """Optimizer steps taken; also the position in the data and in the schedule."""
    best_step: int | None = None
    """Step of the best result so far."""
    best_value: float | None = None
    """Its figure (loss or pass@1)."""
    gain_value: float | None = None
    """The last figure that was better than the one before it in this field, by `train.early_stopping_threshold`."""
    evaluations_since_gain: int = 0
    """Evaluations since that figure."""
    world_size: int = 1
    """Number of ranks that wrote the checkpoint."""
    zero_stage: int | None = None
    """ZeRO stage by which the tensors are split over the ranks; None if they are whole."""


@dataclass(frozen=True)
class Origin:
    """What a checkpoint is of."""

    settings: dict[str, Any]
    """The run's resolved config."""
    backbone: str | None = None
    """Fingerprint of the weights that the training started from."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, read back."""

    folder: Path
    state: TrainerState
    rng: dict[str, Tensor]
    values: dict[str, Tensor]
    """Trained values; empty if each rank reads its own part from DeepSpeed's checkpoint."""
    optimizer_states: dict[str, Tensor]
    """AdamW's moments; empty as above."""
    origin: Origin | None = None
    """None in checkpoints of earlier versions."""

    def check_origin(self, origin: Origin) -> None:
        """Refuse to go on with other weights, or with another run's settings; both would end in figures of neither.

        Raises:
            UserError: What differs.
        """
        if self.origin is None:
            return
        differing = differing_settings(self.origin.settings, origin.settings)
        if differing:
            raise UserError(f"{self.folder} is of a run with other settings: {'; '.join(differing)}")
        if None not in (self.origin.backbone, origin.backbone) and self.origin.backbone != origin.backbone:
            before, now = (one.settings["model"]["name_or_path"] for one in (self.origin, origin))
            raise UserError(
                f"{self.folder} was trained on the weights of {before!r}; model.name_or_path is {now!r}, which has "
                "others (the same weights elsewhere are taken). Name those, or start another run by --logging.run_dir"
            )

    def check_ranks(self, world_size: int, stage: int) -> None:
        """Refuse to go on where the parts of the tensors are not those of the ranks.

        Raises:
            UserError: The checkpoint is split, over another number of ranks or at another ZeRO stage.
        """
        written = self.state
        if written.zero_stage is not None and (written.world_size, written.zero_stage) != (world_size, stage):
            raise UserError(
                f"{self.folder} holds weights and optimizer states split over {written.world_size} ranks at ZeRO stage "
                f"{written.zero_stage}, which DeepSpeed cannot split anew; this run has {world_size} ranks at stage "
                f"{stage}. Go on with {written.world_size} ranks and deepspeed.zero_optimization.stage "
                f"{written.zero_stage}, or start another run from the best model so far (model.name_or_path)"
            )


def replace_folder(folder: Path, fill: Callable[[Path], None], world: World) -> None:
    """Make `folder` with what `fill` writes, under a temporary name first; a folder that is there is replaced.

    Collective: every rank calls `fill` with the same path.
    """
    temporary = folder.with_name(temporary_name(folder.name))

    def clear() -> None:
        # A process that was killed may have left it.
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def put_in_place() -> None:
        for path in [*temporary.rglob("*"), temporary]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)

    on_main_rank(clear, world)
    try:
        fill(temporary)
    except BaseException:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    on_main_rank(put_in_place, world)


def temporary_name(name: str) -> str:
    """Name of a folder while it is filled."""
    return f".{name}.tmp"


def save_checkpoint(
    root: Path,
    state: TrainerState,
    write_states: Callable[[Path], None],
    rng: Mapping[str, Tensor],
    keep: int,
    world: World,
    origin: Origin | None = None,
) -> Path:
    """Write a checkpoint below `root` and remove all but the newest `keep`. Collective.

    Checkpoints of later steps go too: the run went back to before them, and they belong to steps that it takes anew.

    Args:
        root: Folder of the checkpoints.
        state: Where the run stands.
        write_states: Called on every rank with the folder, to write parameters and optimizer states into.
        rng: As `collect_rng` returns it.
        keep: Number of checkpoints to keep.
        world: This rank.
        origin: What it is of.
    """
    folder = root / f"{CHECKPOINT_PREFIX}{state.step:08d}"

    def fill(folder: Path) -> None:
        write_states(folder)
        on_main_rank(lambda: complete(folder), world)

    def complete(folder: Path) -> None:
        write_tensors(folder / RNG_NAME, rng)
        (folder / STATE_NAME).write_text(json_text(asdict(state), indent=2) + "\n", encoding="utf-8")
        if origin is not None:
            (folder / ORIGIN_NAME).write_text(json_text(asdict(origin), indent=2) + "\n", encoding="utf-8")
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        proofs = {name: file_proof(folder, name) for name in names}
        (folder / MANIFEST).write_text(json.dumps(proofs, indent=2) + "\n", encoding="utf-8")

    def prune() -> None:
        checkpoints = list_checkpoints(root)
        at = checkpoints.index(folder) + 1
        for other in checkpoints[: max(0, at - keep)] + checkpoints[at:]:
            # One that cannot be removed now is tried again after the next save.
            shutil.rmtree(other, ignore_errors=True)

    replace_folder(folder, fill, world)
    on_main_rank(prune, world)
    return folder


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write whole tensors as safetensors."""
    path.write_bytes(save(dict(tensors)))


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint after comparing every file with the manifest.

    Raises:
        UserError: A file is missing or is not the one that was written.
    """
    try:
        return _read_checkpoint(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror or error} ({error.filename})") from error


def _read_checkpoint(folder: Path) -> Checkpoint:
    manifest, proofs = folder / MANIFEST, checked_manifest(folder)
    try:
        state = TrainerState(**read_json(folder / STATE_NAME))
        origin = Origin(**read_json(folder / ORIGIN_NAME)) if ORIGIN_NAME in proofs else None
    except TypeError as error:
        raise UserError(f"{folder} was written by another version: {error}") from error
    is_whole = state.zero_stage is None
    if is_whole:
        check_named(folder, proofs, OPTIMIZER_NAME, adapter_folder.CONFIG_NAME, adapter_folder.TENSORS_NAME)
    elif not any(name.startswith(f"{SHARDED}/") for name in proofs):
        raise UserError(f"{manifest} is damaged: it names no file in {SHARDED}")
    return Checkpoint(
        folder=folder,
        state=state,
        rng=load_file(folder / RNG_NAME),
        values=adapter_folder.load_adapter(folder).tensors if is_whole else {},
        optimizer_states=load_file(folder / OPTIMIZER_NAME) if is_whole else {},
        origin=origin,
    )


def find_checkpoint(root: Path, resume: str, warn: Callable[[str], Any]) -> Checkpoint | None:
    """Return the checkpoint that a run starts from; None for the beginning.

    Args:
        root: Folder of the run's checkpoints.
        resume: `never` is the beginning; `auto` the newest whole checkpoint, or the beginning if there is none;
            anything else is a checkpoint folder.
        warn: Called with a line for each damaged checkpoint that is passed over.

    Raises:
        UserError: The folder that `resume` names holds no whole checkpoint.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return newest_checkpoint(root, warn)
    if not Path(resume).is_dir():
        near = did_you_mean(resume, ["auto", "never"]) or did_you_mean_path(resume)
        raise UserError(f"--resume {resume}: no such folder{near or '; expected auto, never or a checkpoint folder'}")
    return load_checkpoint(Path(resume))


def newest_checkpoint(root: Path, warn: Callable[[str], Any]) -> Checkpoint | None:
    """Return the newest whole checkpoint below `root`; what is damaged or half written is told to `warn`."""
    for folder in sorted(root.glob(temporary_name(f"{CHECKPOINT_PREFIX}[0-9]*"))):
        warn(f"skipping {folder}: the save was cut short")
    for folder in reversed(list_checkpoints(root)):
        try:
            return load_checkpoint(folder)
        except UserError as error:
            warn(f"skipping a checkpoint: {error}")
    return None


def publish(link: Path, name: str, fill: Callable[[Path], None], world: World) -> None:
    """Make a folder `name` beside `link` as `replace_folder` does, and point `link` at it in one atomic step.

    The folder that it pointed at goes. If that has the same name, the new one is `NAME-again`: a folder that is to be
    replaced is away for a moment. Collective.
    """
    is_taken = on_main_rank(lambda: link.is_symlink() and link.readlink() == Path(name), world)
    folder = link.with_name(f"{name}-again" if is_taken else name)
    replace_folder(folder, fill, world)

    def point() -> None:
        old = link.resolve() if link.is_symlink() else None
        temporary = link.with_name(f".{link.name}.tmp")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder.name)
        temporary.replace(link)
        if old is not None and old != folder.resolve():
            shutil.rmtree(old, ignore_errors=True)

    on_main_rank(point, world)


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
