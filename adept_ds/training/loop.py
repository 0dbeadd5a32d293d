"""The loop over optimizer steps, and what happens between them: metrics, evaluation, checkpoints, an early end."""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from adept_ds.config.run import RunConfig
from adept_ds.data.batches import global_batches
from adept_ds.distributed import sum_over_ranks
from adept_ds.errors import UserError
from adept_ds.storage.checkpoint import (
    Checkpoint,
    Origin,
    TrainerState,
    collect_rng,
    publish,
    restore_rng,
    save_checkpoint,
)
from adept_ds.storage.run_folder import RunFolder, unwritable
from adept_ds.storage.run_log import SilentLog
from adept_ds.training.optimizer import set_learning_rates
from adept_ds.training.preparation import RunData, StepPlan
from adept_ds.training.results import Result
from adept_ds.training.stopping import StopRequest
from adept_ds.training.validation import Validation, count_labels

LASTING = (errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""Reasons of a disk that stay until somebody changes a quota or a permission. A full one is also emptied by others, a
server comes back."""


class Trainer:
    """The loop over steps, with what happens between them. Every method is collective."""

    def __init__(
        self,
        run: RunConfig,
        data: RunData,
        plan: StepPlan,
        result: Result,
        folder: RunFolder,
        log: SilentLog,
        stop: StopRequest,
        origin: Origin,
    ) -> None:
        self.run = run
        self.data = data
        self.plan = plan
        self.result = result
        self.engine = result.engine
        self.world = result.engine.world
        self.micro_batches = data.micro_batches(plan.batches, run.method.num_virtual_tokens)
        self.validation = Validation(run, data, result.engine)
        self.folder = folder
        self.log = log
        self.stop = stop
        self.origin = origin
        self._newer_try: str | None = None
        self.state = TrainerState(step=0, world_size=self.world.world_size, zero_stage=result.zero_stage)
        self._refused: dict[str, str] = {}
        """What the disk has not taken and nothing later has made good, with the reason."""

    def run_from(self, checkpoint: Checkpoint | None) -> None:
        """Take all steps after the checkpoint's, or all of them."""
        torch.manual_seed(self.run.train.seed + self.world.rank)
        self.engine.model.train()  # `transformers` loads models for inference: without dropout and checkpointing
        if checkpoint:
            self.result.restore(checkpoint, dummy=self.micro_batches.without_labels())
            restore_rng(checkpoint, self.world, self.run.train.seed)
            self.state = replace(checkpoint.state, world_size=self.world.world_size)
            self.log.say(f"going on from {checkpoint.folder}")
        first, total_steps = self.state.step, self.plan.total_steps
        progress = tqdm(total=total_steps, initial=first, desc="train", unit="step", disable=not self.world.is_main)
        window = ThroughputWindow()
        for step, global_batch in self._steps():
            rates = self.plan.learning_rates(step)
            set_learning_rates(self.engine.optimizer, rates)
            loss, tokens, stop_ranks = self._take_step(step, global_batch)
            self.state = replace(self.state, step=step + 1)
            self.log.step = step + 1
            window.add(len(global_batch), tokens)
            progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
            progress.update()
            is_last = self.state.step == total_steps
            if self.state.step % self.run.logging.every_steps == 0 or is_last:
                self._log_step(loss, rates, window.close())
            is_evaluated = is_last or self.state.step % (self.run.eval.every_steps or self.plan.epoch_steps) == 0
            is_saved = is_evaluated or stop_ranks or self.state.step % (self.run.train.save_every or total_steps) == 0
            if is_saved:
                self._check_parameters()
            if is_evaluated:
                self._evaluate()
                window = ThroughputWindow()
            if is_saved:
                self._save()
            if stop_ranks and not is_last and not self._early_stop:
                self._check_written()
                self._finish("interrupted")
                why = f"try {self._newer_try}, which has taken over," if self._newer_try else self.stop.reason
                self.log.say(f"interrupted by {why} and saved; go on by --resume auto")
                return
        progress.close()
        if self._early_stop:
            self.log.say(self._early_stop)
        self._check_written()
        if self.state.best_step is None:
            raise UserError(
                f"no evaluation gave a finite eval/{self.run.eval.metric}, so there is no result. Lower "
                "train.learning_rate, or try model.dtype fp32 or bf16"
            )
        self._finish("finished", result=self.folder.best, reason=self._early_stop)

    def _steps(self) -> Iterator[tuple[int, list[int]]]:
        """The steps that are left with the examples of each, the same for any number of ranks."""
        train, first = self.run.train, self.state.step
        for step in range(first, self.plan.total_steps):
            if self._early_stop:
                return
            epoch, position = divmod(step, self.plan.epoch_steps)
            if position == 0 or step == first:
                size = self.plan.batches.global_batch_size
                order = global_batches(self.data.train.lengths, size, train.seed, epoch, train.group_by_length)
            yield step, order[position]

    @property
    def _early_stop(self) -> str | None:
        """Why the run ends before its last step; None if it does not, or not yet."""
        patience, state = self.run.train.early_stopping_patience, self.state
        if patience is None or state.evaluations_since_gain < patience or state.step == self.plan.total_steps:
            return None
        return f"early stopping at step {state.step}, best at step {state.best_step}"

    def _take_step(self, step: int, global_batch: list[int]) -> tuple[float, float, float]:
        """One optimizer step. Returns (loss per label token, tokens read, ranks that want to stop), all global."""
        micro_batches = self.micro_batches.of_rank(global_batch, self.world.rank)
        counts = [(count_labels(batch), int(batch["attention_mask"].sum())) for batch in micro_batches]
        labels, tokens = sum_over_ranks([sum(column) for column in zip(*counts, strict=True)], self.world)
        own_loss = self.engine.forward_backward(micro_batches, labels)
        loss, stop_ranks = sum_over_ranks([float(own_loss), float(self._wants_to_stop())], self.world)
        if not math.isfinite(loss):
            raise UserError(
                f"the loss of step {step + 1} is {loss}; the step was not taken. Lower train.learning_rate "
                f"({self.run.train.learning_rate.model_dump()}), set train.max_grad_norm, or try model.dtype fp32"
            )
        self.engine.step()
        return loss / labels, tokens, stop_ranks

    def _wants_to_stop(self) -> bool:
        """Whether this rank has had a signal, or, on rank 0, SLURM has started the run's job again elsewhere."""
        if self.world.is_main:
            self._newer_try = self.folder.newer_try(os.environ)
        return self.stop.received is not None or self._newer_try is not None

    def _log_step(self, loss: float, rates: dict[str, float], throughput: dict[str, float]) -> None:
        values = {"loss": loss, "epoch": self.state.step / self.plan.epoch_steps, **throughput}
        values |= {f"learning_rate/{group}": rate for group, rate in rates.items()}
        norm = self.engine.gradient_norm()
        if norm is not None:
            values["grad_norm"] = norm
        self.log.write(values)

    def _evaluate(self) -> None:
        """Measure on the validation set, and keep the result if it is the best so far."""
        state, step = self.state, self.state.step
        values = self.validation.figures()
        value = values.get(f"eval/{self.run.eval.metric}")
        is_best = value is None or self.run.eval.gain(value, state.best_value) > 0
        if values:
            self.log.write(values)
            figures = ", ".join(f"{name} {figure:.4f}" for name, figure in values.items())
            is_figure = value is None or math.isfinite(value)
            note = " (best)" if is_best else "" if is_figure else ", which is no figure and worse than any"
            self.log.say(figures + note)
        if value is not None:
            threshold = self.run.train.early_stopping_threshold
            has_gained = self.run.eval.gain(value, state.gain_value) > threshold
            since = 0 if has_gained else state.evaluations_since_gain + 1
            gain_value = value if has_gained else state.gain_value
            self.state = replace(self.state, gain_value=gain_value, evaluations_since_gain=since)
        if is_best:
            with self._going_on("the best result"):
                publish(self.folder.best, f"best-step-{step:08d}", partial(self.result.write, step=step), self.world)
                self.state = replace(self.state, best_step=step, best_value=value)

    def _save(self) -> None:
        write_states = partial(self.result.write_states, step=self.state.step)
        rng, keep = collect_rng(self.world), self.run.train.keep_checkpoints
        with self._going_on("a checkpoint"):
            save_checkpoint(self.folder.checkpoints, self.state, write_states, rng, keep, self.world, self.origin)
        self.log.set_status("running")

    def _check_parameters(self) -> None:
        """Refuse to keep what a step has destroyed: a checkpoint of it could only be thrown away.

        Raises:
            UserError: Names the parameters with NaN or infinity.
        """
        broken = self.engine.broken_parameters()
        if broken:
            raise UserError(
                f"by step {self.state.step} {', '.join(broken[:5])}{' and others' * (len(broken) > 5)} "
                f"{'has' if len(broken) == 1 else 'have'} become NaN or infinite; nothing of that is kept. Lower "
                f"train.learning_rate ({self.run.train.learning_rate.model_dump()}), set train.max_grad_norm, or try "
                "model.dtype fp32"
            )

    @contextmanager
    def _going_on(self, what: str) -> Iterator[None]:
        """Go on where the disk does not take something now and may take the next one.

        Raises:
            UserError: It will not before somebody has changed something; or ranks write parts of their own, so that
                they do not know of one another's trouble.
        """
        try:
            yield
        except OSError as error:
            reason = unwritable(self.folder.path, error)
            if error.errno in LASTING or self.result.zero_stage is not None:
                raise UserError(f"step {self.state.step}: {what} could not be written: {reason}") from error
            self._refused[what] = reason
            self.log.say(f"{what} could not be written, the run goes on without: {reason}")
        else:
            self._refused.pop(what, None)

    def _check_written(self) -> None:
        """Raise as `UserError` what the disk has not taken to the end."""
        if self._refused:
            what, reason = next(iter(self._refused.items()))
            raise UserError(f"step {self.state.step} was taken, but {what} could not be written: {reason}")

    def _finish(self, status: str, result: Path | None = None, reason: str | None = None) -> None:
        self.log.close(result)
        best = {"best_step": self.state.best_step, "best_value": self.state.best_value}
        self.log.set_status(status, **best, signal=self.stop.received, reason=reason)
        torch.distributed.barrier()


class ThroughputWindow:
    """Examples and tokens per second since the window was opened or last closed."""

    def __init__(self) -> None:
        self._open()

    def _open(self) -> None:
        self._start, self._examples, self._tokens = time.perf_counter(), 0, 0.0

    def add(self, examples: int, tokens: float) -> None:
        """Count one step's work."""
        self._examples += examples
        self._tokens += tokens

    def close(self) -> dict[str, float]:
        """Return the rates and start over."""
        seconds = time.perf_counter() - self._start
        rates = {"examples_per_second": self._examples / seconds, "tokens_per_second": self._tokens / seconds}
        self._open()
        return rates
