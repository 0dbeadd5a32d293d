"""The training recipe, from a loaded config to a tuned adapter, read top to bottom.

    deepspeed launchers/train.py --config ds_configs/smollm2_135m.json

A run folder then holds:

    config.json      the resolved config             metrics.jsonl   one line a logging step or evaluation
    status.json      how the last try ended          checkpoints/    for exact resume
    best             the result to use (a link)      tensorboard/    and other trackers' files

The result is an adapter folder, or, where the method trains the backbone, a model folder.
"""

from __future__ import annotations

from pathlib import Path

from adept_ds.backbone.load import weight_files
from adept_ds.backbone.weight_files import fingerprint
from adept_ds.config.run import RunConfig
from adept_ds.distributed import World, init_world, on_main_rank, sum_over_ranks
from adept_ds.entry_point import outlive_console
from adept_ds.storage.checkpoint import Checkpoint, Origin, find_checkpoint
from adept_ds.storage.run_folder import RunFolder
from adept_ds.storage.run_log import RunLog, SilentLog
from adept_ds.storage.trackers import check_trackers
from adept_ds.training.engine import build_engine
from adept_ds.training.loop import Trainer
from adept_ds.training.preparation import plan_steps, prepare_data
from adept_ds.training.results import result_of
from adept_ds.training.stopping import StopRequest


def train(run: RunConfig, resume: str = "never", stop: StopRequest | None = None) -> None:
    """Train one run, or go on with it.

    Args:
        run: The checked config.
        resume: `never`, `auto`, or a checkpoint folder; see `find_checkpoint`.
        stop: When to end early; from here on, if None.

    Raises:
        UserError: Something in the config does not fit the model, the data, the ranks or the run folder; or the loss
            is not finite, and then the parameters are those of the step before.
    """
    stop = stop or StopRequest()
    outlive_console()
    try:
        _train(run, resume, stop)
    finally:
        stop.close()


def _train(run: RunConfig, resume: str, stop: StopRequest) -> None:
    check_trackers(run.logging)
    data = prepare_data(run)
    world = init_world()
    plan = plan_steps(run, data, world)
    if world.is_main:
        print(data.summary())
        if note := data.packing_summary(run, plan.batches):
            print(note)
        if note := run.train.loss_note:
            print(f"loss: {note}")

    folder = RunFolder(Path(run.logging.run_dir))
    is_finished, checkpoint, origin = _open_folder(folder, run, resume, world)
    if is_finished:
        return
    values, first_step = (checkpoint.values, checkpoint.state.step) if checkpoint else ({}, 0)
    if checkpoint:
        checkpoint.check_ranks(world.world_size, plan.zero_stage)

    log = RunLog(folder, run, first_step, plan.total_steps) if world.is_main else SilentLog(first_step)
    try:
        on_main_rank(log.open, world)
        if sum_over_ranks([float(stop.received is not None)], world)[0]:
            log.close()
            log.set_status("interrupted", signal=stop.received)
            log.say(f"interrupted by {stop.reason} before the backbone was loaded")
            return
        engine = build_engine(plan.run, plan.deepspeed.config, data.tokenizer, world, values)
        if world.is_main:
            engine.model.print_trainable_parameters()
        result = result_of(engine, run, data.tokenizer)
        Trainer(run, data, plan, result, folder, log, stop, origin).run_from(checkpoint)
    except BaseException as error:
        log.set_status("failed", error=f"{type(error).__name__}: {error}")
        raise


def _open_folder(
    folder: RunFolder, run: RunConfig, resume: str, world: World
) -> tuple[bool, Checkpoint | None, Origin]:
    """Take the folder; return whether its run is finished, the checkpoint to go on from, and what this run is of.
    Collective.

    Raises:
        UserError: As `find_checkpoint`, `RunFolder.open` and `Checkpoint.check_origin`; or the backbone's weights
            cannot be had.
    """

    def open_it() -> tuple[bool, Checkpoint | None, Origin]:
        settings = run.model_dump(mode="json", by_alias=True)
        # One that is named is looked at before anything is written; the newest one, once no other process writes.
        named = None if resume == "auto" else find_checkpoint(folder.checkpoints, resume, warn=print)
        origin = Origin(settings, fingerprint(weight_files(run.model)))
        if named is not None:
            named.check_origin(origin)
            if named.folder.resolve().parent != folder.checkpoints.resolve():
                print(f"--resume {named.folder}: goes on from a checkpoint of another run folder, in {folder.path}")
        folder.open(settings, resume)
        status = folder.status()
        if resume == "auto" and status.get("state") == "finished":
            print(f"{folder.path} is finished ({status.get('step')} steps); nothing to do")
            return True, None, origin
        newest = find_checkpoint(folder.checkpoints, resume, warn=print) if resume == "auto" else named
        if newest is not None:
            newest.check_origin(origin)
        folder.clear_litter()
        return False, newest, origin

    return on_main_rank(open_it, world)
